"""The reports of the processes of a run, in its folder: processes/INDEX.json.

Each is written in place and always of the same size, so that a full disk or the cache of a network file system do not
hide it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import psutil

FOLDER, ORDER = 'processes', 'end'  # the order to end: empty until a process gives it
SIZE = 1024  # bytes of a report


def this_process() -> dict[str, Any]:
  """This process: host, id, when it was created, and the space in which its id is valid (boot and container)."""
  space = ''
  with contextlib.suppress(OSError):
    space = Path('/proc/sys/kernel/random/boot_id').read_text().strip() + os.readlink('/proc/self/ns/pid')
  return {'host': socket.gethostname(), 'pid': os.getpid(), 'created': psutil.Process().create_time(), 'space': space}


def still_exists(report: dict[str, Any]) -> bool | None:
  """Whether the process of a report exists; None if it is on another host or in another container."""
  own = this_process()
  if (report['host'], report['space']) != (own['host'], own['space']):
    return None
  try:
    process = psutil.Process(report['pid'])
    return abs(process.create_time() - report['created']) < 2 and process.status() != psutil.STATUS_ZOMBIE
  except psutil.Error:
    return False


def prepare_reports(folder: Path, count: int) -> None:
  """Makes the folder, with an empty report of each process, without what another launch has left. Raises OSError."""
  if folder.is_symlink():
    folder.unlink()
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(exist_ok=True)
  for name in (ORDER, *(f'{i}.json' for i in range(count))):
    (folder / name).touch()


def remove_reports(folder: Path) -> None:
  """Removes the reports, and the folder unless it has stacks."""
  with contextlib.suppress(OSError):
    for path in (*folder.glob('*.json'), folder / ORDER):
      path.unlink(missing_ok=True)
    folder.rmdir()


def write_report(folder: Path, index: int, report: dict[str, Any]) -> None:
  """Writes a report in place. Raises OSError, also if the file does not exist."""
  fd = os.open(folder / f'{index}.json', os.O_WRONLY | getattr(os, 'O_NOFOLLOW', 0))
  try:
    os.pwrite(fd, json.dumps(report).encode()[:SIZE - 1].ljust(SIZE - 1) + b'\n', 0)
  finally:
    os.close(fd)


def read_report(folder: Path, index: int) -> dict[str, Any]:
  """The report of a process; {} without a readable one."""
  with contextlib.suppress(OSError, ValueError):
    report = json.loads((folder / f'{index}.json').read_text())
    return report if isinstance(report, dict) and 'token' in report else {}
  return {}
