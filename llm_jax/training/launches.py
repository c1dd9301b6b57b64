"""launches.jsonl, the history of a run's folder: one line for each launch, with its command and how it ended."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import jax
import psutil

from llm_jax import __version__
from llm_jax.base.files import latest_step, write_file
from llm_jax.base.redaction import public_command

FILE = 'launches.jsonl'


class Launch:
  """The line of this launch: written when it begins, when it has trained a step, and when it ends.

  Only process 0 writes; a full disk does not stop the run.
  """

  def __init__(self, workdir: Path):
    self._path = workdir / FILE
    self._before: bytes | None = b''  # None: the lines before cannot be read, so that nothing may be written
    try:
      if self._path.exists() and not self._path.is_symlink():
        self._before = b''.join(line + b'\n' for line in self._path.read_bytes().splitlines())
    except OSError:
      self._before = None
    devices = jax.devices()
    self.values: dict[str, Any] = {
        'time': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
        'command': shlex.join(public_command(sys.orig_argv)), 'llm_jax': __version__, 'jax': jax.__version__,
        'num_processes': jax.process_count(), 'devices': f'{len(devices)} x {devices[0].device_kind}',
        'host': socket.gethostname(), 'process': os.getpid(), 'committed': latest_step(workdir)}

  def update(self, **values: Any) -> None:
    """Adds values and writes the line."""
    self.values |= values
    if jax.process_index() == 0 and self._before is not None:
      with contextlib.suppress(OSError):
        write_file(self._path, self._before + json.dumps(self.values).encode() + b'\n')


def read_launches(workdir: Path) -> list[dict[str, Any]]:
  """The lines of a run's launches.jsonl, without damaged ones; [] if there is none."""
  found = []
  with contextlib.suppress(OSError, ValueError):
    for line in (workdir / FILE).read_text(errors='replace').splitlines():
      with contextlib.suppress(ValueError):
        found.append(json.loads(line))
  return [line for line in found if isinstance(line, dict) and {'time', 'process'} <= line.keys()]


def fruitless_launches(workdir: Path) -> int:
  """How many launches in a row, up to the newest, died, were lost or crashed, and left no new checkpoint.

  One that a message ended (refused, stopped, finished) begins the count anew.
  """
  count, step = 0, latest_step(workdir)
  for launch in reversed(read_launches(workdir)):
    ended, error = launch.get('ended'), str(launch.get('error'))
    by_itself = ended is None or (ended == 'failed' and not re.match(r'(Config|Data|Storage|Diverged)Error', error))
    if not by_itself or launch.get('committed') != step:
      break
    count += 1
  return count


def is_alive(launch: dict[str, Any]) -> bool | None:
  """Whether the process of a launch that has not ended still exists; None if it is on another host."""
  if launch.get('host') != socket.gethostname():
    return None
  try:
    begin = datetime.datetime.fromisoformat(launch['time']).timestamp()
    return psutil.Process(launch['process']).create_time() < begin + 1  # else a later process has its id
  except psutil.Error:
    return False
