"""Training on documents as they come, for sources that are endless or too large to tokenize ahead.

What it keeps: every host reads its own share, each document once an epoch, and a run goes on exactly where it was, as
the readers' state is in the checkpoint. What it gives up against the token store: rows are shuffled within a buffer
only, the order depends on the number of hosts (another number is refused), going on reads past records anew (though
it does not tokenize them), and validation is on a part set aside beforehand.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import grain
import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.sources.corpus import Corpus
from llm_jax.data.sources.documents import Document
from llm_jax.data.sources.filters import Deduplicator
from llm_jax.data.stores.writer import encode
from llm_jax.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass
class Counters:
  """What the reading thread has counted; for the metrics."""

  cache_hits: int = 0
  cache_misses: int = 0
  epoch: int = 0


class Documents(grain.IterDataset):
  """Endless documents of a corpus' training side as {'tokens', 'targets'} [n]: every `num_shards`-th from `shard`."""

  def __init__(self, corpus: Corpus, tokenizer: Tokenizer | None, shard: int, num_shards: int, cache_bytes: int,
               counters: Counters):
    super().__init__()
    self.corpus, self.tokenizer, self.shard, self.num_shards = corpus, tokenizer, shard, num_shards
    self.cache_bytes, self.counters = cache_bytes, counters

  def __iter__(self) -> grain.DatasetIterator:
    return _DocumentsIterator(self)


class _DocumentsIterator(grain.DatasetIterator):
  """Its state: the epoch, how many training documents of it are read, and where the corpus goes on."""

  def __init__(self, dataset: Documents):
    super().__init__()
    self._dataset = dataset
    self._cache: dict[int, np.ndarray] = {}  # what came first stays: an epoch comes back in the same order
    self._cached_bytes = 0
    self._start = dataset.corpus.start()
    self._begin({'epoch': 0, 'number': 0, 'corpus': None})

  def _begin(self, state: dict) -> None:
    self._state = state
    progress = {**self._start, **(state['corpus'] or {})}
    self._reading = self._dataset.corpus.documents({**progress, 'seen': Deduplicator()})

  def __next__(self) -> dict[str, np.ndarray]:
    while True:
      number, document = self._read()
      if number % self._dataset.num_shards == self._dataset.shard:
        return self._tokenized(number, document)

  def _read(self) -> tuple[int, Document]:
    """The next training document, of any shard, and its number in the epoch."""
    data = self._dataset
    while True:
      read = next(self._reading, None)
      if read is None:
        if self._state['number'] <= data.shard:  # none is this shard's: it would be sought for ever
          raise DataError(f'{data.corpus.name}: {self._state["number"]} document(s) to train on are too few for '
                          f'{data.num_shards} process(es); each needs one')
        self._begin({'epoch': self._state['epoch'] + 1, 'number': 0, 'corpus': None})
        continue
      corpus_state, dealt = read
      for side, document in dealt:
        if document.answer is not None or document.label is not None:
          raise DataError(f'{document.name}: has an answer or a label, which only a token store keeps: set '
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
      [(text, _)] = encode(tokenizer, [document])
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
  """Batches of this host's rows, concatenated and split; its get_state and set_state are exact. Close it when done."""
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
  """A state that was kept as JSON, which makes tuples lists; Grain's packing compares slices with the tuple (0, 0)."""
  if isinstance(state, dict):
    return {key: with_tuples(value) for key, value in state.items()}
  return tuple(map(with_tuples, state)) if isinstance(state, list | tuple) else state
