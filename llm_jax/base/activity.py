"""What this process does now, and when it last got on: written where work is done, read by the watchdog's thread."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

STEPS = 50  # the newest steps, over which medians are taken


class Activity:
  """Phase, step, and the time of the last sign of progress, by the monotonic clock.

  The phases are those of base/watchdog.LIMITS. Setting an attribute is all that a step costs.
  """

  def __init__(self) -> None:
    self.phase, self.step = 'start', 0
    self.last = time.monotonic()
    self._steps, self._own, self._waits, self._data = (deque[float](maxlen=STEPS) for _ in range(4))
    self._waited = 0.0
    self.reports: dict[int, dict[str, Any]] = {}  # on process 0, the newest report of each process

  def sign(self) -> None:
    """Notes that something has got on."""
    self.last = time.monotonic()

  def enter(self, phase: str) -> None:
    self.phase = phase
    self.sign()

  @contextlib.contextmanager
  def during(self, phase: str) -> Iterator[None]:
    before = self.phase
    self.enter(phase)
    try:
      yield
    finally:
      self.enter(before)

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Waits for a step to be done on the devices, and so for all other processes."""
    begin = time.monotonic()
    yield
    self._waited += time.monotonic() - begin
    self.sign()

  def begin_step(self, step: int, data_seconds: float) -> None:
    """Notes that `step` is dispatched, after waiting `data_seconds` for its batch."""
    self.step = step
    self._data.append(data_seconds)
    self.sign()

  def step_took(self, seconds: float, away: float = 0.0) -> None:
    """Notes the duration of a step, in which this process has waited for the devices as `waiting` says.

    `away`: the part of it in callbacks and the caller's code, which have a limit of their own.
    """
    self._steps.append(seconds - away)
    self._own.append(max(0.0, seconds - self._waited))
    self._waits.append(self._waited)
    self._waited = 0.0

  @property
  def step_seconds(self) -> float:
    """The median of the newest steps; 0 before there is one."""
    return _median(self._steps)

  @property
  def own_seconds(self) -> float:
    """The median of the time that this process takes for a step besides waiting for the devices."""
    return _median(self._own)

  @property
  def wait_seconds(self) -> float:
    """The median of the time that this process waits for the devices in a step."""
    return _median(self._waits)

  @property
  def data_seconds(self) -> float:
    """The median of the time that a step waits for its batch."""
    return _median(self._data)


def _median(values: deque[float]) -> float:
  return statistics.median(tuple(values) or (0.0,))


ACTIVITY = Activity()
