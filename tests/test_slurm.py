"""launch/slurm.sbatch under a stand-in for SLURM: what it starts, and what each exit code leads to."""

import json
import shutil
import sys

import pytest
from program import ROOT
from slurm import install, sbatch

# Exits with the first of the codes in the file `codes`, and removes it.
PYTHON = '''#!{python}
import os, signal, sys
from pathlib import Path
path = Path({codes!r})
first, *rest = path.read_text().split() or ['0']
path.write_text(' '.join(rest))
print('the run says', first)
if first == 'kill':
  os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(first))
'''


@pytest.fixture
def checkout(tmp_path):
  """A checkout with the script, and a Python that exits with given codes; in a folder with a space in its name."""
  root = tmp_path / 'my checkout'
  (root / 'launch').mkdir(parents=True)
  shutil.copy(ROOT / 'launch' / 'slurm.sbatch', root / 'launch')
  python = root / '.venv' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text(PYTHON.format(python=sys.executable, codes=str(tmp_path / 'codes')))
  python.chmod(0o755)
  (tmp_path / 'submit').mkdir()
  (tmp_path / 'codes').write_text('0')
  return root


def submit(checkout, codes='0', options=(), **variables):
  """(exit code, log of the job, calls of srun) of a job whose starts exit with these codes."""
  folder = checkout.parent
  (folder / 'codes').write_text(codes)
  code = sbatch(checkout / 'launch' / 'slurm.sbatch', '--config=gpt_small', '--config.data.path=my texts/*.txt',
                cwd=folder / 'submit', env=install(folder) | variables, options=options)
  calls = folder / 'srun'
  return code, (folder / 'submit' / 'llm_jax-4242.log').read_text(), [
      json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_every_task_runs_the_checkouts_python_with_the_arguments(checkout):
  code, log, [(options, command, variables)] = submit(checkout, options=('--nodes=2',))
  assert code == 0 and 'ended with 0' in log and 'queued again: no' in log
  assert command == [str(checkout / '.venv/bin/python'), '-m', 'llm_jax.main', '--distributed', '--config=gpt_small',
                     '--config.data.path=my texts/*.txt']
  assert options['gpu-bind'] == 'none' and options['kill-on-bad-exit'] == '0'
  assert options['output'] == str(checkout.parent / 'submit/logs/llm_jax-4242-%t.log')
  assert variables['NCCL_DEBUG'] == 'WARN' and 'FI_PROVIDER' not in variables
  asked = json.loads((checkout.parent / 'options').read_text())
  assert asked['nodes'] == '2' and asked['signal'] == 'TERM@300' and 'requeue' in asked
  assert asked['gpus-per-node'] == asked['ntasks-per-node']


@pytest.mark.parametrize(('codes', 'code', 'starts'), [
    ('0', 0, 1), ('75 0', 0, 2), ('75 75 75 75 75 75 75 0', 0, 8), ('76 0', 0, 2), ('kill 0', 0, 2), ('1 134 0', 0, 3),
    ('65 0', 65, 1), ('70 0', 70, 1), ('74 0', 74, 1), ('75 78 0', 78, 2), ('1 1 1 0', 1, 3), ('1 76 kill 0', 137, 3),
    ('1 1 75 1 1 75 0', 0, 7)])
def test_the_exit_code_decides_whether_the_job_is_queued_again(checkout, codes, code, starts):
  """At most 3 crashes in a row."""
  found, log, calls = submit(checkout, codes, LLM_JAX_MAX_CRASHES='3')
  assert (found, len(calls)) == (code, starts), log
  assert log.count('\nended with ') == starts and f'start {starts} of job 4242' in log
  assert (checkout.parent / 'submit/logs/llm_jax-4242-0.log').read_text().count('the run says') == starts, 'appended'
  assert ('the run says' in log) == (codes != '0'), 'the end of the log of rank 0 after a failure'


def test_a_crash_after_an_hour_begins_a_new_count(checkout):
  code, log, calls = submit(checkout, '1 1 1 1 1 0', LLM_JAX_MAX_CRASHES='2', LLM_JAX_HEALTHY_SECONDS='0')
  assert code == 0 and len(calls) == 6, log


def test_efa_is_set_up_where_its_driver_has_devices(checkout):
  driver = checkout.parent / 'efa'
  driver.mkdir()
  _, log, [(_, _, variables)] = submit(checkout, EFA_DRIVER=str(driver))
  assert 'EFA' not in log and 'FI_PROVIDER' not in variables
  (driver / '0000:00:1d.0').mkdir()
  for path in (checkout.parent / 'bin', checkout.parent / 'srun'):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  _, log, [(_, _, variables)] = submit(checkout, EFA_DRIVER=str(driver), FI_EFA_USE_DEVICE_RDMA='0')
  assert 'network: EFA' in log and variables['FI_PROVIDER'] == 'efa'
  assert variables['FI_EFA_USE_DEVICE_RDMA'] == '0', "the user's own setting stays"


def test_another_python_and_folder_of_logs(checkout):
  (checkout / '.venv/bin/python').rename(checkout / 'my python')
  code, log, calls = submit(checkout)
  assert code == 78 and not calls and 'set LLM_JAX_PYTHON' in log
  shutil.rmtree(checkout.parent / 'bin')
  logs = checkout.parent / 'my logs'
  code, _, [(_, command, _)] = submit(checkout, LLM_JAX_PYTHON=str(checkout / 'my python'), LLM_JAX_LOGS=str(logs))
  assert code == 0 and command[0] == str(checkout / 'my python')
  assert (logs / 'llm_jax-4242-0.log').is_file()
