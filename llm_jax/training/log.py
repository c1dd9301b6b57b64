"""What is logged of a run: metrics of steps and epochs, and the loggers that write them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.batch import Metrics
from llm_jax.base.errors import ConfigError
from llm_jax.base.loggers import LOGGERS, Histogram, LoggedRun, Logger, step_of
from llm_jax.base.multihost import gather
from llm_jax.config import LogConfig
from llm_jax.data.open import Data
from llm_jax.training.console import Console
from llm_jax.training.status import Status
from llm_jax.training.throughput import Goodput

MAX_WAIT = 300.0  # seconds between attempts to open a logger that could not write


@flax.struct.dataclass
class PackedMetrics:
  """Scalars packed in one array: faster to return from a program and to fetch than many arrays."""

  values: jax.Array  # float32 [M]
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)


def pack_metrics(metrics: Metrics) -> PackedMetrics:
  return PackedMetrics(jnp.stack([jnp.asarray(value, jnp.float32) for value in metrics.values()]), tuple(metrics))


def unpack_metrics(packed: PackedMetrics) -> dict[str, float]:
  """The scalars by name; waits for the program that computes them."""
  return dict(zip(packed.names, np.asarray(packed.values).tolist(), strict=True))


@dataclasses.dataclass
class Gap:
  """The time in which a logger cannot write."""

  lost: int = 0  # entries
  wait: float = 1.0  # seconds between attempts; doubles
  next_try: float = 0.0


class MetricsWriter:
  """The loggers of a run. One that cannot write, as on a full disk, is opened again later; what is lost is counted.

  Only process 0 writes.
  """

  def __init__(self, run: LoggedRun, config: LogConfig):
    self._run, self._config = run, config
    self._loggers: dict[str, Logger] = {}
    self._gaps: dict[str, Gap] = {}
    problem = ''
    for name in config.loggers if jax.process_index() == 0 else ():
      with self._guarded(name):
        try:
          self._loggers[name] = self._open(name)
        except ConfigError as e:
          problem = str(e)
    if problem := next(filter(None, gather(problem)), ''):  # all processes fail, or none
      self.close()
      raise ConfigError(problem)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    if values:
      self._call('scalars', step, values)
      self._run = self._run._replace(step=step)

  def text(self, step: int, name: str, value: str) -> None:
    self._call('text', step, name, value)

  def histograms(self, step: int, values: dict[str, Histogram]) -> None:
    self._call('histograms', step, values)

  def close(self) -> None:
    self._call('close')
    for name, gap in self._gaps.items():
      if gap.lost:
        self._end_gap(name, 'were not written')
    self._loggers, self._gaps = {}, {}

  def _open(self, name: str) -> Logger:
    return LOGGERS[name](LOGGERS.section(name, self._config.sections))(self._run)

  def _call(self, method: str, *arguments: Any) -> None:
    for name in [*self._loggers, *(self._gaps if method != 'close' else ())]:
      gap = self._gaps.get(name)
      if gap is not None and time.monotonic() < gap.next_try:
        gap.lost += 1
        continue
      with self._guarded(name, lost=method != 'close'):
        logger = self._loggers.get(name) or self._open(name)
        getattr(logger, method)(*arguments)
        self._loggers[name] = logger
        if name in self._gaps:
          self._end_gap(name, 'are missing; metrics are written again')
          del self._gaps[name]

  def _end_gap(self, name: str, text: str) -> None:
    print(f'WARNING: {name}: {self._gaps[name].lost} entries {text}', file=sys.stderr, flush=True)

  @contextlib.contextmanager
  def _guarded(self, name: str, lost: bool = False) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      if logger := self._loggers.pop(name, None):
        with contextlib.suppress(OSError):
          logger.close()
      if name not in self._gaps:
        self._gaps[name] = Gap()
        print(f'WARNING: {name}: metrics cannot be written ({e}); training continues, and this is tried again',
              file=sys.stderr, flush=True)
      gap = self._gaps[name]
      gap.lost, gap.wait = gap.lost + lost, min(2 * gap.wait, MAX_WAIT)
      gap.next_try = time.monotonic() + gap.wait


class Epochs:
  """Means over the steps of each epoch, logged with its last step; `sums` are stored in checkpoints."""

  def __init__(self, epoch_at: Callable[[int], int], sums: dict[str, float]):
    """`epoch_at(step)`: the number of completed epochs after `step` steps."""
    self._epoch_at, self.sums = lru_cache(2)(epoch_at), dict(sums)  # called for each step and the step before

  def add(self, step: int, values: dict[str, float]) -> dict[str, float]:
    """{'epoch/loss': ..., 'epoch/number': 3} after an epoch's last step, else {}."""
    applied = not values.get('skipped')  # else loss and norm may be NaN, which would stay in the sums
    for name, value in (('steps', 1.0), ('loss', values['loss']), ('grad_norm', values['grad_norm'])):
      self.sums[name] = self.sums.get(name, 0.0) + (value if applied else 0.0)
    number = self._epoch_at(step)
    if number == self._epoch_at(step - 1):
      return {}
    steps = max(1.0, self.sums.pop('steps'))
    means = {f'epoch/{name}': total / steps for name, total in self.sums.items()}
    self.sums = {}
    return {'epoch/number': float(number), **means}


class Logs(NamedTuple):
  """The outputs of a session."""

  writer: MetricsWriter
  console: Console
  status: Status
  goodput: Goodput


def read_metrics(path: Path) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl, without damaged ones, such as an incomplete last line from a killed process."""
  return [json.loads(line) for line in path.read_bytes().split(b'\n') if step_of(line) < float('inf')]


def text_metrics(split: str, loss: float | None, data: Data, task: str) -> dict[str, float]:
  """Perplexity of a loss in nats per token, and bits per byte, from the training part's mean bytes per token."""
  if loss is None:
    return {}
  values = {f'{split}/perplexity': float(np.exp(min(loss, 700.0)))}
  stores = data.train.values()
  if task == 'next_token' and stores and all(store.num_bytes for store in stores):
    num_tokens, num_bytes = sum(len(s.tokens) for s in stores), sum(s.num_bytes for s in stores)
    values[f'{split}/bits_per_byte'] = loss / np.log(2) * num_tokens / num_bytes
  return values
