"""Loggers: where the scalars, texts and histograms of a run are written; by name in config.log.loggers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm_jax.base.files import open_append, write_file
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
  """The methods of a logger; a logger overrides those that it has a use for. An OSError ends its log, not the run."""

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
    self._path = run.workdir / 'metrics.jsonl'
    kept = []
    if self._path.exists():
      kept = [line for line in self._path.read_text().splitlines() if step_of(line) <= run.step]
    self._rewrite(kept)
    self._last: dict[str, float] = json.loads(kept[-1]) if kept else {}

  def _rewrite(self, lines: list[str]) -> None:
    """Atomically replaces the contents of the file with these lines, and reopens it for appending."""
    write_file(self._path, ''.join(line + '\n' for line in lines))
    self._file = open_append(self._path)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes a line; a second call for a step extends its line."""
    joins = self._last.get('step') == step
    self._last = {**(self._last if joins else {}), 'step': step, **values}
    if joins:
      self._file.close()
      self._rewrite([*self._path.read_text().splitlines()[:-1], json.dumps(self._last)])
    else:
      self._file.write(json.dumps(self._last) + '\n')
      self._file.flush()

  def close(self) -> None:
    self._file.close()


def step_of(line: str) -> float:
  """The step of a line of metrics.jsonl; infinity if it is damaged, as a killed process may leave it."""
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return float('inf')


def open_tensorboard(run: LoggedRun) -> Logger:
  from llm_jax.base.tensorboard import TensorBoard  # when it is used, as not every run or command needs it
  return TensorBoard(run)


register(LOGGERS, 'tensorboard', open_tensorboard)
register(LOGGERS, 'jsonl', Jsonl)
