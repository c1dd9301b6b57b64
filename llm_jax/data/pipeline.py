"""Batches as a pure function of (data, seed, n): the only state is n; equal for any number of hosts and restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np

from llm_jax.base.batch import Batch
from llm_jax.base.errors import LostError
from llm_jax.data.config import DataConfig
from llm_jax.data.loaders import LOADERS
from llm_jax.data.open import Data, open_examples
from llm_jax.data.rows.examples import Examples
from llm_jax.data.rows.mixture import Mixture
from llm_jax.data.rows.order import order
from llm_jax.data.rows.tasks import Features

KEPT_BYTES = 256 << 20  # a source whose rows fit in here keeps them in memory, instead of making them every epoch
# Batches made per wake-up of the prefetch thread: the smallest of these three limits, but at least one batch.
AHEAD, AHEAD_ROWS, AHEAD_BYTES = 16, 1024, 4 << 20  # batches, rows, bytes


class Endless:
  """Endless examples: each epoch is a new permutation of all rows; random draws are seeded by (seed, position).

  Rows without random draws that all fit into KEPT_BYTES are made only once.
  """

  def __init__(self, examples: Examples, seed: int):
    self._examples, self._seed, self._unused = examples, seed, np.random.default_rng(0)
    self._first = examples.make(0, self._unused)
    size = len(examples) * sum(x.nbytes for x in self._first.values())
    self._keeps = not examples.random and size <= KEPT_BYTES

  @functools.cached_property
  def _kept(self) -> tuple[Features, np.ndarray]:
    """All rows, and which of them are made; rows not yet written take no memory."""
    num_rows = len(self._examples)
    return {name: np.empty((num_rows, *x.shape), x.dtype) for name, x in self._first.items()}, np.zeros(num_rows, bool)

  def __call__(self, positions: np.ndarray) -> Features:
    """Features [n, ...] at `positions`, int64 [n]."""
    rows = order(positions, len(self._examples), self._seed)
    if not self._keeps:
      return self._make(rows, positions)
    kept, made = self._kept
    missing = ~made[rows]
    if missing.any():
      for name, x in self._make(rows[missing], positions[missing]).items():
        kept[name][rows[missing]] = x
      made[rows] = True
    return {name: x[rows] for name, x in kept.items()}

  def _make(self, rows: np.ndarray, positions: np.ndarray) -> Features:
    return stack(list(self._examples.map(self._examples.make, rows.tolist(), map(self._rng, positions.tolist()))))

  def _rng(self, position: int) -> np.random.Generator:
    return np.random.default_rng([self._seed, position]) if self._examples.random else self._unused


def train_sources(config: DataConfig, data: Data) -> dict[str, Examples]:
  """The rows of each source's training part."""
  return {name: open_examples(config, data, store, train=True) for name, store in data.train.items()}


def mixed(config: DataConfig, sources: dict[str, Examples], rows_at: Callable[[int], int],
          seed: int) -> Callable[[np.ndarray], Features]:
  """A function from training examples, int64 [n], to features [n, ...]: of the only source, or of the mixture.

  `rows_at(step)`: the first row of the batch after `step`, from which the mixture's weights change.
  """
  endless = [Endless(examples, seed + i) for i, examples in enumerate(sources.values())]
  if len(endless) == 1:
    return endless[0]
  weights = zip(*(config.sources[name].weight for name in sources), strict=True)
  mixture = Mixture([list(w) for w in weights], [rows_at(step) for step in config.weights_from])

  def make(examples: np.ndarray) -> Features:
    of_source, positions = mixture(examples)
    turns = [np.flatnonzero(of_source == i) for i in range(len(endless))]
    parts = [source(positions[turn]) for source, turn in zip(endless, turns, strict=True) if len(turn)]
    back = np.argsort(np.concatenate(turns))
    return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

  return make


def train_batches(make: Callable[[np.ndarray], Features], rows_at: Callable[[int], int],
                  rows: np.ndarray) -> Callable[[np.ndarray], Features]:
  """A function from batch numbers, int64 [m], to features [m, rows, ...]: the rows `rows` of each batch.

  Batch n holds the examples from `rows_at(n)` on.
  """
  def batches(numbers: np.ndarray) -> Features:
    positions = np.array([rows_at(int(n)) for n in numbers])[:, None] + rows
    return {name: x.reshape(*positions.shape, *x.shape[1:]) for name, x in make(positions.ravel()).items()}

  return batches


