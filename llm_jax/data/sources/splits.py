"""Assigns documents to train, val or test while they are read; copies of a document share their split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.sources.documents import Content, Document

SPLITS = ('train', 'val', 'test')


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """How the documents of a path are split into train, val and test.

  document: by a hash of the text, so a document stays in its split when others are added, and duplicates share one.
  tail: val and test are the end of all text; a plain document across a border is cut in two, a pair never.
  count: the first `val_documents` different ones, then `test_documents`. With tail and count too, a copy of a
  validation document is in validation, wherever it stands. auto: document if that gives about 20 validation documents,
  else tail; adding documents may change the choice.
  """

  split: Literal['auto', 'document', 'tail', 'count'] = 'auto'  # by hash, end of the text, number; auto: hash or end
  val_fraction: float = 0.05  # share of the data to validate with, in [0, 1)
  test_fraction: float = 0.0  # share of the data to test with, in [0, 1 - val_fraction)
  val_documents: int = 0  # number of validation documents, for split count
  test_documents: int = 0  # number of test documents, for split count


Cut = tuple[str, int | None]  # (split, end of its part in the document; None: the rest)
_TRAIN: list[Cut] = [('train', None)]


@dataclasses.dataclass(frozen=True)
class Placed:
  """Where documents are that an earlier pass has placed, by their number; further ones by their content."""

  codes: np.ndarray  # uint8 [D], index of the split
  cuts: dict[int, list[Cut]]  # of documents that are in several splits
  by_content: dict[int, list[Cut]]

  def of(self, number: int, document: Document, in_pieces: bool) -> list[Cut]:
    if number < len(self.codes):
      return self.cuts.get(number) or [(SPLITS[self.codes[number]], None)]
    return self.by_content.get(_key(document), _TRAIN) if self.by_content and not in_pieces else _TRAIN


class Splitter:
  """Splits documents in order; a new Splitter with the saved `state` continues."""

  def __init__(self, config: SplitConfig, placed: Placed | None, state: dict | None = None):
    self.config, self.placed = config, placed
    self.state = state or {'seen': 0, 'cuts': _TRAIN, 'at': 0, 'side': ''}

  def deal(self, document: Document, in_pieces: bool = False) -> Iterator[tuple[str, Document]]:
    """(side, document), or its parts where a border cuts it. `in_pieces`: further pieces of the document follow."""
    if not document.continues:
      self._open(document, in_pieces)
    if len(self.state['cuts']) == 1:
      yield self.state['cuts'][0][0], document
      return
    begin, length, done = self.state['at'], size(document), 0
    for side, end in self.state['cuts']:
      taken = (length if end is None else min(end - begin, length)) - done
      if taken <= 0:
        continue
      part = document if taken == length else dataclasses.replace(document, text=document.text[done:done + taken])
      # A further piece starts a new document in a split that does not have the beginning.
      yield side, dataclasses.replace(part, continues=document.continues and not done and side == self.state['side'])
      self.state['side'] = side
      done += taken
    self.state['at'] += length

  def _open(self, document: Document, in_pieces: bool) -> None:
    number = self.state['seen']
    if self.placed is None:
      cuts: list[Cut] = [(self._by_hash(document), None)]
    elif self.config.split == 'tail' and number >= len(self.placed.codes):
      raise DataError(f'{document.name}: there is more text than in the first pass: a file changed while it was read')
    else:
      cuts = self.placed.of(number, document, in_pieces)
    self.state = {'seen': number + 1, 'cuts': cuts, 'at': 0, 'side': ''}

  def _by_hash(self, document: Document) -> str:
    fraction = int.from_bytes(content_hash(document)[:4], 'big') / 2**32
    if fraction < self.config.val_fraction:
      return 'val'
    return 'test' if fraction < self.config.val_fraction + self.config.test_fraction else 'train'


def place(config: SplitConfig, documents: Callable[[], Iterable[tuple[Document, bool]]]) -> Placed | None:
  """Where the documents are. None: each by its hash. `documents` reads (document, whether further pieces follow)."""
  if config.split == 'count':
    return _first(config, documents())
  return _end(config, (document for document, _ in documents())) if config.split == 'tail' else None


def _first(config: SplitConfig, documents: Iterable[tuple[Document, bool]]) -> Placed:
  most, codes, num_in_pieces = config.val_documents + config.test_documents, bytearray(), 0
  by_content: dict[int, list[Cut]] = {}
  for document, in_pieces in documents:
    num_different = num_in_pieces + len(by_content)
    if num_different >= most:
      break
    if document.continues:
      continue
    side = 'val' if num_different < config.val_documents else 'test'
    if in_pieces:
      num_in_pieces += 1
    else:
      [(side, _)] = by_content.setdefault(_key(document), [(side, None)])
    codes.append(SPLITS.index(side))
  return Placed(np.frombuffer(bytes(codes), np.uint8), {}, by_content)


def _end(config: SplitConfig, documents: Iterable[Document]) -> Placed:
  """Places documents from the end on, each with all its copies, until val and test have their sizes.

  A document with copies that does not fit is in train, and the search goes on before it.
  """
  keys, sizes, is_whole, digest = array('Q'), array('q'), bytearray(), hashlib.blake2b(digest_size=8)
  for document in documents:
    if document.continues:
      sizes[-1] += size(document)
    else:
      digest = hashlib.blake2b(digest_size=8)
      sizes.append(size(document))
      keys.append(0)
      is_whole.append(any(x is not None for x in (document.answer, document.label, document.messages)))
    for part in (document.text, *([] if document.answer is None else ['\0', document.answer])):
      digest.update(_bytes(part))
    digest.update(_turns(document))
    keys[-1] = int.from_bytes(digest.digest(), 'big')
  _, kinds, copies = np.unique(np.asarray(keys), return_inverse=True, return_counts=True)
  val_begin, test_begin, end = borders(sum(sizes), config.val_fraction, config.test_fraction)
  code_of, cuts = np.zeros(len(copies), np.uint8), dict[int, list[Cut]]()  # code_of: by kind, train at first
  first_skipped = None
  for index in range(len(keys) - 1, -1, -1):
    kind = kinds[index]
    if end <= val_begin:
      break
    if code_of[kind]:
      continue
    count = int(copies[kind])
    begin = end - sizes[index] * count
    if count == 1 and not is_whole[index]:
      code_of[kind] = 2 if end > test_begin else 1
      inside: list[Cut] = [(side, mark - begin) for side, mark in (('train', val_begin), ('val', test_begin))
                           if begin < mark < end]
      if inside:
        cuts[index] = [*inside, (SPLITS[code_of[kind]], None)]
    elif begin >= val_begin:
      code_of[kind] = 2 if begin >= test_begin else 1
    elif count == 1:
      break
    else:
      first_skipped = index if first_skipped is None else first_skipped
      continue
    end = begin
  if first_skipped is not None and not code_of.any() and not is_whole[first_skipped]:  # cut all copies the same
    room = max(1, (end - val_begin) // int(copies[kinds[first_skipped]]))
    for index in np.flatnonzero(kinds == kinds[first_skipped]).tolist():
      cuts[index] = [('train', sizes[first_skipped] - room), ('val', None)]
  return Placed(code_of[kinds], cuts, {})


def _key(document: Document) -> int:
  return int.from_bytes(content_hash(document)[:8], 'big')


def borders(total: int, val_fraction: float, test_fraction: float) -> tuple[int, int, int]:
  """The ends of train, val and test; the size of train is rounded down."""
  val_begin = int(round(total * (1 - val_fraction - test_fraction), 6))  # 1e8 * (1 - .05 - .05) is 9e7, not 1 less
  return val_begin, total - round(total * test_fraction), total


def size(document: Document) -> int:
  """Characters, or ids."""
  return len(document.text) + len(document.answer if document.answer is not None else '')


def content_hash(document: Document) -> bytes:
  """sha256 of text and answer, and of the turns of a conversation; independent of name and place."""
  digest = hashlib.sha256(_bytes(document.text))
  digest.update(b'\0')
  digest.update(_bytes(document.answer if document.answer is not None else ''))
  digest.update(_turns(document))
  return digest.digest()


def _turns(document: Document) -> bytes:
  """The roles and contents of a conversation, as its text lacks roles and borders; of other documents, nothing."""
  return b'' if document.messages is None else json.dumps([document.messages, document.rejected]).encode()


def _bytes(content: Content) -> bytes:
  return (content.encode(errors='surrogatepass') if isinstance(content, str) else
          np.asarray(content, np.int64).tobytes())
