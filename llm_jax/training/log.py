"""Logs of a run: metrics.jsonl, TensorBoard (without TensorFlow), means of epochs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from llm_jax.base.batch import Metrics
from llm_jax.base.files import open_append, write_file
from llm_jax.data.open import Data
from llm_jax.training.console import Console
from llm_jax.training.status import Status
from llm_jax.training.throughput import Goodput


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


class MetricsWriter:
  """Appends to metrics.jsonl and a TensorBoard event file in `workdir`; removes entries after `step` on resume.

  Only process 0 writes. If the disk is full or read-only, it warns once and stops writing; the run continues.
  """

  def __init__(self, workdir: Path, step: int):
    self._enabled = jax.process_index() == 0
    self._guarded(lambda: self._open(workdir, step))

  def _open(self, workdir: Path, step: int) -> None:
    self._path = workdir / 'metrics.jsonl'
    kept = []
    if self._path.exists():
      kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
    self._rewrite(kept)
    self._last: dict[str, float] = json.loads(kept[-1]) if kept else {}
    self._events = EventFileWriter(str(workdir), flush_secs=10)
    # Makes TensorBoard drop what an interrupted run wrote after this step.
    self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

  def _rewrite(self, lines: list[str]) -> None:
    """Atomically replaces the contents of the file with these lines, and reopens it for appending."""
    write_file(self._path, ''.join(line + '\n' for line in lines))
    self._jsonl = open_append(self._path)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes scalars of `step`; metrics.jsonl has one line per step, so a second call extends that line."""
    if not values:
      return

    def write() -> None:
      joins = self._last.get('step') == step
      self._last = {**(self._last if joins else {}), 'step': step, **values}
      if joins:
        self._jsonl.close()
        self._rewrite([*self._path.read_text().splitlines()[:-1], json.dumps(self._last)])
      else:
        self._jsonl.write(json.dumps(self._last) + '\n')
        self._jsonl.flush()
      # Written as simple values: TensorBoard's EventAccumulator neither lists tensors as scalars nor drops them after
      # a restart.
      points = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
      self._events.add_event(Event(wall_time=time.time(), step=step, summary=points))
    self._guarded(write)

  def text(self, step: int, name: str, value: str) -> None:
    """Writes a text for TensorBoard's TEXT page, shown verbatim (an indented block of Markdown)."""
    block = '\n'.join('    ' + line for line in value.splitlines())
    self._guarded(lambda: self._events.add_event(
        Event(wall_time=time.time(), step=step, summary=text_pb(name, block))))

  def close(self) -> None:
    if self._enabled:
      self._guarded(self._jsonl.close)
      self._guarded(self._events.close)
    self._enabled = False

  def _guarded(self, write: Any) -> None:
    if not self._enabled:
      return
    try:
      write()
    except OSError as e:
      self._enabled = False
      print(f'WARNING: metrics are no longer written ({e}); training continues', file=sys.stderr, flush=True)


class Epochs:
  """Means over the steps of each epoch, logged with its last step; `sums` are stored in checkpoints."""

  def __init__(self, epoch_at: Callable[[int], int], sums: dict[str, float]):
    """`epoch_at(step)`: the number of completed epochs after `step` steps."""
    self._epoch_at, self.sums = lru_cache(2)(epoch_at), dict(sums)  # called for each step and the step before

  def add(self, step: int, values: dict[str, float]) -> dict[str, float]:
    """{'epoch/loss': ..., 'epoch/number': 3} after an epoch's last step, else {}."""
    for name, value in (('steps', 1.0), ('loss', values['loss']), ('grad_norm', values['grad_norm'])):
      self.sums[name] = self.sums.get(name, 0.0) + value
    number = self._epoch_at(step)
    if number == self._epoch_at(step - 1):
      return {}
    steps = self.sums.pop('steps')
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
  """The lines of a metrics.jsonl, without an incomplete last line from a killed process."""
  return [json.loads(line) for line in path.read_text().splitlines() if _step_of(line) < float('inf')]


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError):
    return float('inf')


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