@dataclasses.dataclass
class Batches:
  """This host's batches, one per step. From a store, the step alone determines the batch."""

  iterator: Any  # a generator, or one of Grain's iterators, which have a state
  counters: Any = None  # of a stream: an object whose attributes are logged
  rows_per_epoch: float = float('inf')  # infinite for several sources and for streams

  def __next__(self) -> Features:
    return next(self.iterator)

  def state(self) -> dict | None:
    """The state that a checkpoint must hold besides the step; None unless streaming."""
    return self.iterator.get_state() if hasattr(self.iterator, 'get_state') else None

  def metrics(self) -> dict[str, float]:
    return {f'data/{name}': float(n) for name, n in vars(self.counters).items()} if self.counters else {}

  def close(self) -> None:
    self.iterator.close()


def open_batches(config: DataConfig, data: Data, num_rows: int, rows: np.ndarray, seed: int, begin: int,
                 rows_at: Callable[[int], int], states: list[dict] | None, process: int,
                 num_processes: int) -> Batches:
  """Rows `rows` of batches begin, begin + 1, ...; `states`: of a stream, the saved state of each process at `begin`.

  `rows_at(step)`: the first row of the batch after `step`.

  Raises ConfigError if a stream's state was saved by a different number of processes.
  """
  if not config.streaming:
    sources = train_sources(config, data)
    batches = train_batches(mixed(config, sources, rows_at, seed), rows_at, rows)
    lengths = [len(examples) for examples in sources.values()]
    return Batches(prefetched(batches, begin, config.num_workers),
                   rows_per_epoch=lengths[0] if len(lengths) == 1 else float('inf'))
  return LOADERS['stream'].batches(config, data, num_rows, rows, seed, begin, states, process, num_processes)


def prefetched(batches: Callable[[np.ndarray], Features], begin: int,
               num_workers: int = 0) -> Generator[Features, None, None]:
  """Batches begin, begin + 1, ..., made in advance by one thread or by `num_workers` processes. Close it when done.

  Raises LostError if one of the processes dies.
  """
  import grain  # here, as reading a model does not need it and importing it takes half a second
  from absl import flags
  count = 1 if num_workers else num_ahead(batches(np.array([begin])))
  # No threads of Grain's own: chunks are made 10 times faster than these hand them over with the default options.
  inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  chunks = grain.MapDataset.range(sys.maxsize).map(
      lambda n: batches(begin + n * count + np.arange(count))).to_iter_dataset(inline)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read an absl flag, which fails before parsing
    chunks = chunks.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2))
  else:
    chunks = grain.experimental.ThreadPrefetchIterDataset(chunks, prefetch_buffer_size=2)
  with contextlib.closing(iter(chunks)) as iterator:
    while True:
      try:
        chunk = next(iterator)
      except RuntimeError as e:
        if not (died := re.search(r'Worker process was terminated unexpectedly with exit code (-?\d+)', str(e))):
          raise
        raise LostError(f'a process of config.data.num_workers has died with exit code {died[1]}'
                        + (', as when memory runs out' if died[1] == '-9' else '')) from None
      yield from ({name: x[i] for name, x in chunk.items()} for i in range(count))


def num_ahead(batch: Features) -> int:
  """How many batches like this one, [1, rows, ...], to make at once."""
  num_rows, size = batch['tokens'].shape[1], sum(x.nbytes for x in batch.values())
  return max(1, min(AHEAD, AHEAD_ROWS // num_rows, AHEAD_BYTES // size))


def eval_batches(examples: Examples, batch_size: int, rows: np.ndarray, max_rows: int | None) -> Iterator[Features]:
  """Rows `rows` of every batch of one pass over all rows, or over `max_rows` evenly spaced ones; padded at the end."""
  count = len(examples) if max_rows is None else min(len(examples), max_rows)
  indices = np.arange(count) * len(examples) // count

  def example(place: int) -> Features:
    return examples.make(int(indices[place]), np.random.default_rng(place))

  blank = {name: np.zeros_like(x) for name, x in example(0).items()}
  for begin in range(0, count, batch_size):
    made = examples.map(lambda row: example(row) if row < count else blank, (begin + rows).tolist())
    yield stack(list(made))


def stack(examples: list[Features]) -> Features:
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def example_batch(config: DataConfig) -> Batch:
  """One blank row with the features that every task gives; only its shapes matter."""
  def blank(length: int, dtype: type = np.int32) -> Any:
    return np.zeros((1, length), dtype)  # NumPy's: JAX would compile it

  encoder = blank(config.encoder_len) if config.task_settings.encodes else None
  return Batch(tokens=blank(config.seq_len), targets=blank(config.seq_len), loss_mask=blank(config.seq_len, np.float32),
               encoder_tokens=encoder)


def abstract_batch(features: Features, num_rows: int) -> Batch:
  """A Batch of `num_rows` rows of ShapeDtypeStructs, like one row's `features`."""
  rows: dict[str, Any] = {name: jax.ShapeDtypeStruct((num_rows, *x.shape), x.dtype) for name, x in features.items()}
  return Batch(**rows)
