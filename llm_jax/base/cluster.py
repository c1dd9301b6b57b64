"""Finds the other processes of a run by what SLURM, a Kubernetes JobSet, Open MPI or Cloud TPU has given this one.

JAX can do much of it too. Here the values are known before processes connect, so that a process can say what it waits
for, and a JobSet needs no rights to ask Kubernetes.
"""

from __future__ import annotations

import os
import re
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llm_jax.base.errors import ConfigError
from llm_jax.base.runtime import find_platform

METADATA_SECONDS = 3.0  # to ask the metadata server, which answers within milliseconds where there is one
FIRST_PORT, NUM_PORTS = 61440, 4096  # of coordinators; a job's own number chooses one, as several may share a host
JOBSET_PORT, TPU_PORT = 8476, 8482


class Cluster(NamedTuple):
  """What started this process, and which of how many it is."""

  name: str
  num_processes: int
  process: int
  coordinator: str
  # The local devices that this process takes; None: all that it sees.
  devices: tuple[int, ...] | None = None
  by_jax: bool = False  # whether JAX finds the values itself
  ambient: bool = False  # whether each program on this host sees it, also one in a shell beside a run

  def __str__(self) -> str:
    return f'{self.num_processes} processes by {self.name}, coordinator {self.coordinator}, this is {self.process}'


def find_cluster(environ: Mapping[str, str] = os.environ) -> Cluster | None:
  """The cluster that has started this process; None without one. Raises ConfigError if its variables are incomplete."""
  for find in (_by_variables, _tpu, _slurm, _jobset, _open_mpi):
    try:
      found = find(environ)
    except (KeyError, ValueError) as e:
      kind = find.__name__.strip('_').replace('_', ' ')
      raise ConfigError(f'--distributed: the variables of {kind} are incomplete or wrong ({e}); set '
                        'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or --distributed=off') from None
    if found is not None:
      return found
  return None


def alone_in_a_job(environ: Mapping[str, str] = os.environ) -> str:
  """A warning if a job has several tasks, but this process was not started by srun; else ''."""
  tasks = environ.get('SLURM_NTASKS', '1')
  if 'SLURM_JOB_ID' not in environ or 'SLURM_STEP_ID' in environ or tasks in ('', '1'):
    return ''
  return (f'WARNING: job {environ["SLURM_JOB_ID"]} of SLURM has {tasks} tasks, but this process was started without '
          'srun and trains alone; launch/slurm.sbatch starts all')


