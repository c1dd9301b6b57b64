"""Assigns documents to train, val or test while they are read; the state is a few numbers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.sources.documents import Document

SPLITS = ('train', 'val', 'test')


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """How the documents of a path are split into train, val and test.

  document: by a hash of the text, so a document stays in its split when others are added, and duplicates share one.
  tail: val and test are the end of all text; a plain document across a border is cut in two, a pair never.
  count: the first `val_documents`, then `test_documents`. auto: document if that gives about 20 validation documents,
  else tail; adding documents may change the choice.
  """

  split: Literal['auto', 'document', 'tail', 'count'] = 'auto'  # by hash, end of the text, number; auto: hash or end
  val_fraction: float = 0.05  # share of the data to validate with, in [0, 1)
  test_fraction: float = 0.0  # share of the data to test with, in [0, 1 - val_fraction)
  val_documents: int = 0  # number of validation documents, for split count
  test_documents: int = 0  # number of test documents, for split count


class Splitter:
  """Splits documents in order; a new Splitter with the saved `state` continues."""

  def __init__(self, config: SplitConfig, total: int, state: dict | None = None):
    self.config, self.state = config, state or {'seen': 0, 'side': 'train'}
    self._borders = dict(zip(SPLITS, borders(total, config.val_fraction, config.test_fraction), strict=True))

  def deal(self, document: Document) -> Iterator[tuple[str, Document]]:
    """(side, document), or its two parts where a border cuts it."""
    if self.config.split == 'tail':
      yield from self._tail(document)
      return
    if not document.continues:
      self.state['side'] = self._by_hash(document) if self.config.split == 'document' else self._by_count()
    yield self.state['side'], document

  def _by_hash(self, document: Document) -> str:
    fraction = int.from_bytes(content_hash(document)[:4], 'big') / 2**32
    if fraction < self.config.val_fraction:
      return 'val'
    return 'test' if fraction < self.config.val_fraction + self.config.test_fraction else 'train'

  def _by_count(self) -> str:
    self.state['seen'] += 1
    if self.state['seen'] <= self.config.val_documents:
      return 'val'
    return 'test' if self.state['seen'] <= self.config.val_documents + self.config.test_documents else 'train'

  def _tail(self, document: Document) -> Iterator[tuple[str, Document]]:
    begin, length = self.state['seen'], size(document)
    self.state['seen'] += length
    whole = any(x is not None for x in (document.answer, document.label, document.messages))
    done = 0
    for side in SPLITS:
      room = self._borders[side] - begin - done
      if room <= 0 or done == length:
        continue
      taken = length - done if whole else min(length - done, room)
      part = document if taken == length else dataclasses.replace(document, text=document.text[done:done + taken])
      # A further piece starts a new document in a split that does not have the beginning.
      yield side, dataclasses.replace(part, continues=document.continues and not done and side == self.state['side'])
      self.state['side'] = side
      done += taken
    if done < length:
      raise DataError(f'{document.name}: there is more text than in the first pass: a file changed while it was read')


def borders(total: int, val_fraction: float, test_fraction: float) -> tuple[int, int, int]:
  """The ends of train, val and test; the size of train is rounded down."""
  val_begin = int(round(total * (1 - val_fraction - test_fraction), 6))  # 1e8 * (1 - .05 - .05) is 9e7, not 1 less
  return val_begin, total - round(total * test_fraction), total


def size(document: Document) -> int:
  """Characters, or ids."""
  return len(document.text) + len(document.answer if document.answer is not None else '')


def content_hash(document: Document) -> bytes:
  """sha256 of text and answer, independent of name and place."""
  parts = (document.text, document.answer if document.answer is not None else '')
  return hashlib.sha256(b'\0'.join(
      p.encode(errors='surrogatepass') if isinstance(p, str) else np.asarray(p, np.int64).tobytes()
      for p in parts)).digest()
