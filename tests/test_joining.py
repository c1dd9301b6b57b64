"""How a process finds the others: the variables of clusters, and real processes that join by them."""

import http.server
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from program import ROOT, environment, finish, write_config
from slurm import install, sbatch

from llm_jax.base import cluster, process
from llm_jax.base.cluster import find_cluster
from llm_jax.base.errors import ConfigError

SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_ID': '1', 'SLURM_STEP_NODELIST': 'gpu[03-04,9],other', 'SLURM_NTASKS': '16',
         'SLURM_STEP_NUM_TASKS': '16', 'SLURM_STEP_NUM_NODES': '2', 'SLURM_PROCID': '11', 'SLURM_LOCALID': '3'}
JOBSET = {'JOBSET_NAME': 'gpt', 'REPLICATED_JOB_NAME': 'nodes', 'JAX_NUM_PROCESSES': '4', 'JOB_INDEX': '0',
          'JOB_COMPLETION_INDEX': '2'}
MPI = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
       'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911'}


def test_slurm():
  found = find_cluster(SLURM)
  assert str(found) == '16 processes by SLURM, coordinator gpu03:61658, this is 11' and found.devices == (3,)
  assert find_cluster(SLURM | {'SLURM_STEP_NODELIST': 'a,b'}).coordinator.startswith('a:')
  assert find_cluster(SLURM | {'SLURM_STEP_NODELIST': 'a'}).coordinator.startswith('a:')
  assert find_cluster(SLURM | {'SLURM_STEP_ID': '2'}).coordinator != found.coordinator, 'two steps at the same time'
  assert find_cluster(SLURM | {'JAX_COORDINATOR_PORT': '99'}).coordinator == 'gpu03:99'
  assert find_cluster({k: v for k, v in SLURM.items() if k != 'SLURM_STEP_NODELIST'}) is None, 'not by srun'


