"""The lock of a run in object storage: an object that its holder creates, if there is none, and rewrites all the time.

Storage has no locks, but creates an object only if there is none (a condition on its generation or its tag).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import Any

import psutil

from llm_jax.base.errors import StorageError
from llm_jax.data.sources.documents import shown

NAME = '.lock.json'
STALE = 60.0  # seconds without a change after which a lock's holder is gone
SETTLE = 1.0  # seconds in which two processes that take over the same lock see each other
POLL = 2.0
TAKEN = 'another run has taken the lock, as this one did not renew it in time'


class RemoteLock:
  """Raises StorageError if another run holds the lock."""

  def __init__(self, bucket: Any, launch: str):
    self._bucket, self._launch, self._beats, self._lost = bucket, launch, 0, False

  def acquire(self) -> None:
    """Takes the lock; waits up to STALE seconds if the holder may be gone."""
    try:
      if self._bucket.create(NAME, self._content()):
        return
    except StorageError as e:
      if 'PreconditionFailed' not in str(e) and 'conditionNotMet' not in str(e):
        raise
    seen = self._read()
    if not self._died_here(seen):
      print(f'{shown(self._bucket.url)}: locked by process {seen.get("process")} on {seen.get("host")}; waiting up to '
            f'{STALE:.0f} s to see whether that run is alive', flush=True)
      end = time.monotonic() + STALE
      while time.monotonic() < end and (now := self._read()):
        if now != seen:
          raise StorageError(f'--workdir: another run is training in {shown(self._bucket.url)}: process '
                             f'{now.get("process")} on {now.get("host")}; set another --workdir, or stop that run')
        time.sleep(POLL)
    self._bucket.write(NAME, self._content())
    time.sleep(SETTLE)
    if self._read().get('launch') != self._launch:
      raise StorageError(f'--workdir: another run has just started in {shown(self._bucket.url)}')

  @property
  def is_lost(self) -> bool:
    """Whether another run has taken the lock. Reads it."""
    return self._lost or self._read().get('launch') != self._launch

  def beat(self) -> None:
    """Rewrites the lock. If another run has taken it, this one is stopped, and writes nothing more there."""
    if self.is_lost:
      if not self._lost:
        self._lost = True
        signal.raise_signal(signal.SIGTERM)
      raise StorageError(TAKEN)
    self._beats += 1
    self._bucket.write(NAME, self._content())

  def release(self) -> None:
    if not self._lost:
      self._bucket.delete([NAME])

  def _content(self) -> bytes:
    return json.dumps({'launch': self._launch, 'host': socket.gethostname(), 'process': os.getpid(),
                       'beat': self._beats}).encode()

  def _read(self) -> dict[str, Any]:
    try:
      values = json.loads(self._bucket.read(NAME) or b'{}')
      return values if isinstance(values, dict) else {}
    except ValueError:
      return {}

  def _died_here(self, holder: dict[str, Any]) -> bool:
    return holder.get('host') == socket.gethostname() and not psutil.pid_exists(int(holder.get('process', 0)))
