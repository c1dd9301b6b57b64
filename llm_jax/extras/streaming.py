"""Tokenizes documents during training, for sources that are endless or too large to tokenize in advance.

As with a token store, every document is used once per epoch, and a run resumes exactly, as the checkpoint holds the
readers' state. Unlike with a token store, rows are shuffled within a buffer only, the order depends on the number of
hosts (resuming with another number is an error), resuming reads earlier records again (but does not tokenize them), and
the validation documents are set aside in advance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.chat.open import check_conversations
from llm_jax.data.config import DataConfig
from llm_jax.data.loaders import LOADERS
from llm_jax.data.open import Data, data_of, open_corpus, tokenizer_of
from llm_jax.data.pipeline import Batches
from llm_jax.data.sources.corpus import Corpus, memory_stores
from llm_jax.data.sources.documents import Document
from llm_jax.data.sources.splits import SPLITS
from llm_jax.data.stores.store import TokenStore
from llm_jax.data.stores.writer import encode_documents
from llm_jax.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass
class Counters:
  """Counts by the reading thread, for the metrics."""

  cache_hits: int = 0
  cache_misses: int = 0
  epoch: int = 0


class Documents(grain.IterDataset):
  """Endless training documents as {'tokens', 'targets'} [n]: every `num_shards`-th document from `shard` on."""

  def __init__(self, corpus: Corpus, tokenizer: Tokenizer | None, shard: int, num_shards: int, cache_bytes: int,
               counters: Counters):
    super().__init__()
    self.corpus, self.tokenizer, self.shard, self.num_shards = corpus, tokenizer, shard, num_shards
    self.cache_bytes, self.counters = cache_bytes, counters

  def __iter__(self) -> grain.DatasetIterator:
    return _DocumentsIterator(self)


class _DocumentsIterator(grain.DatasetIterator):
  """The state is the epoch, the number of its training documents read so far, and the corpus's position."""

  def __init__(self, dataset: Documents):
    super().__init__()
    self._dataset = dataset
    self._cache: dict[int, np.ndarray] = {}  # the first documents stay: every epoch has the same order
    self._cached_bytes = 0
    self._start = dataset.corpus.start()
    self._begin({'epoch': 0, 'number': 0, 'corpus': None})

  def _begin(self, state: dict) -> None:
    self._state = state
    progress = {**self._start, **(state['corpus'] or {})}
    self._reading = self._dataset.corpus.documents(progress)

  def __next__(self) -> dict[str, np.ndarray]:
    while True:
      number, document = self._read()
      if number % self._dataset.num_shards == self._dataset.shard:
        return self._tokenized(number, document)

  def _read(self) -> tuple[int, Document]:
    """(number in the epoch, document) of the next training document of any shard."""
    data = self._dataset
    while True:
      read = next(self._reading, None)
      if read is None:
        if self._state['number'] <= data.shard:  # this shard has no document: the search would never end
          raise DataError(f'{data.corpus.name}: {self._state["number"]} training document(s) are too few for '
                          f'{data.num_shards} process(es); each needs one')
        self._begin({'epoch': self._state['epoch'] + 1, 'number': 0, 'corpus': None})
        continue
      corpus_state, dealt = read
      for side, document in dealt:
        if document.answer is not None or document.label is not None:
          raise DataError(f'{document.name}: has an answer or a label, which streaming does not support: set '
                          'config.data.streaming=False')
        if side == 'train':
          number = self._state['number']
          self._state = {'epoch': self._state['epoch'], 'number': number + 1, 'corpus': corpus_state()}
          return number, document

  def _tokenized(self, number: int, document: Document) -> dict[str, np.ndarray]:
    counters, tokenizer = self._dataset.counters, self._dataset.tokenizer
    counters.epoch = self._state['epoch']
    ids = self._cache.get(number)
    if ids is None:
      counters.cache_misses += 1
      [(text, _)] = encode_documents(tokenizer, [document])
      bos, eos = ([tokenizer.bos_id], [tokenizer.eos_id]) if tokenizer else ([], [])
      ids = np.concatenate([bos, text, eos]).astype(np.int32)
      if self._cached_bytes + ids.nbytes <= self._dataset.cache_bytes:
        self._cache[number] = ids
        self._cached_bytes += ids.nbytes
    else:
      counters.cache_hits += 1
    return {'tokens': ids[:-1], 'targets': ids[1:]}

  def get_state(self) -> dict:
    return self._state

  def set_state(self, state: dict) -> None:
    self._begin(state)


