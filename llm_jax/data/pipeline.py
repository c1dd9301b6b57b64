"""Batches as a pure function of (data, seed, n): no state but n, the same for any number of hosts and restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llm_jax.base.batch import Batch
from llm_jax.base.errors import ConfigError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import Data, open_examples
from llm_jax.data.rows.examples import Examples
from llm_jax.data.rows.mixture import Mixture
from llm_jax.data.rows.order import order
from llm_jax.data.rows.tasks import Features
from llm_jax.data.streaming import Counters, train_stream, with_tuples

KEPT_BYTES = 256 << 20  # of a source's rows kept in memory, instead of being made again in every epoch
# Made at a time, so that a thread which wakes up beside a busy device does more than warm its caches: the least of
AHEAD, AHEAD_ROWS, AHEAD_BYTES = 16, 1024, 4 << 20  # batches, rows, bytes, but a batch at least
# Chunks are made faster than Grain's own threads hand them over: 10x, against its default options.
INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Endless:
  """Examples without end: epoch after epoch, each a new permutation of all rows; chance is seeded by (seed, position).

  Where rows draw nothing from chance, and all of them fit into KEPT_BYTES, each is made once.
  """

  def __init__(self, examples: Examples, seed: int):
    self._examples, self._seed, self._unused = examples, seed, np.random.default_rng(0)
    self._first = examples.make(0, self._unused)
    size = len(examples) * sum(x.nbytes for x in self._first.values())
    self._keeps = not examples.random and size <= KEPT_BYTES

  @functools.cached_property
  def _kept(self) -> tuple[Features, np.ndarray]:
    """All rows, and which of them are made; pages that nobody wrote take no memory."""
    num_rows = len(self._examples)
    return {name: np.empty((num_rows, *x.shape), x.dtype) for name, x in self._first.items()}, np.zeros(num_rows, bool)

  def __call__(self, positions: np.ndarray) -> Features:
    """Features [n, ...] of the positions, int64 [n]."""
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
    return stack([self._examples.make(row, self._rng(position))
                  for row, position in zip(rows.tolist(), positions.tolist(), strict=True)])

  def _rng(self, position: int) -> np.random.Generator:
    return np.random.default_rng([self._seed, position]) if self._examples.random else self._unused


def train_sources(config: DataConfig, data: Data) -> dict[str, Examples]:
  """The rows of each source's training part."""
  return {name: open_examples(config, data, store, train=True) for name, store in data.train.items()}


def mixed(config: DataConfig, sources: dict[str, Examples], rows_at: Callable[[int], int],
          seed: int) -> Callable[[np.ndarray], Features]:
  """Features [n, ...] of the examples int64 [n] of training: the only source's, or a mixture's, by the step's weights.

  `rows_at(step)` rows have been read when `step` steps are done.
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


def train_batches(make: Callable[[np.ndarray], Features], batch_size: int, rows: np.ndarray,
                  offset: int = 0) -> Callable[[np.ndarray], Features]:
  """Features [m, rows, ...] of batches int64 [m]: rows `rows` of each; batch 0 holds the examples from `offset` on."""
  def batches(numbers: np.ndarray) -> Features:
    positions = offset + numbers[:, None] * batch_size + rows
    return {name: x.reshape(*positions.shape, *x.shape[1:]) for name, x in make(positions.ravel()).items()}

  return batches


@dataclasses.dataclass
class Batches:
  """This host's features, step after step. Where they come from a store, their place is the step alone."""

  iterator: Generator[Features, None, None] | grain.DatasetIterator
  counters: Counters | None = None  # of a stream
  rows_per_epoch: float = float('inf')  # of several sources or a stream there is no pass over all

  def __next__(self) -> Features:
    return next(self.iterator)

  def state(self) -> dict | None:
    """What a checkpoint must keep besides the step: nothing, unless streaming."""
    return self.iterator.get_state() if isinstance(self.iterator, grain.DatasetIterator) else None

  def metrics(self) -> dict[str, float]:
    return {f'data/{name}': float(n) for name, n in vars(self.counters).items()} if self.counters else {}

  def close(self) -> None:
    self.iterator.close()


