"""Data passed from Python: texts and documents, which are kept in the run's folder, or batches that are ready."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.batch import Batch
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.files import write_file, writing
from llm_jax.data.chat.records import conversations_of
from llm_jax.data.open import Data
from llm_jax.data.pipeline import Batches
from llm_jax.data.rows.tasks import Features
from llm_jax.data.sources.documents import Document
from llm_jax.data.sources.splits import SPLITS

CHATS = {'messages', 'chosen', 'rejected'}  # keys of conversations
FILE = 'data.jsonl'  # in a run's folder: the documents that it was given


def inspect(data: Any) -> tuple[bool, Any]:
  """(whether the first element is a batch: a Batch, or a dict with `tokens` [B, T]; the same data, all of it).

  Raises DataError for no element, and for batches from an iterator, which a resumed run could not read again.
  """
  first = next(iter(data), None)
  if first is None:
    raise DataError('data: is empty')
  is_batch = isinstance(first, Batch) or (isinstance(first, dict) and np.ndim(first.get('tokens', 0)) == 2)
  if is_batch and isinstance(data, Iterator):
    raise DataError(f'data: {type(data).__name__} of batches can be read only once, and a resumed run reads it again; '
                    'pass a list, a Grain dataset, or an object whose __iter__ starts anew')
  return is_batch, itertools.chain([first], data) if isinstance(data, Iterator) else data


def write_documents(data: Iterable[Any], workdir: Path) -> dict[str, Any]:
  """Writes texts or documents to the run's folder; returns the fields of config.data that read them.

  An element is a text, a Document, or a dict with `text` and perhaps `answer` or `label`, or with `messages`. Raises
  DataError, StorageError.
  """
  lines, fields = [], set[str]()
  for number, element in enumerate(data):
    document = as_fields(element, number)
    fields |= document.keys()
    lines.append(json.dumps(document, ensure_ascii=False))
  path, content = workdir / FILE, '\n'.join(lines) + '\n'
  with writing(f'--workdir: {workdir}'):
    workdir.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != content:  # an untouched file is tokenized once
      write_file(path, content)
  found: dict[str, Any] = {'path': str(path), 'format': 'jsonl', 'field': None if fields & CHATS else 'text',
                           'sha256': None, 'sources': {}}
  return found | {f'{field}_field': field for field in ('answer', 'label') if field in fields and not fields & CHATS}


def as_fields(element: Any, number: int) -> dict[str, Any]:
  """{'text': ...} and perhaps 'answer' and 'label' of one element, or its conversation. Raises DataError."""
  if isinstance(element, str):
    return {'text': element}
  if isinstance(element, Document) and element.messages is not None:
    both = conversations_of(element)
    keys = ('messages',) if len(both) == 1 else ('chosen', 'rejected')
    return {key: [{'role': role, 'content': content} for role, content in turns]
            for key, turns in zip(keys, both, strict=True)}
  if isinstance(element, dict) and element.keys() & CHATS:
    return {name: value for name, value in element.items() if name in {*CHATS, 'prompt'} or isinstance(value, str)}
  if isinstance(element, Document):
    element = {name: getattr(element, name) for name in ('text', 'answer', 'label')}
  if not isinstance(element, dict) or not isinstance(element.get('text'), str):
    raise DataError(f'data: element {number} is {str(element)[:60]!r}; legal are a text, a Document, or a dict with '
                    '`text` and perhaps `answer` or `label`, or with `messages`')
  return {name: element[name] for name in ('text', 'answer', 'label') if element.get(name) is not None}


@dataclasses.dataclass(frozen=True)
class GivenBatches:
  """Batches of all rows, step after step; batch n of a resumed run is what it was.

  A sequence or grain.MapDataset is read by index, again and again; the state of a grain.IterDataset is kept in
  checkpoints; any other iterable is read from its beginning, skipping what was trained on.
  """

  source: Any

  def first(self) -> Features:
    return as_features(next(iter(self.source)))

  def row(self) -> Features:
    """The features of the first row."""
    return {name: x[0] for name, x in self.first().items()}

  def data(self, vocab_size: int | None) -> Data:
    """Data without stores: batches have no validation part. Raises ConfigError without a vocabulary."""
    return Data({split: {} for split in SPLITS}, None, check_shape(self.first(), vocab_size))

  def open(self, rows: np.ndarray, begin: int, states: list[dict] | None, process: int) -> Batches:
    """The rows `rows` of batches begin, begin + 1, ..."""
    import grain
    if isinstance(self.source, grain.IterDataset):
      iterator = iter(self.source.map(lambda batch: pick(batch, rows)))
      if begin and states and states[process] is not None:
        iterator.set_state(states[process])
      return Batches(iterator)
    return Batches(self._batches(rows, begin))

  def _batches(self, rows: np.ndarray, begin: int) -> Iterator[Features]:
    import grain
    if isinstance(self.source, (Sequence, grain.MapDataset)):
      for n in itertools.count(begin):
        yield pick(self.source[n % len(self.source)], rows)
    number = 0
    while True:
      before = number
      for number, batch in enumerate(self.source, start=before + 1):
        if number > begin:
          yield pick(batch, rows)
      if number == before:
        raise DataError(f'data: ended after {number} batches, and more steps are to be trained; give an iterable that '
                        'can be read again, or lower config.num_steps')


def as_features(batch: Any) -> Features:
  """{'tokens': int32 [B, T], 'targets', 'loss_mask', ...} of a batch. Raises DataError without targets."""
  values = batch if isinstance(batch, dict) else {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
  features = {name: np.asarray(x) for name, x in values.items() if x is not None}
  if 'targets' not in features:
    raise DataError('data: a batch needs `tokens` and `targets`, int [B, T], and perhaps `loss_mask`, float [B, T]')
  features.setdefault('loss_mask', np.ones(features['tokens'].shape, np.float32))
  return {name: x.astype(np.int32) if x.dtype.kind in 'iu' else x.astype(np.float32) for name, x in features.items()}


def pick(batch: Any, rows: np.ndarray) -> Features:
  return {name: x[rows] for name, x in as_features(batch).items()}


def check_shape(features: Features, vocab_size: int | None) -> int:
  """The vocabulary of ready batches. Raises ConfigError where the config does not name it."""
  if vocab_size is None:
    raise ConfigError('config.model.vocab_size: set it, as ready batches do not determine how many token ids there are')
  most = max(int(features[name].max()) for name in ('tokens', 'targets'))
  if most >= vocab_size:
    raise ConfigError(f'config.model.vocab_size: {vocab_size}, and the first batch holds token {most}')
  return vocab_size
