"""The lock of a run's folder: one launch at a time, also if the lock file is removed, or another host has the folder.

The lock is a flock on .lock, held by process 0, together with the report that the watchdog's thread renews
(processes/0.json). A report that is not renewed any more is stale, and the folder is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax

from llm_jax.base.errors import StorageError
from llm_jax.base.files import open_append, unused, writing
from llm_jax.base.multihost import gather
from llm_jax.base.reports import (
  FOLDER,
  prepare_reports,
  read_report,
  remove_reports,
  still_exists,
  this_process,
  write_report,
)

LOCK = '.lock'  # in the run's folder
STALE_SECONDS = 60.0  # after which a report of another host is stale; by the clock of the file system


@contextlib.contextmanager
def lock_run(workdir: Path) -> Iterator[tuple[bool, str]]:
  """Creates the folder and holds its lock, so that only one launch uses it; yields whether it is new, and a token.

  Raises StorageError on all processes.
  """
  with writing(f'--workdir: {workdir}'):
    created = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
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
    new, (problem, *_), (token, *_) = zip(*gather([created, problem, token]), strict=True)
    if problem:  # all processes fail, or none
      raise StorageError(problem)
    try:
      yield any(new), token
    finally:
      if jax.process_index() == 0 and read_report(workdir / FOLDER, 0).get('token') == token:
        remove_reports(workdir / FOLDER)  # which nothing has done before the watchdog began


def acquire(workdir: Path) -> tuple[TextIO, str]:
  """(the open lock file, why another run holds the folder or ''). Raises OSError."""
  free = f'set --workdir={unused(workdir)}, or stop that run'
  while True:
    lock = open_append(workdir / LOCK)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return lock, f'--workdir: another run is training in {workdir}; {free}'
    except OSError:
      pass  # a file system without locks: the report decides
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(lock.fileno()), os.stat(workdir / LOCK)):
        break
    lock.close()  # removed or replaced meanwhile
  report = read_report(workdir / FOLDER, 0)
  if not report or report['left']:
    return lock, ''
  os.utime(lock.fileno())
  age = os.fstat(lock.fileno()).st_mtime - os.stat(workdir / FOLDER / '0.json').st_mtime
  name, alive = f'process {report["pid"]} on {report["host"]}', still_exists(report)
  if alive or (alive is None and age < STALE_SECONDS):
    wait = '' if alive else f' (if that host is gone: start again in {STALE_SECONDS - age:.0f} s)'
    return lock, f'--workdir: another run is training in {workdir}, {name}; {free}{wait}'
  print(f'{workdir}: the launch of {name} has died at step {report["step"]}; this one takes over', flush=True)
  return lock, ''


def take(workdir: Path, token: str, count: int) -> None:
  """Writes the report that keeps others out. Raises OSError."""
  prepare_reports(workdir / FOLDER, count)
  write_report(workdir / FOLDER, 0, {'token': token, 'number': 0, 'left': '', 'phase': 'start', 'step': 0,
                                     **this_process()})
