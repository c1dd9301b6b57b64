"""The lock of a run's folder: one launch at a time, whatever happens to the lock file."""

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llm_jax.base import lock as lock_module
from llm_jax.base.lock import acquire, take
from llm_jax.base.reports import FOLDER, prepare_reports, read_report, this_process, write_report

RACE = """
import os, sys, time
from pathlib import Path
from llm_jax.base.lock import acquire, take
workdir, begin = Path(sys.argv[1]), time.monotonic() + 0.5
results, held = os.pipe(), os.pipe()
for number in range(50):
  if not os.fork():
    os.close(held[1])
    time.sleep(max(0, begin - time.monotonic()))
    lock, problem = acquire(workdir)
    if not problem:
      take(workdir, str(number), 1)
    os.write(results[1], b'l' if problem else b'w')
    if not problem:
      os.read(held[0], 1)  # holds it while the others try
    os._exit(0)
  if '--remove' in sys.argv and number % 10 == 9:
    (workdir / '.lock').unlink(missing_ok=True)
print(sum(os.read(results[0], 1) == b'w' for _ in range(50)))
"""


def race(workdir, *flags):
  env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[2])}
  printed = subprocess.run([sys.executable, '-c', RACE, workdir, *flags], env=env, capture_output=True, text=True,
                           check=True, timeout=120).stdout
  return int(printed.splitlines()[-1])


def test_one_of_fifty_simultaneous_starts_wins(tmp_path):
  assert race(tmp_path) == 1


def test_nobody_enters_a_held_folder_whose_lock_file_is_removed(tmp_path):
  lock, problem = acquire(tmp_path)
  assert not problem
  take(tmp_path, 'mine', 1)
  (tmp_path / '.lock').unlink()
  assert race(tmp_path, '--remove') == 0 and read_report(tmp_path / FOLDER, 0)['token'] == 'mine'
  lock.close()


def held(workdir, number=9, **values):
  if number == 9:
    prepare_reports(workdir / FOLDER, 1)
  report = {'token': 'other', 'number': number, 'left': '', 'phase': 'step', 'step': 7, **this_process()}
  write_report(workdir / FOLDER, 0, report | values)


def ended_process():
  process = subprocess.Popen(['true'])
  process.wait()
  return process.pid


@pytest.mark.parametrize(('values', 'age', 'refused'), [
    ({}, 0, True), ({'pid': 0}, 0, False), ({'created': 1.0}, 0, False), ({'left': 'finished'}, 0, False),
    ({'host': 'elsewhere'}, 0, True), ({'host': 'elsewhere'}, 0, False), ({'host': 'elsewhere'}, 9, False),
    ({'space': 'a container'}, 0, True), ({'space': 'a container'}, 0, False)])
def test_a_report_keeps_others_out_while_it_is_renewed(values, age, refused, tmp_path, capsys, monkeypatch):
  """A process of this host is looked up; that of another one counts as alive while it renews its report."""
  monkeypatch.setattr(lock_module, 'STALE_SECONDS', 2.0)
  held(tmp_path, **{name: ended_process() if name == 'pid' else value for name, value in values.items()})
  then = time.time() - age
  os.utime(tmp_path / FOLDER / '0.json', (then, then))
  if refused and values:
    threading.Timer(0.5, held, [tmp_path], {'number': 10, **values}).start()
  begin = time.monotonic()
  lock, problem = acquire(tmp_path)
  assert bool(problem) == refused and time.monotonic() < begin + 5
  if values and 'pid' not in values and 'left' not in values and 'created' not in values:
    assert ('waiting up to 2 s to see whether it is alive' in capsys.readouterr().out) == (age == 0)
  elif 'left' not in values and not refused:
    assert 'has died at step 7; this one takes over' in capsys.readouterr().out
  if refused:
    assert values.get('host', socket.gethostname()) in problem and f'--workdir={tmp_path}_2' in problem
  lock.close()


def test_a_host_that_holds_the_lock_is_waited_for_too(tmp_path, monkeypatch):
  """A network file system keeps the lock of a lost host for some time."""
  monkeypatch.setattr(lock_module, 'STALE_SECONDS', 2.0)
  for released in (False, True):
    held(tmp_path, host='elsewhere')
    with open(tmp_path / '.lock', 'a') as other:
      fcntl.flock(other, fcntl.LOCK_EX)
      if released:
        threading.Timer(1.0, other.close).start()
      lock, problem = acquire(tmp_path)
    assert bool(problem) != released
    lock.close()


def test_a_damaged_report_does_not_hold_the_folder(tmp_path):
  held(tmp_path)
  (tmp_path / FOLDER / '0.json').write_bytes(b'\xff[]')
  lock, problem = acquire(tmp_path)
  assert not problem
  lock.close()
