"""Loggers: where the scalars, texts and histograms of a run are written; by name in config.log.loggers."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax.base.files import write_file
from llm_jax.base.registry import Registry, factory_of, register


class LoggedRun(NamedTuple):
  """What a logger is opened with. It removes, or marks as replaced, its own entries after `step`."""

  workdir: Path
  step: int  # from which the run starts or resumes
  config: dict[str, Any]


class Histogram(NamedTuple):
  """Counts of values in bins of equal width from `low` to `high`, with the values' sum and sum of squares."""

  low: float
  high: float
  counts: np.ndarray
  total: float
  squares: float

  @property
  def edges(self) -> np.ndarray:
    return np.linspace(self.low, self.high, len(self.counts) + 1)


class Logger:
  """The methods of a logger; a logger overrides those that it has a use for.

  After an OSError, as on a full disk, it is dropped, and opened again later for the step that the run has then reached.
  """

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Scalars of `step`; steps never decrease, and a step may come twice, with other names."""

  def text(self, step: int, name: str, value: str) -> None:
    """A plain text, such as a sample."""

  def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
    """Histograms of weights, gradients and updates."""

  def close(self) -> None:
    """Called once, at the end of the run or of this process."""


# LOGGERS[name](settings)(run) opens a Logger. Register a class, or a function, with the parameter `run`, a LoggedRun;
# its parameters with defaults are the settings.
LOGGERS = Registry('logger', factory_of())


class Jsonl(Logger):
  """metrics.jsonl: one JSON object for each logged step."""

  def __init__(self, run: LoggedRun):
    path = run.workdir / 'metrics.jsonl'
    lines = path.read_bytes().split(b'\n') if path.exists() else [b'']
    if damaged := [n for n, line in enumerate(lines[:-1], 1) if step_of(line) == float('inf')]:
      aside = path.with_name(f'{path.name}.damaged-{time.time():.0f}')
      write_file(aside, b'\n'.join(lines))
      print(f'WARNING: {path}: line {damaged[0]} is damaged, {len(damaged)} in all; {aside.name} keeps the file as it '
            'was, and these lines are left out', file=sys.stderr, flush=True)
    kept = [line + b'\n' for line in lines if step_of(line) <= run.step]
    write_file(path, b''.join(kept))
    self._fd = os.open(path, os.O_WRONLY | getattr(os, 'O_NOFOLLOW', 0))
    self._end = sum(map(len, kept))
    self._last: dict[str, float] = json.loads(kept[-1]) if kept else {}
    self._last_at = self._end - len(kept[-1]) if kept else 0

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes a line; a second call for a step extends its line."""
    if self._last.get('step') == step:
      values = {**self._last, **values}
    else:
      self._last_at = self._end
    self._last = {'step': step, **values}
    line = json.dumps(self._last).encode() + b'\n'
    if os.pwrite(self._fd, line, self._last_at) < len(line):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self._end = self._last_at + len(line)

  def close(self) -> None:
    os.close(self._fd)


def step_of(line: str | bytes) -> float:
  """The step of a line of metrics.jsonl; infinity if it is damaged, as a killed process may leave it."""
  try:
    step = json.loads(line)['step']
  except (ValueError, KeyError, TypeError, RecursionError):
    return float('inf')
  return step if isinstance(step, int) else float('inf')


def open_tensorboard(run: LoggedRun) -> Logger:
  from llm_jax.base.tensorboard import TensorBoard  # when it is used, as not every run or command needs it
  return TensorBoard(run)


register(LOGGERS, 'tensorboard', open_tensorboard)
register(LOGGERS, 'jsonl', Jsonl)
