"""Runs of several real processes with real signals; they must train the same as one process."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from faults.signals import handles
from program import ROOT, environment, finish

from llm_jax import main
from llm_jax.training.log import read_metrics

CONFIG = '''
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = 100_000  # so that a signal arrives before the end on any machine
  config.batch_tokens = 512
  config.tokens_per_device = 128  # of 4 rows: two microbatches
  config.model.num_layers = 2
  config.model.embed_dim = 32
  config.model.num_heads = 2
  config.model.dropout = 0.1
  config.model.dtype = 'float32'
  config.data.path = {text!r}
  config.data.tokenizer = 'byte'
  config.data.cache_dir = {cache!r}
  config.data.seq_len = 32
  config.optim.schedule = 'constant'  # the same however many steps are asked for
  config.optim.learning_rate = 1e-4
  config.eval.every = 10
  config.eval.max_tokens = 1024
  config.eval.sample_tokens = 8
  config.log.every = 1
  return config
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('launch')
  words = 'the cat sat on a mat and saw blue birds that sang of rain in spring when rivers run far'.split()  # noqa: SIM905
  (folder / 'text.txt').write_text(' '.join(random.Random(0).choices(words, k=50_000)))
  (folder / 'tiny.py').write_text(CONFIG.format(text=str(folder / 'text.txt'), cache=str(folder / 'cache')))
  return folder


def launch(folder, *flags, devices=1):
  command = [sys.executable, ROOT / 'launch' / 'local.py', '--num_processes=2', f'--devices={devices}', '--',
             '--config=tiny.py', *flags]
  env = environment(folder) | {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}  # tiny models: compiling is what takes time
  return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def first_lines(process, pattern):
  """(output of the launcher up to the first line that matches, pids of its processes)."""
  lines = []
  for line in process.stdout:
    lines.append(line)
    if re.match(pattern, line):
      break
  output = ''.join(lines)
  pids = re.search(r'^processes (\d+) (\d+),', output, re.M)
  assert pids and re.match(pattern, lines[-1]), output[-4000:]
  return output, [int(pid) for pid in pids.groups()]


def first_step(process):
  """The output up to the line on the first step."""
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith('first step after'):
      break
  return ''.join(lines)


def stopped_step(output):
  assert 'Traceback' not in output and '--- process' not in output
  assert output.count('stopped at step') == 1, output[-4000:]
  return int(re.search(r'stopped at step (\d+) of', output)[1])


def steps(workdir):
  return [line['step'] for line in read_metrics(workdir / 'metrics.jsonl')]


def assert_same_losses(workdir, reference, num_steps):
  """Compares losses of training, which differ between batches, and of evaluation, within float32 noise."""
  one, other = (read_metrics(path / 'metrics.jsonl') for path in (workdir, reference))
  assert [line['step'] for line in one] == [line['step'] for line in other] == list(range(1, num_steps + 1))
  for a, b in zip(one, other, strict=True):
    assert a.keys() >= {'train/loss'} and ('val/loss' in a) == ('val/loss' in b)
    for name in {'train/loss', 'val/loss', 'val/bits_per_byte'} & b.keys():
      assert a[name] == pytest.approx(b[name], rel=1e-5), f'{name} of step {a["step"]}'


@pytest.fixture(scope='module')
def stopped(folder):
  """A run of two processes that share each parameter; only the second one gets a signal to stop."""
  process = launch(folder, '--workdir=run', '--config.mesh.fsdp=2')
  output, pids = first_lines(process, r'step 3/')
  os.kill(pids[1], signal.SIGTERM)
  return output + finish(process, code=75)


def test_a_signal_to_one_process_saves_and_stops_all(stopped, folder):
  step = stopped_step(stopped)
  assert '2 x cpu, 2 process(es)' in stopped
  assert (folder / 'run' / 'checkpoints' / str(step)).is_dir()
  assert steps(folder / 'run') == list(range(1, step + 1)), 'written by one process'
  assert len(list((folder / 'run').glob('events.out.tfevents.*'))) == 1


def test_a_run_resumes_in_two_processes_then_in_one(stopped, folder):
  before = stopped_step(stopped)
  process = launch(folder, '--workdir=run', '--config.mesh.fsdp=2')
  output, _ = first_lines(process, 'resuming from step')
  output += first_step(process)
  process.send_signal(signal.SIGINT)
  output += finish(process, code=75)
  assert f'resuming from step {before}\n' in output and 'SIGINT: saving' in output
  step = stopped_step(output)
  assert step > before and steps(folder / 'run') == list(range(1, step + 1))
  last = (step // 10 + 1) * 10
  for workdir in ('run', 'uninterrupted'):  # on 8 devices, 32 tokens (a row) are again half of a device's share
    main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/{workdir}', f'--config.num_steps={last}',
               '--config.tokens_per_device=32', '--config.eval.sample_tokens=0'])
  assert_same_losses(folder / 'run', folder / 'uninterrupted', last)


@pytest.mark.parametrize(('flag', 'code', 'words'), [
    pytest.param('--config.model.num_layer=3', 78, 'did you mean config.model.num_layers?', marks=pytest.mark.slow),
    ('--config.data.path=nowhere', 65, 'nowhere'),
])
def test_an_error_is_printed_once_and_ends_all_processes(folder, flag, code, words):
  began = time.monotonic()
  output = finish(launch(folder, '--workdir=refused', flag), code=code)
  assert output.count('error: ') == 1 and words in output and 'Traceback' not in output
  assert time.monotonic() - began < 50, 'processes wait for one that has exited'


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['data=4', 'fsdp=4', 'tensor=2', 'dcn_data=2'])
def test_two_processes_train_like_one_on_any_mesh(folder, mesh):
  # Without dropout, whose masks depend on the number of microbatches, and so on the number of devices.
  flags = ['--config.num_steps=10', '--config.model.dropout=0', '--config.model.vocab_size=260']
  finish(launch(folder, f'--workdir={mesh}', f'--config.mesh.{mesh}', *flags, devices=2))
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/{mesh}_one_process', *flags])
  assert_same_losses(folder / mesh, folder / f'{mesh}_one_process', 10)


STAGED = """
import tiny

