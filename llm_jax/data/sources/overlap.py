"""How many held-out documents are also in train: exactly, and normalized (case and white space left out)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from llm_jax.data.sources.documents import Content, Document

ENDING = '.keys'  # of the files beside an unfinished store, uint64 [D, 2]: normalized and exact
_LOWER = bytes(range(256)).lower()
_WHITE = b' \t\n\r\v\f'
_STEP = 1 << 20  # documents compared at once
_SLICE = 1 << 13  # characters


def normalized(content: Content) -> bytes:
  """The bytes of a text without its case and white space; of ids, all."""
  if not isinstance(content, str):
    return np.asarray(content, '<i8').tobytes()
  if content.isascii():
    return content.encode().translate(_LOWER, _WHITE)
  slices = (content[i:i + _SLICE] for i in range(0, len(content), _SLICE))  # as splitting takes much memory
  return b''.join(''.join(part.casefold().split()).encode('utf-8', 'surrogatepass') for part in slices)


def keys(documents: Iterable[Document]) -> np.ndarray:
  """The keys of the documents, uint64 [D, 2]; of one in pieces, of its first piece."""
  found = []
  for document in documents:
    if not document.continues:
      near, exact = xxhash.xxh3_64(), xxhash.xxh3_64()
      for part in (document.text, document.answer):
        if part is not None:
          short = normalized(part)
          near.update(len(short).to_bytes(8, 'little'))
          near.update(short)
          exact.update(part.encode('utf-8', 'surrogatepass') if isinstance(part, str) else short)
      found.append((near.intdigest(), near.intdigest() ^ exact.intdigest()))
  return np.array(found, np.uint64).reshape(-1, 2)


def compare(column: Callable[[str], np.ndarray]) -> dict[str, dict[str, int]]:
  """{split: counts} of val and test. `column(name)`: the keys in the file of that name, flat."""
  train, counts = column(f'train{ENDING}').reshape(-1, 2), {}
  for split in ('val', 'test'):
    held = np.array(column(f'{split}{ENDING}').reshape(-1, 2))
    found = np.zeros(held.shape, bool)
    for begin in range(0, len(train), _STEP):
      part = train[begin:begin + _STEP]
      for kind in (0, 1):
        found[:, kind] |= np.isin(held[:, kind], part[:, kind])
    if len(held):
      near, exact = found.sum(0).tolist()
      counts[split] = {'documents': len(held), 'exact': exact, 'normalized': near}
  return counts


def lines(counts: dict[str, dict[str, int]]) -> list[str]:
  """One line for each split."""
  return [f'{split}: of {c["documents"]:,} documents, also in train: {c["exact"]:,} exactly, '
          f'{c["normalized"]:,} normalized (case, white space)' for split, c in counts.items()]
