"""The reports of processes that share no folder, exchanged through JAX's coordinator for the watchdog of each."""

from __future__ import annotations

import contextlib
import itertools
import threading
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.reports import ORDER

SECONDS = 0.5  # between two exchanges
_LAUNCHES = itertools.count()


class CoordinatorReports:
  """A context manager: within it, this process's folder of reports has those of others as if all shared it.

  Process 0 gets all reports, the others that of process 0; the order to end goes to all (base/reports.py).
  """

  def __init__(self, folder: Path, index: int, count: int):
    from jax._src.distributed import global_state
    self._client: Any = global_state.client
    self._folder, self._index = folder, index
    self._prefix = f'llm_jax/reports/{next(_LAUNCHES)}'
    self._others = range(1, count) if index == 0 else range(1)
    self._stopping = threading.Event()
    self._thread = threading.Thread(target=self._run, name='reports', daemon=True)

  def __enter__(self) -> CoordinatorReports:
    self._thread.start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._stopping.set()
    self._thread.join()
    with contextlib.suppress(OSError, jax.errors.JaxRuntimeError):
      self._send(f'{self._index}.json')  # the last one, or that it was removed

  def _run(self) -> None:
    while not self._stopping.wait(SECONDS):
      for name in (f'{self._index}.json', ORDER):
        with contextlib.suppress(OSError, ValueError, jax.errors.JaxRuntimeError):
          self._send(name)
      for name in (*(f'{i}.json' for i in self._others), ORDER):
        with contextlib.suppress(OSError, ValueError, jax.errors.JaxRuntimeError):  # none there yet
          self._receive(name)

  def _send(self, name: str) -> None:
    """Sends a report, also an empty one after it was removed, by which the others know that this process has left."""
    path = self._folder / name
    content = path.read_text() if path.exists() else ''
    if content or name != ORDER:
      self._client.key_value_set(f'{self._prefix}/{name}', content, allow_overwrite=True)

  def _receive(self, name: str) -> None:
    content = self._client.key_value_try_get(f'{self._prefix}/{name}')
    with open(self._folder / name, 'r+') as f:  # an existing file, as prepare_reports makes it
      f.write(content)
      f.truncate()
