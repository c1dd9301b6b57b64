"""launch/tpu_pod.sh with a stand-in for gcloud, whose hosts are folders here with a real bash and tmux."""

import json
import os
import shutil
import subprocess
import time

import pytest
from gcloud import install, remove
from program import ROOT

pytestmark = pytest.mark.skipif(shutil.which('tmux') is None, reason='tmux is not installed')
SLICE = ('--zone=us-x1', '--type=v5litepod-16', '--version=v2-alpha-tpuv5-lite')
TRICKY = ('--config=gpt_small', "--config.data.path=it's my $HOME/*.txt", '--config.eval.prompts=("a b", "c")')


@pytest.fixture
def pod(tmp_path):
  """Calls the script: pod(command, *options) -> what it prints."""
  env = {name: value for name, value in os.environ.items() if name != 'TMUX'} | install(tmp_path)
  (tmp_path / 'codes').write_text('0')

  def call(command, *options, code=0, timeout=120):
    done = subprocess.run(['bash', ROOT / 'launch/tpu_pod.sh', command, 'my-tpu', *options], env=env, text=True,
                          capture_output=True, timeout=timeout, cwd=tmp_path)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + done.stderr

  call.folder = tmp_path
  yield call
  remove(tmp_path)


def calls(pod, *words):
  """The calls of gcloud that begin with these words."""
  lines = (pod.folder / 'calls').read_text().splitlines() if (pod.folder / 'calls').exists() else []
  return [call[2 + len(words):] for call in map(json.loads, lines) if call[2:2 + len(words)] == list(words)]


def write(pod, **files):
  for name, content in files.items():
    (pod.folder / name).write_text(content)


def test_run_creates_installs_starts_and_ends_with_the_code_of_the_run(pod):
  write(pod, codes='76 0')  # the supervisor on each host starts it again
  said = pod('run', *SLICE, '--spot', '--env=MY_SETTING=a b', '--setup=touch mounted', '--', *TRICKY,
             '--workdir=/mnt/my runs/a')
  assert 'the run ended with 0' in said
  [created] = calls(pod, 'tpu-vm', 'create')
  assert created[2:6] == ['my-tpu', '--accelerator-type=v5litepod-16', '--version=v2-alpha-tpuv5-lite', '--spot']
  for host in ('host0', 'host1'):
    home = pod.folder / host
    runs = [json.loads(line) for line in (home / 'runs').read_text().splitlines()]
    assert runs == [[['-m', 'llm_jax.main', '--distributed', *TRICKY, '--workdir=/mnt/my runs/a'], 'a b']] * 2
    assert (home / 'mounted').exists() and (home / 'llm_jax/llm_jax/main.py').is_file()
    assert '--require-hashes -r requirements-tpu.lock' in (home / 'uv').read_text()
    assert 'then end' in (home / 'llm_jax.log').read_text()
  assert 'slice: READY' in (said := pod('status', '--zone=us-x1')) and 'ended with 0' in said


def test_create_tries_again_until_there_is_capacity(pod):
  write(pod, creates='RESOURCE_EXHAUSTED INTERNAL ok')
  said = pod('create', *SLICE)
  assert len(calls(pod, 'tpu-vm', 'create')) == 3 and 'again in 1 s' in said and 'again in 2 s' in said
  pod('create', *SLICE)
  assert len(calls(pod, 'tpu-vm', 'create')) == 3, 'it is there'


@pytest.mark.parametrize('problem', ['INVALID_ARGUMENT', 'PERMISSION_DENIED'])
def test_create_ends_where_a_repetition_would_fail_too(pod, problem):
  write(pod, creates=problem)
  assert problem in pod('create', *SLICE, code=78)
  assert len(calls(pod, 'tpu-vm', 'create')) == 1


def test_a_queued_resource_is_waited_for_and_deleted(pod):
  write(pod, request='FAILED', slice='PREEMPTED')
  for host in ('host0', 'host1'):
    (pod.folder / host).mkdir()
  pod('create', *SLICE, '--queued')
  [deleted], [created] = calls(pod, 'queued-resources', 'delete'), calls(pod, 'queued-resources', 'create')
  assert deleted[2:] == ['my-tpu', '--force']
  assert created[2:] == ['my-tpu', '--node-id=my-tpu', '--accelerator-type=v5litepod-16',
                         '--runtime-version=v2-alpha-tpuv5-lite']
  pod('delete', '--zone=us-x1')
  assert not (pod.folder / 'slice').exists() and not (pod.folder / 'request').exists()


@pytest.mark.parametrize('retry', [True, False])
def test_a_preempted_slice_is_made_anew_with_retry_alone(pod, retry):
  write(pod, codes='wait 0', preempted_after='3')
  said = pod('run', *SLICE, *(['--retry'] if retry else []), '--', '--config=gpt_small', code=0 if retry else 76)
  assert 'my-tpu: PREEMPTED' in said
  assert len(calls(pod, 'tpu-vm', 'create')) == 1 + retry and len(calls(pod, 'tpu-vm', 'delete')) == retry
  assert len((pod.folder / 'runs_host1').read_text().split()) == 1 + retry


@pytest.mark.parametrize('code', [65, 78])
def test_an_error_of_the_run_ends_all_and_keeps_the_slice(pod, code):
  write(pod, codes=str(code))
  pod('run', *SLICE, '--retry', '--', '--config=gpt_small', code=code)
  assert (pod.folder / 'slice').read_text() == 'READY' and len(calls(pod, 'tpu-vm', 'create')) == 1


def test_stop_saves_and_a_second_start_is_refused(pod):
  write(pod, codes='wait')
  pod('create', *SLICE)
  pod('install', '--zone=us-x1')
  pod('start', '--zone=us-x1', '--', '--config=gpt_small')
  runs = pod.folder / 'runs_host1'
  deadline = time.monotonic() + 30
  while not runs.exists() and time.monotonic() < deadline:
    time.sleep(0.1)
  time.sleep(0.5)
  assert 'a run is active here' in pod('start', '--zone=us-x1', '--', '--config=gpt_small', code=75)
  pod('stop', '--zone=us-x1')
  while 'ended with 75' not in pod('status', '--zone=us-x1') and time.monotonic() < deadline:
    time.sleep(0.2)
  assert runs.read_text().split() == ['started'], 'not started again'
  pod('attach', '--zone=us-x1', '--worker=1')
  assert calls(pod, 'tpu-vm', 'ssh')[-1][2:] == [
      'my-tpu', '--worker=1', '--', '-t', 'tmux attach -t llm_jax || tail -n 100 llm_jax.log']


def test_unknown_options_and_missing_ones_are_refused(pod):
  assert '--workdir=runs/a is no option' in pod('run', '--zone=us-x1', '--workdir=runs/a', code=78)
  assert '--zone is required' in pod('run', '--', '--workdir=runs/a', code=78)
  assert 'Commands:' in subprocess.run(['bash', ROOT / 'launch/tpu_pod.sh'], capture_output=True, text=True).stdout
  assert not calls(pod)
