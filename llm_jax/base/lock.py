"""The lock of a run's folder: one launch at a time, also if the lock file is removed, or another host has the folder.

The lock is a flock on .lock, held by process 0, together with the report that the watchdog's thread renews
(processes/0.json). A report that is not renewed any more is stale, and the folder is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import open_append, unused, writing
from llm_jax.base.multihost import all_see, barrier, gather
from llm_jax.base.reports import (
  FOLDER,
  prepare_reports,
  read_report,
  remove_reports,
  still_exists,
  this_process,
  write_report,
)
from llm_jax.base.storage import own_parts

LOCK = '.lock'  # in the run's folder
STALE_SECONDS = 60.0  # after which a report of another host is stale; by the clock of the file system
POLL = 1.0  # seconds between two looks at such a report


@contextlib.contextmanager
def lock_run(workdir: Path) -> Iterator[tuple[bool, str]]:
  """Creates the folder and holds its lock, so that only one launch uses it; yields whether it is new, and a token.

  Raises StorageError on all processes, and ConfigError if they do not share the folder.
  """
  with writing(f'--workdir: {workdir}'):
    created = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
  if own_parts(workdir) is None and not all_see(workdir):
    with contextlib.suppress(OSError):
      workdir.rmdir()  # if it was just created
    raise ConfigError(f'--workdir: {workdir} is another folder on each host; set it to a folder that all hosts share, '
                      'or to a bucket (gs://... or s3://...)')
  with contextlib.ExitStack() as stack:
    problem, token = '', uuid.uuid4().hex
    if jax.process_index() == 0:
      try:
        with writing(f'--workdir: {workdir}'):
          lock, problem = acquire(workdir)
          stack.enter_context(lock)
          if not problem:
            take(workdir, token, jax.process_count())
      except StorageError as e:
        problem = str(e)
    barrier('lock')  # process 0 may wait for longer than a collective may take
    new, (problem, *_), (token, *_) = zip(*gather([created, problem, token]), strict=True)
    if problem:  # all processes fail, or none
      raise StorageError(problem)
    try:
      yield any(new), token
    finally:
      if jax.process_index() == 0 and read_report(workdir / FOLDER, 0).get('token') == token:
        remove_reports(workdir / FOLDER)  # which nothing has done before the watchdog began


def acquire(workdir: Path) -> tuple[TextIO, str]:
  """(the open lock file, why another run holds the folder or ''). Raises OSError.

  If the holder is on another host, or in another container, this waits until it renews its report, or the report is
  stale: a job that is queued again after the loss of a host starts within seconds.
  """
  lock, held = _open_lock(workdir)
  report = read_report(workdir / FOLDER, 0)
  if not held and (not report or report['left']):
    return lock, ''
  name = f'process {report["pid"]} on {report["host"]}' if report else ''
  alive = still_exists(report) if report else True
  if alive is None:
    alive = _renews(workdir, lock, report, name)
    if held:  # a file system may notice late that the host of a lock is gone
      lock.close()
      lock, held = _open_lock(workdir)
  if held or alive:
    return lock, (f'--workdir: another run is training in {workdir}{name and ", "}{name}; set '
                  f'--workdir={unused(workdir)}, or stop that run')
  print(f'{workdir}: the launch of {name} has died at step {report["step"]}; this one takes over', flush=True)
  return lock, ''


def _open_lock(workdir: Path) -> tuple[TextIO, bool]:
  """(the open lock file, whether another process holds it). Raises OSError."""
  while True:
    lock = open_append(workdir / LOCK)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return lock, True
    except OSError:
      pass  # a file system without locks: the report decides
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(lock.fileno()), os.stat(workdir / LOCK)):
        return lock, False
    lock.close()  # removed or replaced meanwhile


def _renews(workdir: Path, lock: TextIO, report: dict[str, Any], name: str) -> bool:
  """Whether a process of another host renews its report before that is STALE_SECONDS old. Raises OSError."""
  path = workdir / FOLDER / '0.json'
  os.utime(lock.fileno())
  left = STALE_SECONDS - (os.fstat(lock.fileno()).st_mtime - path.stat().st_mtime)
  if left <= 0:
    return False
  print(f'{workdir}: {name} has trained here; waiting up to {left:.0f} s to see whether it is alive', flush=True)
  deadline = time.monotonic() + left
  while time.monotonic() < deadline:
    time.sleep(min(POLL, left))
    newest = read_report(workdir / FOLDER, 0)
    if (newest and newest != report) or not path.exists():
      return bool(newest) and not newest['left']
  return False


def take(workdir: Path, token: str, count: int) -> None:
  """Writes the report that keeps others out. Raises OSError."""
  prepare_reports(workdir / FOLDER, count)
  write_report(workdir / FOLDER, 0, {'token': token, 'number': 0, 'left': '', 'phase': 'start', 'step': 0,
                                     **this_process()})