def get_config():
  config = tiny.get_config()
  path = config.data.path
  config.data.sources = {'a': {'path': path, 'weight': (3.0, 1.0)}, 'b': {'path': path, 'weight': (1.0, 1.0)}}
  config.data.weights_from = (0, 4)
  config.model.dropout = 0.0
  config.num_steps = 14
  config.stages = {'more': {'begin': 7, 'set': ('batch_tokens=1024', 'data.weights_from=0,4')}}
  return config
"""


@pytest.mark.slow
@pytest.mark.parametrize('stop', [5, 9])
def test_a_staged_mixture_resumes_in_one_process(folder, stop, monkeypatch):
  """Weights change at step 4, the batch size at step 7; the run is stopped between the two, or after both."""
  (folder / 'staged.py').write_text(STAGED)
  monkeypatch.syspath_prepend(folder)
  run = f'staged{stop}'
  process = launch(folder, f'--workdir={run}', '--config=staged.py', '--config.checkpoint.every=1')
  output, _ = first_lines(process, f'step {stop}/')
  process.send_signal(signal.SIGTERM)
  step = stopped_step(output + finish(process, code=75))
  assert stop <= step < 14
  for workdir in (run, 'staged_whole'):
    main.main([f'--config={folder}/staged.py', f'--workdir={folder}/{workdir}'])
  assert_same_losses(folder / run, folder / 'staged_whole', 14)


STUCK = """
import os, time, jax
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.registry import register

class Stuck:
  def __init__(self):
    pass

  def __call__(self, event):
    if event.step == 8 and jax.process_index() == 1 and not os.environ.get('FREE'):
      get_stuck()

def get_stuck():
  time.sleep(1000)

register(CALLBACKS, 'stuck', Stuck)
"""


@pytest.mark.slow
def test_a_stuck_process_ends_all_with_stacks_and_the_run_resumes(folder):
  (folder / 'stuck.py').write_text(STUCK)
  flags = ['--workdir=stuck', '--plugin=stuck.py', '--config.log.callbacks=stuck', '--config.checkpoint.every=5',
           '--config.watchdog=0.2']
  output = finish(launch(folder, *flags), code=76)
  assert 'no progress for 1' in output and 'limit 11 s' in output and 'process 1 is behind' in output
  assert f'at {folder}/stuck.py:' in output and 'in get_stuck' in output
  assert 'get_stuck' in (folder / 'stuck' / 'processes' / '1.stacks').read_text()
  assert 'unpack_metrics' in (folder / 'stuck' / 'processes' / '0.stacks').read_text()
  process = launch(folder, *flags[:2])
  output, _ = first_lines(process, 'resuming from step 5')
  process.send_signal(signal.SIGTERM)
  finish(process, code=75)


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'index', 'words'), [
    (signal.SIGKILL, 1, 'has died'), (signal.SIGKILL, 0, 'has died'),
    (signal.SIGSTOP, 1, 'has given no sign of life')])
def test_a_lost_process_ends_all_and_is_named(folder, number, index, words):
  process = launch(folder, f'--workdir=lost_{number}_{index}', '--config.checkpoint.every=5')
  _, pids = first_lines(process, 'step 8/')
  os.kill(pids[index], number)
  began = time.monotonic()
  while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and is_running(pids[1 - index]):
    time.sleep(0.1)
  assert time.monotonic() - began < 30, 'until the other one is out'
  output = finish(process, code=76)
  assert f'process {index} on ' in output and words in output


def is_running(pid):
  return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_processes_have_joined_ends_all(folder, number):
  process = launch(folder, f'--workdir=early_{number}')
  output, pids = first_lines(process, 'processes ')
  while not handles(pids[1], signal.SIGTERM):
    time.sleep(0.01)
  os.kill(pids[1], number)
  began = time.monotonic()
  output += finish(process, code=75)
  assert time.monotonic() - began < 30 and output.count('nothing was trained') >= 1, output
  assert not (folder / f'early_{number}').exists()


@pytest.mark.slow
@pytest.mark.parametrize('line', ['data: byte tokenizer', 'compiling the training step', 'step 10: val'])
def test_a_signal_to_one_process_ends_all_in_any_phase(folder, line):
  """Before the first step nothing remains of the launch; later it is saved."""
  workdir = folder / f'phase_{len(line)}'
  process = launch(folder, f'--workdir={workdir.name}', f'--config.data.cache_dir={folder}/{workdir.name}_cache')
  output, pids = first_lines(process, line)
  os.kill(pids[1], signal.SIGTERM)
  began = time.monotonic()
  output += finish(process, code=75)
  assert time.monotonic() - began < 30 and 'Check failure' not in output
  if 'step' in line and 'val' in line:
    assert stopped_step(output) >= 10
  else:
    assert 'interrupted before the first step; nothing was trained' in output and not workdir.exists()


BACK = """
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.registry import register
from llm_jax.training.rewind import read_journal

