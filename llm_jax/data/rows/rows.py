"""Rows: random access to a token store that is cut into rows of a batch, in a fixed order.

A row is a list of pieces. A piece is part of a document, with n targets: ids[1:] predicted from ids[:-1]. Packings:
  concat    windows over the concatenated documents; a document is cut where a window ends
  best_fit  whole documents, several per row, with hardly any padding
  pad       one document per row
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from llm_jax.data.rows.packing import best_fit

PACKINGS = ('concat', 'best_fit', 'pad')


class Store(Protocol):
  """The parts of a token store that rows use."""

  @property
  def tokens(self) -> Any:
    """Supports len() and slices."""

  @property
  def starts(self) -> np.ndarray:
    """int64 [D], ascending, 0 first."""

  @property
  def answers(self) -> np.ndarray | None:
    """int64 [D]: offset of the answer in its document."""

  @property
  def labels(self) -> np.ndarray | None:
    """float64 [D] or [D, C]."""


@dataclasses.dataclass(frozen=True)
class Piece:
  ids: np.ndarray  # int32 [n + 1]
  answer: int | None = None  # index in ids of the answer's first token, 1 or more
  label: np.ndarray | None = None  # float64 [] or [C]
  document: int = 0
  learnt: np.ndarray | None = None  # bool [n + 1], of conversations: the ids to learn
  second: int | None = None  # of a pair of conversations: the index in ids where the rejected one begins


Row = list[Piece]


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of `seq_len` targets, `stride` apart, over the whole store: with stride = seq_len each token but the
  first is a target exactly once. The first token of a document is the last target of the piece before it. `end` stands
  after the last token, as a target."""

  store: Store
  seq_len: int
  stride: int
  dropped_tokens: int = 0
  end: int | None = None

  @property
  def num_targets(self) -> int:
    return max(0, len(self.store.tokens) - 1 + (self.end is not None))

  def __len__(self) -> int:
    if not self.num_targets:
      return 0
    return 1 + max(0, -(-(self.num_targets - self.seq_len) // self.stride))

  def __getitem__(self, index: int) -> Row:
    return self.at(index * self.stride)

  def at(self, begin: int) -> Row:
    window = np.asarray(self.store.tokens[begin:begin + self.seq_len + 1], np.int32)
    if self.end is not None and begin + self.seq_len >= len(self.store.tokens):
      window = np.append(window, np.int32(self.end))
    starts = self.store.starts
    first = int(starts.searchsorted(begin, 'right'))
    cuts = starts[first:int(starts.searchsorted(begin + len(window) - 1))] - begin
    row, last = [], 0
    for document, cut in enumerate([*cuts.tolist(), len(window) - 1], first - 1):
      if cut > last:  # .bin files may hold documents without tokens
        row.append(Piece(window[last:cut + 1], document=document))
      last = cut
    return row


def missing_end(store: Store, bos_id: int | None, eos_id: int | None) -> int | None:
  """The eos after a store's last document, where the store does not hold it: one special token starts and ends
  documents, and those before end with the one that starts the next. None for a document that goes on elsewhere.
  """
  if eos_id is None or bos_id != eos_id or not len(store.tokens) or getattr(store, 'cut', False):
    return None
  start, last = int(store.starts[-1]), len(store.tokens) - 1
  ids = [int(store.tokens[place:place + 1][0]) for place in (start, last)] if start < last else []
  return eos_id if ids and ids[0] == bos_id and ids[1] != eos_id else None


@dataclasses.dataclass(frozen=True)
class Packed:
  """Rows of whole documents, or of chunks of documents longer than a row; takes 16 bytes per piece.

  Piece p has `sizes[p]` targets, from begins[p] + 1 on; row r has the pieces [ends[r - 1], ends[r]).
  """

  store: Store
  begins: np.ndarray  # int64 [P]: position in the store of each piece's first input token
  sizes: np.ndarray  # int32 [P]
  documents: np.ndarray  # int32 [P]
  ends: np.ndarray | None  # int64 [R]; None: one piece per row
  answers: np.ndarray | None  # the store's, if the task uses answers
  bos_id: int | None  # put at the start of pieces whose beginning was cut; None: nothing is
  eos_id: int | None  # added to the end of each document; None: the store holds it already, or there is none
  dropped_tokens: int  # targets of the store that are in no row
  learnt: Any = None  # the store's, if the task uses it
  seconds: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.sizes if self.ends is None else self.ends)

  def __getitem__(self, index: int) -> Row:
    if self.ends is None:
      return [self._piece(index)]
    pieces = range(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
    return [self._piece(p) for p in sorted(pieces, key=self.begins.__getitem__)]

  def _piece(self, p: int) -> Piece:
    store, begin, size, document = self.store, int(self.begins[p]), int(self.sizes[p]), int(self.documents[p])
    start = int(store.starts[document])
    stop = int(store.starts[document + 1]) if document + 1 < len(store.starts) else len(store.tokens)
    ids = np.zeros(size + 1, np.int32)
    stored = min(size + 1, stop - begin)
    ids[:stored] = store.tokens[begin:begin + stored]
    if stored <= size and self.eos_id is not None:
      ids[stored] = self.eos_id
    if self.bos_id is not None and begin > start:
      ids[0] = self.bos_id
    answer = None if self.answers is None else max(1, int(self.answers[document]) - (begin - start))
    learnt = None if self.learnt is None else np.asarray(self.learnt[begin:begin + size + 1], bool)
    second = None if self.seconds is None else int(self.seconds[document])
    return Piece(ids, answer, None if store.labels is None else store.labels[document], document, learnt, second)


def pack(store: Store, packing: str, truncate: str, capacity: int, *, row_size: int, overhead: int = 0,
         answers: np.ndarray | None = None, least: int = 1, bos_id: int | None, eos_id: int | None) -> Packed:
  """Packs documents into rows of `row_size`, as pieces of at most `capacity` targets plus `overhead` places each.

  `truncate` is how longer documents are handled: 'split' makes several pieces; 'left' cuts the beginning (the rest
  starts with bos_id), 'right' the end, both counted in `dropped_tokens`. With `answers`, 'left' cuts the prompt first
  and then the answer's end, and 'right' drops pairs whose prompt alone fills the piece. Documents of fewer than `least`
  targets are dropped.
  """
  virtual_eos = eos_id if bos_id is not None and bos_id == eos_id else None
  starts = store.starts
  targets = np.append(starts[1:], len(store.tokens)) - starts - (virtual_eos is None)
  if truncate == 'split':
    documents, begins, sizes = _chunks(starts, targets, capacity, least)
  else:
    cut = np.minimum(targets, capacity)
    skipped = targets - cut if truncate == 'left' else np.zeros_like(targets)
    if answers is not None:
      prompts = np.maximum(answers - 1, 0)  # targets before the answer
      skipped = np.minimum(skipped, prompts)
      cut = np.where(cut + skipped > prompts, cut, -1)
    documents = np.flatnonzero(cut >= least)
    begins, sizes = (starts + skipped)[documents], cut[documents]
  dropped = int(targets[targets > 0].sum() - sizes.sum())
  return arrange(store, documents, begins, sizes, packing, row_size, overhead, answers=answers,
                 bos_id=bos_id if truncate == 'left' else None, eos_id=virtual_eos, dropped_tokens=dropped)


def arrange(store: Store, documents: np.ndarray, begins: np.ndarray, sizes: np.ndarray, packing: str, row_size: int,
            overhead: int = 0, *, dropped_tokens: int, answers: np.ndarray | None = None, bos_id: int | None = None,
            eos_id: int | None = None, **columns: Any) -> Packed:
  """Rows of pieces: one a row for packing pad, several for best_fit. `columns`: further fields of Packed."""
  many = len(store.starts) >= 1 << 31
  documents, sizes, ends = documents.astype(np.int64 if many else np.int32), sizes.astype(np.int32), None
  if packing == 'best_fit':
    order, ends = best_fit(sizes + overhead, row_size)
    begins, sizes, documents = begins[order], sizes[order], documents[order]
  return Packed(store, begins, sizes, documents, ends, answers, bos_id, eos_id, dropped_tokens, **columns)


def _chunks(starts: np.ndarray, targets: np.ndarray, capacity: int,
            least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(documents, begins, sizes) of all pieces; a piece starts at the last target of the piece before it."""
  num_chunks = np.where(targets >= least, np.maximum(-(-targets // capacity), 1), 0)
  documents = np.repeat(np.arange(len(starts)), num_chunks)
  nth = np.arange(len(documents)) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
  return documents, starts[documents] + nth * capacity, np.minimum(capacity, targets[documents] - nth * capacity)