def open_batches(config: DataConfig, data: Data, num_rows: int, rows: np.ndarray, seed: int, begin: int,
                 rows_at: Callable[[int], int], states: list[dict] | None, process: int,
                 num_processes: int) -> Batches:
  """Rows `rows` of batches begin, begin + 1, ...; `states` are what a stream's processes kept at `begin`.

  `rows_at(step)` is the first row of the batch after `step`; from `begin` on it grows by num_rows.

  Raises ConfigError where a stream was kept by another number of processes, or its config does not fit.
  """
  if not config.streaming:
    sources = train_sources(config, data)
    batches = train_batches(mixed(config, sources, rows_at, seed), num_rows, rows, rows_at(begin) - begin * num_rows)
    lengths = [len(examples) for examples in sources.values()]
    return Batches(prefetched(batches, begin, config.num_workers),
                   rows_per_epoch=lengths[0] if len(lengths) == 1 else float('inf'))
  weights = [source.weight[0] for source in config.named_sources.values()]
  counters = Counters()
  iterator = train_stream(
      data.streams, weights, data.tokenizer, seq_len=config.seq_len, rows=rows, num_rows=num_rows, seed=seed,
      shuffle_buffer=config.shuffle_buffer, cache_bytes=config.cache_mb << 20, mask_documents=config.mask_documents,
      counters=counters)
  if begin:
    if states is None or len(states) != num_processes:
      raise ConfigError(f'config.data.streaming: the checkpoint holds the place of {len(states or [])} process(es) in '
                        f'the stream, now there are {num_processes}; go on with as many, or train from a token store '
                        '(streaming=False) in another --workdir')
    iterator.set_state(with_tuples(states[process]))
  return Batches(iterator, counters)


def prefetched(batches: Callable[[np.ndarray], Features], begin: int,
               num_workers: int = 0) -> Generator[Features, None, None]:
  """Batches begin, begin + 1, ... made ahead by one thread, or one by one by processes. Close it when done."""
  count = 1 if num_workers else num_ahead(batches(np.array([begin])))
  chunks = grain.MapDataset.range(sys.maxsize).map(
      lambda n: batches(begin + n * count + np.arange(count))).to_iter_dataset(INLINE)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers ask for a flag of theirs
    chunks = chunks.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2))
  else:
    chunks = grain.experimental.ThreadPrefetchIterDataset(chunks, prefetch_buffer_size=2)
  with contextlib.closing(iter(chunks)) as iterator:
    for chunk in iterator:
      yield from ({name: x[i] for name, x in chunk.items()} for i in range(count))


def num_ahead(batch: Features) -> int:
  """How many batches [1, rows, ...] like this one to make at a time."""
  num_rows, size = batch['tokens'].shape[1], sum(x.nbytes for x in batch.values())
  return max(1, min(AHEAD, AHEAD_ROWS // num_rows, AHEAD_BYTES // size))


def eval_batches(examples: Examples, batch_size: int, rows: np.ndarray, max_rows: int | None) -> Iterator[Features]:
  """Rows `rows` of every batch of a fixed pass: all rows, or `max_rows` evenly spaced; the last batch is padded."""
  count = len(examples) if max_rows is None else min(len(examples), max_rows)
  indices = np.arange(count) * len(examples) // count

  def example(place: int) -> Features:
    return examples.make(int(indices[place]), np.random.default_rng(place))

  blank = {name: np.zeros_like(x) for name, x in example(0).items()}
  for begin in range(0, count, batch_size):
    yield stack([example(begin + row) if begin + row < count else blank for row in rows])


def stack(examples: list[Features]) -> Features:
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def example_batch(config: DataConfig) -> Batch:
  """One blank row with the features that every task gives; only its shapes matter."""
  blank = jnp.zeros((1, config.seq_len), jnp.int32)
  encoder = jnp.zeros((1, config.encoder_len), jnp.int32) if config.task_settings.encodes else None
  return Batch(tokens=blank, targets=blank, loss_mask=blank.astype(jnp.float32), encoder_tokens=encoder)


def abstract_batch(features: Features, num_rows: int) -> Batch:
  """A Batch of `num_rows` rows of ShapeDtypeStructs, like one row's `features`."""
  rows: dict[str, Any] = {name: jax.ShapeDtypeStruct((num_rows, *x.shape), x.dtype) for name, x in features.items()}
  return Batch(**rows)
