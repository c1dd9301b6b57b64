"""Batches as a pure function of (data, seed, n): no state but n, the same for any number of hosts and restarts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial

import grain
import numpy as np
from absl import flags

from llm_jax.data import Data, DataConfig, open_examples
from llm_jax.data.examples import Examples
from llm_jax.data.mixture import Mixture
from llm_jax.data.streaming import Counters, train_stream, with_tuples
from llm_jax.data.tasks import Features
from llm_jax.errors import ConfigError

KEPT_BYTES = 256 << 20  # of rows kept in memory, instead of being made again in every epoch


def shuffled(examples: Examples, seed: int) -> grain.MapDataset:
  """Endless examples: epoch after epoch, each a new permutation of all rows; chance is seeded by (seed, position)."""
  indices = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat(None)
  if examples.random:
    return indices.random_map(examples.make)
  return indices.map(Kept(examples))


class Kept:
  """Rows of examples that draw nothing from chance, made once where all of them fit into KEPT_BYTES."""

  def __init__(self, examples: Examples):
    self._make = partial(examples.make, rng=np.random.default_rng(0))  # which draws nothing
    size = len(examples) * sum(x.nbytes for x in self._make(0).values())
    self._rows: dict[int, Features] | None = {} if size <= KEPT_BYTES else None

  def __call__(self, index: int) -> Features:
    if self._rows is None:
      return self._make(index)
    row = self._rows.get(index)
    if row is None:
      row = self._rows[index] = self._make(index)
    return row


def train_sources(config: DataConfig, data: Data) -> dict[str, Examples]:
  """The rows of each source's training part."""
  return {name: open_examples(config, data, store, train=True) for name, store in data.train.items()}


def mixed(config: DataConfig, sources: dict[str, Examples], rows_at: Callable[[int], int],
          seed: int) -> grain.MapDataset:
  """Example i of training: of the only source, or of a mixture whose weights change with the step.

  `rows_at(step)` rows have been read when `step` steps are done.
  """
  endless = [shuffled(examples, seed + i) for i, examples in enumerate(sources.values())]
  if len(endless) == 1:
    return endless[0]
  weights = zip(*(config.sources[name].weight for name in sources), strict=True)
  begins = [rows_at(step) for step in config.weights_from]
  return grain.MapDataset.select_from_datasets(endless, Mixture([list(w) for w in weights], begins))


def train_batches(examples: grain.MapDataset, batch_size: int, rows: np.ndarray, offset: int = 0) -> grain.MapDataset:
  """Element n is rows `rows` of batch n, which holds examples offset + n * batch_size and on."""
  return grain.MapDataset.range(sys.maxsize // batch_size).map(
      lambda n: stack([examples[offset + int(n) * batch_size + int(row)] for row in rows]))


@dataclasses.dataclass
class Batches:
  """This host's features, step after step. Where they come from a store, their place is the step alone."""

  iterator: grain.DatasetIterator
  streaming: bool
  counters: Counters
  rows_per_epoch: float = float('inf')  # of several sources or a stream there is no pass over all

  def __next__(self) -> Features:
    return next(self.iterator)

  def state(self) -> dict | None:
    """What a checkpoint must keep besides the step: nothing, unless streaming."""
    return self.iterator.get_state() if self.streaming else None

  def metrics(self) -> dict[str, float]:
    return {f'data/{name}': float(n) for name, n in vars(self.counters).items()} if self.streaming else {}

  def close(self) -> None:
    self.iterator.close()


def open_batches(config: DataConfig, data: Data, num_rows: int, rows: np.ndarray, seed: int, begin: int,
                 rows_at: Callable[[int], int], states: list[dict] | None, process: int,
                 num_processes: int) -> Batches:
  """Rows `rows` of batches begin, begin + 1, ...; `states` are what a stream's processes kept at `begin`.

  `rows_at(step)` is the first row of the batch after `step`; from `begin` on it grows by num_rows.

  Raises ConfigError where a stream was kept by another number of processes, or its config does not fit.
  """
  counters = Counters()
  if not config.streaming:
    sources = train_sources(config, data)
    batches = train_batches(mixed(config, sources, rows_at, seed), num_rows, rows, rows_at(begin) - begin * num_rows)
    lengths = [len(examples) for examples in sources.values()]
    return Batches(prefetched(batches, begin, config.num_workers), False, counters,
                   lengths[0] if len(lengths) == 1 else float('inf'))
  weights = [source.weight[0] for source in config.named_sources.values()]
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
  return Batches(iterator, True, counters)


def prefetched(batches: grain.MapDataset, begin: int, num_workers: int = 0) -> grain.DatasetIterator:
  """Batches begin, begin + 1, ... made ahead by one thread, or by processes. Close it when done."""
  # Mapped rows are made faster than threads hand them over: 10x, against Grain's default options.
  inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  batches = batches[begin:].to_iter_dataset(inline)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers ask for a flag of theirs
    return iter(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)))
  return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4))


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
