"""The watchdog, with real processes that sleep, are stopped, killed, or fail; they need no devices."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_jax.base.reports import FOLDER, prepare_reports

PROGRAM = """
import signal, sys, time
from pathlib import Path
from llm_jax.base import stopping, watchdog
from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import ConfigError
from llm_jax.base.hosts import HostLog, host_metrics
from llm_jax.base.reports import read_report
workdir, index, count, behavior = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
watchdog.BEAT, watchdog.SILENT, watchdog.GRACE, watchdog.STEP_SECONDS = 0.1, 4.0, 0.5, 2.5
signal.signal(signal.SIGINT, signal.SIG_DFL)

def get_stuck():
  time.sleep(1000)

def train_together(own):
  ACTIVITY.enter('step')
  log = HostLog(workdir, index, count)
  for step in range(1, 200):
    begin = time.monotonic()
    time.sleep(own)
    ACTIVITY.begin_step(step, 0.0)
    with ACTIVITY.waiting():
      time.sleep(max(0, begin + 0.02 - time.monotonic()))
    ACTIVITY.step_took(time.monotonic() - begin)
    log._next = 0.0 if step == 199 else log._next  # no test waits for 5 s
    log.write(step)
  print('metrics', host_metrics(ACTIVITY.reports), flush=True)

with watchdog.Watchdog(workdir, index, count, 'token', factor=0.0 if behavior == 'off' else 1.0):
  if behavior in ('slow', 'quick'):
    train_together(0.018 if behavior == 'slow' else 0.002)
    time.sleep(0.5)
  ACTIVITY.enter('step')
  for step in range(1, {'ends': 40, 'slow': 0, 'quick': 0}.get(behavior, 1000)):
    if behavior == 'waits' and step > 5:
      time.sleep(1000)
    if step == 4 and behavior in ('sleeps', 'off'):
      get_stuck() if behavior == 'sleeps' else time.sleep(3)
    if step == 4 and behavior == 'fails':
      while not read_report(workdir / 'processes', 1):
        time.sleep(0.05)
      raise ConfigError('a field is wrong')
    ACTIVITY.begin_step(step, 0.0)
    ACTIVITY.step_took(0.05)
    print(step, flush=True)
    if behavior == 'off' and step == 5:
      break
    time.sleep(0.05)
"""


def start(workdir, *behaviors):
  prepare_reports(workdir / FOLDER, len(behaviors))
  env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])}
  return [subprocess.Popen([sys.executable, '-c', PROGRAM, workdir, str(i), str(len(behaviors)), behavior], env=env,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
          for i, behavior in enumerate(behaviors)]


def ends(process, code):
  printed = process.communicate(timeout=60)[1]
  assert process.returncode == code, printed
  return printed


def test_a_process_that_is_stuck_ends_with_76_and_its_stacks(tmp_path):
  [process] = start(tmp_path, 'sleeps')
  printed = ends(process, 76)
  assert 'no progress for ' in printed and 'phase step, limit 2 s): it is stuck' in printed
  assert 'step 3, step, at <string>' in printed or 'step 3, step, at ' in printed
  assert 'get_stuck' in (tmp_path / FOLDER / '0.stacks').read_text()


@pytest.mark.slow
def test_a_watchdog_that_is_off_ends_nothing(tmp_path):
  [process] = start(tmp_path, 'off')
  ends(process, 0)
  assert not (tmp_path / FOLDER).exists(), 'no reports remain of a run that has ended'


@pytest.mark.parametrize('index', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_where_one_is_stuck_all_end_and_it_is_named(index, tmp_path):
  processes = start(tmp_path, *('sleeps' if i == index else 'waits' for i in range(2)))
  for process in processes:
    printed = ends(process, 76)
    assert f'process {index} is behind' in printed and 'step 3, step' in printed
  assert 'get_stuck' in (tmp_path / FOLDER / f'{index}.stacks').read_text()
  assert (tmp_path / FOLDER / f'{1 - index}.stacks').read_text().startswith('no progress')


@pytest.mark.parametrize(('index', 'number'), [
    (0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP),
    pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow)])
def test_where_one_is_killed_or_stopped_the_others_end_and_name_it(index, number, tmp_path):
  processes = start(tmp_path, 'waits', 'waits')
  for process in processes:
    process.stdout.readline()
  time.sleep(0.3)
  processes[index].send_signal(number)
  printed = ends(processes[1 - index], 76)
  assert f'process {index} on ' in printed
  assert ('has died' if number == signal.SIGKILL else 'has given no sign of life') in printed
  processes[index].send_signal(signal.SIGCONT)
  ends(processes[index], -9 if number == signal.SIGKILL else 76)


def test_a_single_process_that_was_stopped_for_long_continues(tmp_path):
  [process] = start(tmp_path, 'ends')
  process.stdout.readline()
  process.send_signal(signal.SIGSTOP)
  time.sleep(2)
  process.send_signal(signal.SIGCONT)
  ends(process, 0)


def test_a_run_whose_folder_is_gone_ends_with_74(tmp_path):
  (workdir := tmp_path / 'run').mkdir()
  [process] = start(workdir, 'continues')
  process.stdout.readline()
  workdir.rename(tmp_path / 'moved')
  assert f'{workdir} was moved, removed or unmounted' in ends(process, 74)


def test_an_error_of_one_process_ends_the_others_and_is_quoted(tmp_path):
  failing, other = start(tmp_path, 'fails', 'waits')
  assert 'process 0 on ' in (printed := ends(other, 76)) and 'has ended: ConfigError: a field is wrong' in printed
  ends(failing, 1)


def test_processes_that_end_together_leave_nothing(tmp_path):
  for process in start(tmp_path, 'ends', 'ends', 'ends'):
    ends(process, 0)
  assert not (tmp_path / FOLDER).exists()


def test_a_slow_process_is_named_once(tmp_path):
  first, _, _ = processes = start(tmp_path, 'quick', 'slow', 'quick')
  printed = first.communicate(timeout=60)[0]
  assert printed.count('is slow') == printed.count('WARNING: process 1 on ') == 1
  metrics = ast.literal_eval(re.search(r'^metrics (.*)', printed, re.M)[1])
  assert metrics['host/slowest'] == 1 and metrics['host/spread'] > 1.5 and 0 < metrics['host/memory'] < 1
  for process in processes:
    assert process.wait(timeout=60) == 0
  logs = [[json.loads(line) for line in (tmp_path / 'logs' / f'process_{index}.jsonl').read_text().splitlines()]
          for index in range(3)]
  assert all(line['step'] > 0 and 0 < line['step_seconds'] < 1 and line['host'] for log in logs for line in log)
  assert all(line['process_bytes'] > 1e6 and 0 < line['host_memory'] < 1 for log in logs for line in log)
  assert logs[1][-1]['own_seconds'] > 2 * logs[0][-1]['own_seconds'], 'the slow one is seen in its log'
