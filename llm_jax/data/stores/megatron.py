"""Megatron's indexed data sets: NAME.bin holds the ids, NAME.idx their type, the sequences and the documents.

NAME.idx, little-endian: 'MMIDIDX' and two zero bytes, uint64 version 1, uint8 type, uint64 number of sequences S,
uint64 number of document borders D, int32 [S] lengths, int64 [S] positions in bytes, int64 [D] first sequence of each
document, the last of which is S.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.base.notes import print_once

MAGIC = b'MMIDIDX\x00\x00'
DTYPES = {1: 'uint8', 2: 'int8', 3: 'int16', 4: 'int32', 5: 'int64', 6: 'float64', 7: 'float32', 8: 'uint16'}
_HEADER = struct.Struct('<9sQBQQ')


def index_of(path: Path) -> Path | None:
  """The .idx beside a .bin, if there is one."""
  index = path.with_suffix('.idx')
  return index if path.suffix == '.bin' and index.is_file() else None


def read_index(index: Path, path: Path) -> tuple[str, np.ndarray | None]:
  """(type of the ids in `path`, int64 [documents]: where each starts; None: the index lists no sequences).

  Raises DataError for an index that is damaged, or that contradicts the size of `path`.
  """
  data = np.memmap(index, np.uint8, mode='r') if index.stat().st_size else np.zeros(0, np.uint8)
  if len(data) < _HEADER.size or bytes(data[:len(MAGIC)]) != MAGIC:
    raise DataError(f'{index}: not an index of Megatron, which begins with MMIDIDX; move it away to read {path.name} '
                    'without it')
  _, version, code, num_sequences, num_borders = _HEADER.unpack(data[:_HEADER.size].tobytes())
  dtype = DTYPES.get(code, '')
  if version != 1 or np.dtype(dtype or 'f').kind not in 'iu':
    raise DataError(f'{index}: version {version} with type {code} {dtype}; known are version 1 with types of integers: '
                    f'{", ".join(f"{n} {name}" for n, name in DTYPES.items() if "float" not in name)}')
  if not num_sequences:
    print_once(f'data: {index}: lists no sequences; {path.name} is read as {dtype}, as it says, in one document')
    return dtype, None
  expected = _HEADER.size + num_sequences * 12 + num_borders * 8
  if len(data) not in (expected, expected + num_sequences):  # a mode follows for each sequence of several media
    raise DataError(f'{index}: {num_sequences} sequences and {num_borders} document borders take {expected} bytes; the '
                    f'file has {len(data)}: it is damaged; get it again with {path.name}')

  def column(kind: str, count: int, begin: int) -> np.ndarray:
    return np.frombuffer(data, kind, count, begin)

  lengths = column('<i4', num_sequences, _HEADER.size)
  positions = column('<i8', num_sequences, _HEADER.size + num_sequences * 4)
  borders = column('<i8', num_borders, _HEADER.size + num_sequences * 12)
  begins = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
  itemsize, size = np.dtype(dtype).itemsize, path.stat().st_size
  if lengths.min() < 0 or begins[-1] * itemsize != size:
    raise DataError(f'{index}: its sequences hold {begins[-1]} ids of {dtype}, which take {begins[-1] * itemsize} '
                    f'bytes; {path.name} has {size}: the two do not belong together')
  if not np.array_equal(positions, begins[:-1] * itemsize):
    raise DataError(f'{index}: its sequences do not follow one another in {path.name}; write the data set again')
  if not num_borders or borders[0] != 0 or borders[-1] != num_sequences or (np.diff(borders) < 0).any():
    raise DataError(f'{index}: its document borders are not ascending from 0 to {num_sequences}: it is damaged; get it '
                    f'again with {path.name}')
  starts = np.unique(begins[borders[:-1]])  # an empty document has no token
  return dtype, starts[starts < begins[-1]]
