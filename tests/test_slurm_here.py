"""launch/slurm.sbatch under a real SLURM of one node, which the test starts here where its programs are installed."""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from program import ROOT, environment, write_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not all(shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin') for name in ('slurmctld', 'slurmd', 'sbatch')),
    reason='SLURM is not installed (Debian: slurmctld slurmd slurm-client)')]

CONF = '''
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
GresTypes=gpu
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=main Nodes={host} Default=YES State=UP
'''


def until(condition, seconds=120):
  deadline = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < deadline, 'it took too long'
    time.sleep(0.3)
  return found


@pytest.fixture
def slurm(tmp_path):
  """The environment of a SLURM with one node of two GPUs, which are plain files."""
  folder, host = tmp_path / 'slurm', socket.gethostname()
  ports = []
  for _ in range(2):
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      ports.append(s.getsockname()[1])
  for name in ('state', 'spool'):
    (folder / name).mkdir(parents=True)
  for name in ('gpu0', 'gpu1'):
    (folder / name).touch()
  (folder / 'slurm.conf').write_text(CONF.format(host=host, user=getpass.getuser(), folder=folder, ports=ports))
  (folder / 'gres.conf').write_text(f'Name=gpu File={folder}/gpu[0-1]\n')
  (folder / 'cgroup.conf').write_text('CgroupAutomount=no\n')
  env = environment(tmp_path) | {'SLURM_CONF': str(folder / 'slurm.conf'), 'PATH': f'{os.environ["PATH"]}:/usr/sbin',
                                 'LLM_JAX_PYTHON': sys.executable, 'JAX_NUM_CPU_DEVICES': '1'}
  servers = []
  try:
    for name in ('slurmctld', 'slurmd'):
      with open(folder / f'{name}.log', 'w') as log:
        servers.append(subprocess.Popen([name, '-D'], env=env, stdout=log, stderr=log))
    until(lambda: 'idle' in subprocess.run(['sinfo', '-ho', '%T'], env=env, capture_output=True, text=True).stdout, 30)
    yield env
  finally:
    subprocess.run(['scancel', f'--user={getpass.getuser()}'], env=env, check=False)
    time.sleep(1)
    for server in servers:
      server.terminate()
    for server in servers:
      server.wait(30)


def test_a_job_is_queued_again_after_a_lost_task_and_a_signal_but_not_after_scancel(slurm, tmp_path):
  write_config(tmp_path)

  def call(*words):
    return subprocess.run(words, env=slurm, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

  printed = call('sbatch', '--ntasks-per-node=2', '--gpus-per-node=2', '--cpus-per-task=1',
                 str(ROOT / 'launch' / 'slurm.sbatch'), '--config=tiny.py', '--workdir=run',
                 '--config.num_steps=100000', '--config.eval.every=0', '--config.log.every=20',
                 '--config.checkpoint.every=20')
  job = re.search(r'Submitted batch job (\d+)', printed)[1]
  logs = [tmp_path / 'logs' / f'llm_jax-{job}-{rank}.log' for rank in range(2)]

  def state():
    return re.search(r'JobState=(\w+)', call('scontrol', 'show', 'job', job))[1]

  def start(number):
    """Waits until the job is trained at its start of this number."""
    if number > 1:
      until(lambda: state() == 'PENDING')
      call('scontrol', 'update', f'job={job}', 'StartTime=now')  # SLURM would wait two minutes
    until(lambda: logs[0].exists() and logs[0].read_text().count('first step after') == number, 180)

  start(1)
  said = f'distributed: 2 processes by SLURM, coordinator {socket.gethostname()}:'
  assert all(said in log.read_text() for log in logs)
  until((tmp_path / 'run' / 'checkpoints' / '20' / 'manifest.json').exists)
  [task] = [process for process in psutil.process_iter() if _rank(process) == (job, '1')]
  task.send_signal(signal.SIGKILL)
  start(2)
  log = tmp_path / f'llm_jax-{job}.log'
  assert re.search(r'ended with (137|76) after \d+ s; crashes in a row: 1; queued again: yes', log.read_text())
  assert 'resuming from step' in logs[0].read_text()
  call('scancel', '--signal=TERM', job)  # as before the time limit: the tasks alone
  start(3)
  assert 'ended with 75' in log.read_text() and 'saved in run; repeat the command' in logs[0].read_text()
  call('scancel', job)
  assert until(lambda: state() == 'CANCELLED') and log.read_text().count('queued again: yes') == 2
  time.sleep(3)
  assert state() == 'CANCELLED'


def _rank(process):
  """(job, rank) of a task that is Python; None of other processes."""
  with contextlib.suppress(psutil.Error):
    values = process.environ()
    if Path(process.exe()).name.startswith('python') and 'SLURM_STEP_ID' in values:
      return values['SLURM_JOB_ID'], values['SLURM_PROCID']
  return None