@pytest.mark.parametrize(('variables', 'devices'), [
    ({}, (3,)), ({'SLURM_STEP_NUM_NODES': '16', 'SLURM_LOCALID': '0'}, None),
    ({'SLURM_GPUS_ON_NODE': '8'}, (3,)), ({'SLURM_GPUS_ON_NODE': '16'}, (6, 7)),
    ({'SLURM_GPUS_ON_NODE': '8', 'CUDA_VISIBLE_DEVICES': '5'}, None),
    ({'SLURM_GPUS_ON_NODE': '16', 'CUDA_VISIBLE_DEVICES': '6,7'}, None),
    ({'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}, (3,)), ({'JAX_LOCAL_DEVICE_IDS': '1,2'}, (1, 2))])
def test_the_gpus_of_a_task(variables, devices):
  """One for each of 8 tasks, all for the only task of a node, its share of more, or those that SLURM shows it."""
  assert find_cluster(SLURM | variables).devices == devices


def test_a_jobset():
  assert str(find_cluster(JOBSET)) == '4 processes by JobSet gpt, coordinator gpt-nodes-0-0.gpt:8476, this is 2'
  second = JOBSET | {'JOB_INDEX': '1', 'REPLICATED_JOB_REPLICAS': '2', 'JOB_COMPLETION_INDEX': '1'}
  assert find_cluster(second).process == 3


def test_open_mpi():
  found = find_cluster(MPI)
  assert re.fullmatch(r'4 processes by Open MPI, coordinator 10.96.0.1:6\d{4}, this is 3', str(found))
  assert found.devices == (1,)
  of_version_5 = {k: v for k, v in MPI.items() if 'hnp' not in k} | {'PMIX_NAMESPACE': 'prterun-host-77@1'}
  here = find_cluster(of_version_5 | {'OMPI_COMM_WORLD_LOCAL_SIZE': '4'})
  assert here.coordinator.startswith('127.0.0.1:')
  with pytest.raises(ConfigError, match='set JAX_COORDINATOR_ADDRESS'):
    find_cluster(of_version_5)
  assert find_cluster(of_version_5 | {'JAX_COORDINATOR_ADDRESS': 'a:1'}).coordinator == 'a:1'


def test_variables_that_are_incomplete_or_wrong():
  for variables in ({k: v for k, v in JOBSET.items() if k != 'JAX_NUM_PROCESSES'}, SLURM | {'SLURM_PROCID': 'x'}):
    with pytest.raises(ConfigError, match='incomplete or wrong'):
      find_cluster(variables)
  assert find_cluster({}) is None and find_cluster({'JAX_NUM_PROCESSES': '2'}) is None


def test_a_job_without_srun_is_warned_of():
  batch = {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}
  assert 'has 8 tasks' in cluster.alone_in_a_job(batch)
  assert not any(map(cluster.alone_in_a_job, ({}, SLURM, batch | {'SLURM_NTASKS': '1'}, {'SLURM_JOB_ID': '7'})))


METADATA = {'worker-network-endpoints': 'unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6', 'agent-worker-number': '1',
            'tpu-env': "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
                       "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"}


@pytest.fixture
def metadata():
  """The address of a server with METADATA, as every machine of Google Cloud has one."""
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      value = METADATA.get(self.path.removeprefix('/computeMetadata/v1/instance/attributes/'))
      self.send_response(200 if value and self.headers['Metadata-Flavor'] == 'Google' else 404)
      self.end_headers()
      self.wfile.write((value or '').encode())

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'127.0.0.1:{server.server_port}'
  server.shutdown()
  server.server_close()


def test_cloud_tpu(metadata, monkeypatch):
  assert find_cluster({'GCE_METADATA_IP': metadata}) is None, 'no TPU here, so nothing is asked'
  monkeypatch.setattr(cluster, 'find_platform', lambda: 'tpu')
  found = find_cluster({'GCE_METADATA_IP': metadata})
  assert str(found) == '4 processes by Cloud TPU, coordinator 10.0.0.1:8482, this is 3' and found.by_jax
  assert find_cluster({'GCE_METADATA_IP': '127.0.0.1:9'}) is None, 'no metadata'
  assert find_cluster({'GCE_METADATA_IP': metadata, 'TPU_SKIP_MDS_QUERY': '1'}) is None
  on_gke = {'TPU_WORKER_HOSTNAMES': 'a.svc,b.svc', 'TPU_WORKER_ID': '1'}
  assert str(find_cluster(on_gke)) == '2 processes by GKE, coordinator a.svc:8482, this is 1'
  assert find_cluster({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}).num_processes == 1


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('joining')
  write_config(folder)
  return folder


FLAGS = ('--config=tiny.py', '--config.num_steps=4', '--config.eval.every=0')


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return str(s.getsockname()[1])


def start(folder, *flags, **variables):
  return subprocess.Popen([sys.executable, '-m', 'llm_jax', 'train', *FLAGS, *flags], cwd=folder, text=True,
                          env=environment(folder) | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_two_tasks_of_slurm_join_under_the_batch_script(folder, tmp_path):
  """The real script, under a stand-in for SLURM, with real processes."""
  variables = environment(folder) | install(tmp_path) | {
      'STUB_NTASKS': '2', 'JAX_COORDINATOR_PORT': free_port(), 'LLM_JAX_PYTHON': sys.executable}
  assert sbatch(ROOT / 'launch' / 'slurm.sbatch', *FLAGS, '--workdir=slurm', cwd=folder, env=variables) == 0
  for rank in range(2):
    log = (folder / f'logs/llm_jax-4242-{rank}.log').read_text()
    assert f'distributed: 2 processes by SLURM, coordinator 127.0.0.1:{variables["JAX_COORDINATOR_PORT"]}, ' \
           f'this is {rank}\n' in log
  assert '2 x cpu, 2 process(es)' in (folder / 'logs/llm_jax-4242-0.log').read_text()


@pytest.mark.parametrize('kind', [pytest.param(kind, marks=pytest.mark.slow) for kind in ('jobset', 'slurm', 'mpi')])
def test_two_processes_join_without_a_flag(folder, kind):
  """Never two copies that train on their own."""
  port = free_port()
  shared = {
      'slurm': {'SLURM_JOB_ID': '1', 'SLURM_STEP_ID': '0', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'},
      'jobset': {'JOBSET_NAME': 'gpt', 'REPLICATED_JOB_NAME': 'nodes', 'JAX_NUM_PROCESSES': '2',
                 'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}'},  # where no service resolves the name of a pod
      'mpi': {'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2', 'PMIX_NAMESPACE': 'x'}}[kind]
  own = {'slurm': ('SLURM_PROCID', 'SLURM_LOCALID'), 'jobset': ('JOB_COMPLETION_INDEX',),
         'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK')}[kind]
  processes = [start(folder, f'--workdir=joined_{kind}', JAX_COORDINATOR_PORT=port, **shared,
                     **dict.fromkeys(own, str(rank))) for rank in range(2)]
  outputs = [finish(process) for process in processes]
  assert all(f', this is {rank}\n' in output for rank, output in enumerate(outputs))
  assert '2 x cpu, 2 process(es)' in outputs[0] and 'step 4/4' in outputs[0] and 'step 4/4' not in outputs[1]


def test_one_that_waits_in_vain_says_for_whom(folder):
  output = finish(start(folder, '--workdir=vain', JAX_COORDINATOR_PORT=free_port(), LLM_JAX_JOIN_SECONDS='3',
                        **(SLURM | {'SLURM_STEP_NODELIST': 'localhost', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'})),
                  code=76)
  assert 'error: not all processes have come within 3 s (LLM_JAX_JOIN_SECONDS): 16 processes by SLURM' in output
  assert 'Traceback' not in output


def test_a_command_in_a_shell_of_a_pod_does_not_come_between_the_processes_of_its_run(monkeypatch, capsys):
  joined = []
  monkeypatch.setattr('jax.distributed.initialize', lambda *values, **_: joined.append(values))
  monkeypatch.setattr(process.signal, 'SIGABRT', signal.SIGUSR2)  # whose handler may be replaced here
  monkeypatch.setattr(process, 'expect_others', lambda: None)
  for name, value in JOBSET.items():
    monkeypatch.setenv(name, value)
  process.start_processes('auto', ambient=False)
  assert not joined and 'distributed: alone, although there are 4 processes by JobSet gpt' in capsys.readouterr().err
  process.start_processes('off')
  assert not joined
  process.start_processes('on', ambient=False)
  process.start_processes('auto')
  assert joined == [('gpt-nodes-0-0.gpt:8476', 4, 2, None)] * 2


@pytest.mark.slow
def test_off_and_no_cluster(folder):
  output = finish(start(folder, '--workdir=off', '--distributed=off', **SLURM))
  assert 'distributed:' not in output and '1 process(es)' in output
  output = finish(start(folder, '--workdir=none', '--distributed'), code=78)
  assert '--distributed: no cluster is found' in output and 'Traceback' not in output