def train_stream(corpora: dict[str, Corpus], weights: list[float], tokenizer: Tokenizer | None, *, seq_len: int,
                 rows: np.ndarray, num_rows: int, seed: int, shuffle_buffer: int, cache_bytes: int,
                 mask_documents: bool, counters: Counters) -> grain.DatasetIterator:
  """This host's batches of concatenated documents; get_state and set_state resume exactly. Close it when done."""
  num_shards, shard = num_rows // len(rows), int(rows[0]) // len(rows)
  streams = [Documents(corpus, tokenizer, shard, num_shards, cache_bytes // len(corpora), counters)
             for corpus in corpora.values()]
  stream = streams[0] if len(streams) == 1 else grain.IterDataset.mix(streams, weights)
  stream = grain.experimental.ConcatThenSplitIterDataset(
      stream, length_struct={'tokens': seq_len, 'targets': seq_len})

  def features(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    masks = {'segment_ids': packed['tokens_segment_ids'], 'positions': packed['tokens_positions']}
    return {'tokens': packed['tokens'], 'targets': packed['targets'],
            'loss_mask': (packed['targets_segment_ids'] > 0).astype(np.float32), **(masks if mask_documents else {})}

  stream = stream.map(features)
  if shuffle_buffer > 1:
    stream = grain.experimental.WindowShuffleIterDataset(stream, window_size=shuffle_buffer, seed=seed)
  stream = stream.batch(len(rows), drop_remainder=True)
  return iter(grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=4))


def with_tuples(state: Any) -> Any:
  """The state with lists turned back into tuples after JSON; Grain's packing compares slices with the tuple (0, 0)."""
  if isinstance(state, dict):
    return {key: with_tuples(value) for key, value in state.items()}
  return tuple(map(with_tuples, state)) if isinstance(state, list | tuple) else state


def streaming_held_out(corpus: Corpus, most: int | None) -> Iterator[tuple[str, Document]]:
  """The documents set aside for val and test: the first `most` different ones of a corpus, or all of their own paths.
  """
  for side, source in corpus.sides:
    part = dataclasses.replace(corpus, sides=((side, source),))
    if side is None and not most:
      continue
    number = 0
    for _, dealt in part.documents():
      number += sum(not document.continues for _, document in dealt)
      if side is None and number > part.num_placed:
        break
      yield from (pair for pair in dealt if pair[0] != 'train')


class Stream:
  """The loader `stream`."""

  @staticmethod
  def problems(config: DataConfig) -> list[str]:
    """Settings of the config that do not go with streaming."""
    sources = config.named_sources.values()
    held_out = (config.split == 'count' and config.val_documents) or all(s.val_path for s in sources)
    return [f'streaming: {message}; or train from a token store (streaming=False)' for wrong, message in (
        (not held_out, 'validation needs split=count with val_documents, or val_path'),
        (config.split in ('tail', 'document'), f'split={config.split} needs a pass over all data: set count'),
        (not all(all(s.weight) for s in sources), 'a source with weight 0 is unused: remove it'),
        (config.tokenizer == 'char', 'tokenizer=char needs a pass over all text: set byte, bpe or a file'),
        (config.task != 'next_token' or config.packing != 'concat', 'only task next_token with packing concat streams'),
        (config.augment.random, 'augment is not supported: turn it off'),
        (config.stride is not None, 'windows cannot overlap: set stride=None'),
        (config.filters.deduplicate or config.filters.deduplicate_normalized,
         'duplicates cannot be found: set filters.deduplicate=False and deduplicate_normalized=False'),
        (len(config.weights_from) > 1, 'weights cannot change: set weights_from=(0,)'),
        (config.num_workers > 0, 'a stream is read by one thread: set num_workers=0')) if wrong]

  @staticmethod
  def open(config: DataConfig) -> Data:
    """The validation documents in memory, and the corpora to stream. Raises ConfigError, DataError."""
    corpora = {name: open_corpus(config, name, source) for name, source in config.named_sources.items()}
    check_conversations(config, corpora)
    tokenizer, _ = tokenizer_of(config, config.tokenizer, corpora)
    if tokenizer is None:
      raise ConfigError('config.data.streaming: the vocabulary of a stream of token ids is unknown; set '
                        'config.data.tokenizer to their tokenizer, or train from a token store (streaming=False)')
    held = None if config.split != 'count' else config.val_documents + config.test_documents
    splits: dict[str, dict[str, TokenStore]] = {split: {} for split in SPLITS}
    for name, corpus in corpora.items():
      for side, tokens in memory_stores(streaming_held_out(corpus, held), ('val', 'test'), tokenizer).items():
        if len(tokens.tokens):
          splits[side][name] = tokens
    if not splits['val']:
      raise DataError(f'config.data.path: {config.path} gives no validation documents; set '
                      'config.data.split=count and val_documents, or config.data.val_path')
    return dataclasses.replace(data_of(config, splits, tokenizer), streams=corpora)

  @staticmethod
  def batches(config: DataConfig, data: Data, num_rows: int, rows: np.ndarray, seed: int, begin: int,
              states: list[dict] | None, process: int, num_processes: int) -> Batches:
    """See pipeline.open_batches. Raises ConfigError if the state was saved by a different number of processes."""
    weights = [source.weight[0] for source in config.named_sources.values()]
    counters = Counters()
    iterator = train_stream(
        data.streams, weights, data.tokenizer, seq_len=config.seq_len, rows=rows, num_rows=num_rows, seed=seed,
        shuffle_buffer=config.shuffle_buffer, cache_bytes=config.cache_mb << 20, mask_documents=config.mask_documents,
        counters=counters)
    if begin:
      if states is None or len(states) != num_processes:
        raise ConfigError(f'config.data.streaming: the checkpoint holds the stream state of {len(states or [])} '
                          f'process(es), but this run has {num_processes}; resume with the same number, or train from '
                          'a token store (streaming=False) in another --workdir')
      iterator.set_state(with_tuples(states[process]))
    return Batches(iterator, counters)


register(LOADERS, 'stream', Stream, NoSettings)