def _by_variables(environ: Mapping[str, str]) -> Cluster | None:
  """The variables of JAX, which launch/local.py sets."""
  if not {'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'} <= environ.keys():
    return None
  return Cluster('variables of JAX', int(environ['JAX_NUM_PROCESSES']), int(environ['JAX_PROCESS_ID']),
                 environ['JAX_COORDINATOR_ADDRESS'], _devices(environ))


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
  """A task of srun; its first node has the coordinator."""
  if not {'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_LOCALID'} <= environ.keys():
    return None
  tasks = int(environ.get('SLURM_STEP_NUM_TASKS') or environ['SLURM_NTASKS'])
  # node[001-004,007],other: the first name is node001.
  first = re.match(r'([^,\[]+)(?:\[([^,\]-]+))?', environ['SLURM_STEP_NODELIST'])
  if first is None:
    raise ValueError(f'SLURM_STEP_NODELIST={environ["SLURM_STEP_NODELIST"]}')
  number = int(environ['SLURM_JOB_ID']) * 31 + int(environ.get('SLURM_STEP_ID', 0))
  on_node = -(-tasks // int(environ.get('SLURM_STEP_NUM_NODES', 1)))
  devices = _devices(environ, int(environ['SLURM_LOCALID']), on_node, environ.get('SLURM_GPUS_ON_NODE', ''))
  return Cluster('SLURM', tasks, int(environ['SLURM_PROCID']), environ.get('JAX_COORDINATOR_ADDRESS') or
                 f'{first[1]}{first[2] or ""}:{_port(environ, number)}', devices)


def _jobset(environ: Mapping[str, str]) -> Cluster | None:
  """A pod of a Kubernetes JobSet, whose headless service has the name of the first pod."""
  if not {'JOBSET_NAME', 'JOB_COMPLETION_INDEX'} <= environ.keys():
    return None
  name, count = environ['JOBSET_NAME'], int(environ['JAX_NUM_PROCESSES'])
  pods = count // int(environ.get('REPLICATED_JOB_REPLICAS', 1))  # of each job
  process = int(environ.get('JOB_INDEX', 0)) * pods + int(environ['JOB_COMPLETION_INDEX'])
  port = environ.get('JAX_COORDINATOR_PORT', JOBSET_PORT)
  return Cluster(f'JobSet {name}', count, process, environ.get('JAX_COORDINATOR_ADDRESS') or
                 f'{name}-{environ["REPLICATED_JOB_NAME"]}-0-0.{name}:{port}', _devices(environ), ambient=True)


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
  """A process of mpirun; on several hosts its own host, as Open MPI 4 names it, has the coordinator."""
  if not {'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK'} <= environ.keys():
    return None
  size, on_host = int(environ['OMPI_COMM_WORLD_SIZE']), int(environ.get('OMPI_COMM_WORLD_LOCAL_SIZE', 0))
  address = environ.get('JAX_COORDINATOR_ADDRESS', '')
  if not address:
    job = environ.get('OMPI_MCA_orte_hnp_uri') or environ.get('PMIX_NAMESPACE', '')
    found = re.search(r'tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]]', job)
    host = '127.0.0.1' if size == on_host else (found[1] or f'[{found[2]}]') if found else None
    if host is None:
      raise ValueError('no address of process 0')
    address = f'{host}:{_port(environ, zlib.crc32(job.partition(";")[0].encode()))}'
  return Cluster('Open MPI', size, int(environ['OMPI_COMM_WORLD_RANK']), address,
                 _devices(environ, int(environ['OMPI_COMM_WORLD_LOCAL_RANK']), on_host or size))


def _tpu(environ: Mapping[str, str]) -> Cluster | None:
  """A host of TPU slices, by GKE's variables or the metadata of Cloud TPU. JAX finds the same, and more, itself."""
  if find_platform() != 'tpu':
    return None
  on_gke = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')
  if on_gke:
    name, hosts, worker, value = 'GKE', on_gke.split(','), environ.get('TPU_WORKER_ID', '0'), _tpu_value(environ, '')
  elif 'TPU_SKIP_MDS_QUERY' not in environ and (endpoints := _metadata(environ, 'worker-network-endpoints')):
    name, hosts = 'Cloud TPU', [endpoint.split(':')[-1] for endpoint in endpoints.split(',')]
    worker = _metadata(environ, 'agent-worker-number') or '0'
    value = _tpu_value(environ, _metadata(environ, 'tpu-env'))
  else:
    return None
  slices, coordinator = int(value('MEGASCALE_NUM_SLICES') or 1), value('MEGASCALE_COORDINATOR_ADDRESS') or hosts[0]
  return Cluster(name, slices * len(hosts), int(value('MEGASCALE_SLICE_ID') or 0) * len(hosts) + int(worker),
                 f'{coordinator.split(":")[0]}:{_port(environ, None)}', by_jax=True, ambient=True)


def _tpu_value(environ: Mapping[str, str], metadata: str) -> Callable[[str], str | None]:
  """Looks up a variable, or a line such as NAME: 'value' in the metadata of a TPU."""
  lines = dict(re.findall(r"^(\w+): '?(.*?)'?$", metadata, re.M))
  return lambda name: environ.get(name) or lines.get(name)


def _metadata(environ: Mapping[str, str], key: str) -> str:
  """An attribute of this machine at Google Cloud; '' without one."""
  host = environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(f'http://{host}/computeMetadata/v1/instance/attributes/{key}',
                                   headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=METADATA_SECONDS) as answer:
      return answer.read().decode()
  except OSError:
    return ''


def _port(environ: Mapping[str, str], number: int | None) -> int:
  chosen = TPU_PORT if number is None else FIRST_PORT + number % NUM_PORTS
  return int(environ.get('JAX_COORDINATOR_PORT') or chosen)


def _devices(environ: Mapping[str, str], local: int = 0, on_host: int = 1, gpus: str = '') -> tuple[int, ...] | None:
  """The local devices of process `local` of the `on_host` that share a host with `gpus`.

  None: all that it sees, as where the launcher shows each process only its own.
  """
  if chosen := environ.get('JAX_LOCAL_DEVICE_IDS'):
    return tuple(int(number) for number in chosen.split(','))
  visible = len(environ['CUDA_VISIBLE_DEVICES'].split(',')) if environ.get('CUDA_VISIBLE_DEVICES') else None
  count = int(gpus) if gpus.isdigit() else visible or on_host
  if on_host == 1 or (visible is not None and (visible == 1 or visible < count)):
    return None
  share = max(1, count // on_host)
  return tuple(range(local * share, (local + 1) * share))