def back(event):
  if event.step == 14 and not read_journal(event.session.checkpoints.workdir)['rewinds']:
    event.rewind(5, 'asked to')

register(CALLBACKS, 'back', back)
"""


@pytest.mark.slow
def test_two_processes_rewind_like_one(folder):
  (folder / 'back.py').write_text(BACK)
  flags = ['--plugin=back.py', '--config.log.callbacks=back', '--config.checkpoint.every=5', '--config.num_steps=20']
  output = finish(launch(folder, '--workdir=back_two', *flags), code=0)
  assert output.count('going back to step 5') == 1 and steps(folder / 'back_two') == list(range(1, 21))
  command = [sys.executable, '-m', 'llm_jax.main', '--config=tiny.py', '--workdir=back_one', *flags]
  env = environment(folder) | {'JAX_NUM_CPU_DEVICES': '2', 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}
  subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
  assert_same_losses(folder / 'back_two', folder / 'back_one', 20)


@pytest.mark.slow
def test_a_checkpoint_unreadable_by_one_is_skipped_by_all(folder):
  flags = ['--workdir=damaged', '--config.mesh.fsdp=2', '--config.eval.sample_tokens=0']
  finish(launch(folder, *flags, '--config.num_steps=20', '--config.checkpoint.every=10'))
  checkpoints = folder / 'damaged' / 'checkpoints'
  largest = max((checkpoints / '20' / 'params' / 'ocdbt.process_1' / 'd').iterdir(), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:1000])
  output = finish(launch(folder, *flags, '--config.num_steps=20', '--config.checkpoint.every=10'))
  assert f'damaged: step 20: params/ocdbt.process_1/d/{largest.name}: has 1000 bytes' in output
  assert 'resuming from step 10\n' in output
  assert (checkpoints / '20').is_dir() and list(checkpoints.glob('20.corrupt-*'))


SLOW_DATA = """
import os, time
from llm_jax.data.pipeline import Batches
read = Batches.__next__

def read_slowly(self):
  time.sleep(0.1)
  return read(self)

if os.environ['JAX_PROCESS_ID'] == '1':
  Batches.__next__ = read_slowly
"""


@pytest.mark.slow
def test_a_process_with_slow_data_is_named_and_measured(folder):
  """Each process has a log, and process 0 names the other one in a line and in the metrics."""
  (folder / 'slow_data.py').write_text(SLOW_DATA)
  output = finish(launch(folder, '--workdir=slow', '--plugin=slow_data.py', '--config.num_steps=100',
                         '--config.eval.every=0', '--config.checkpoint.every=1000'))
  assert output.count(' is slow: ') == 1
  found = re.search(r'WARNING: process 1 on \S+ is slow: its steps take (\S+) s, of which it waits (\S+) s for data; '
                    r'those of the others (\S+) s', output)
  takes, waits, others = map(float, found.groups())
  assert takes > waits >= 0.1 and takes > 1.2 * others
  metrics = read_metrics(folder / 'slow' / 'metrics.jsonl')[-1]
  assert metrics['host/slowest'] == 1 and metrics['host/spread'] > 1.2
  assert metrics['host/data_seconds'] >= 0.1 and 0 < metrics['host/memory'] < 1
  logs = [[json.loads(line) for line in (folder / f'slow/logs/process_{i}.jsonl').read_text().splitlines()]
          for i in range(2)]
  assert logs[1][-1]['data_seconds'] >= 0.1 > logs[0][-1]['data_seconds']
  assert all(line['process_bytes'] > 1e8 for log in logs for line in log)


@pytest.mark.slow
def test_a_locked_folder_is_reported_once(folder):
  (folder / 'used').mkdir()
  with open(folder / 'used' / '.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    output = finish(launch(folder, '--workdir=used'), code=74)
  assert output.count('error: ') == 1 and 'another run is training in used' in output
