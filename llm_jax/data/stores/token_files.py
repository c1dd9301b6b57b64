"""Flat `.bin` token files: nanoGPT's (ids), llm.c's (a header of 256 int32, uint16 or uint32), Megatron's (an .idx)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.data.stores.checks import BlockChecks
from llm_jax.data.stores.megatron import index_of, read_index

# The first int32 of a header; llm.c data files: 20240520 for GPT-2's uint16, 20240801 for Llama 3's uint32.
LLMC_MAGIC = {20240520: 'uint16', 20240801: 'uint32'}
DTYPES = ('uint8', 'uint16', 'int16', 'uint32', 'int32', 'int64')
_HEADER_BYTES = 256 * 4
_PIECE = 1 << 20
_SAMPLE = 1 << 12  # ids


@dataclasses.dataclass(frozen=True)
class TokenFile:
  """A flat array in a file, memory-mapped on first use; pickling keeps its path and offset, not its data."""

  path: Path
  dtype: str
  size: int
  offset: int = 0  # bytes
  starts: np.ndarray | None = None  # int64: where documents start, if the file's index says so
  checks: BlockChecks | None = None  # of a part of a store, before its first use

  def read(self, begin: int, end: int) -> np.ndarray:
    """The ids [begin, end). Raises DataError for a part that differs from its checksum."""
    if self.checks is not None:
      self.checks.before(self._bytes, begin * self.array.itemsize, end * self.array.itemsize)
    return self.array[begin:end]

  def wait_for_checks(self) -> None:
    """Waits for the thread that checks the store, at most a minute. Raises DataError."""
    if self.checks is not None:
      self.checks.problem.wait()

  @cached_property
  def _bytes(self) -> np.ndarray:
    return self.array.view(np.uint8)

  @cached_property
  def array(self) -> np.ndarray:
    if not self.size:
      return np.zeros(0, self.dtype)
    # A plain array: a slice of an np.memmap is an np.memmap again, and making that costs more than reading the slice.
    return np.asarray(np.memmap(self.path, self.dtype, mode='r', offset=self.offset, shape=(self.size,)))

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name not in ('array', '_bytes')}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)


def open_bin(path: Path, dtype: str | None) -> TokenFile:
  """Opens a .bin file. Raises DataError when it is missing, empty, or its size contradicts its header."""
  if dtype is not None and dtype not in DTYPES:
    raise ConfigError(f'config.data.dtype: {dtype!r} is not one of {", ".join(DTYPES)}')
  if not path.is_file():
    raise DataError(f'{path}: no such token file')
  if (index := index_of(path)) is not None:
    found, starts = read_index(index, path)
    if dtype not in (None, found):
      raise ConfigError(f'config.data.dtype: {dtype}, but {index} says {found}; set it to None')
    return TokenFile(path, found, path.stat().st_size // np.dtype(found).itemsize, 0, starts)
  size = path.stat().st_size
  header = np.fromfile(path, '<i4', count=3)
  if header.size == 3 and int(header[0]) in LLMC_MAGIC:
    token_dtype = np.dtype(LLMC_MAGIC[int(header[0])])
    expected = _HEADER_BYTES + int(header[2]) * token_dtype.itemsize
    if size != expected:
      raise DataError(f'{path}: the header says {header[2]} tokens, which take {expected} bytes; the file has {size}')
    return TokenFile(path, token_dtype.name, int(header[2]), _HEADER_BYTES)
  token_dtype = np.dtype(dtype or 'uint16')
  if not size or size % token_dtype.itemsize:
    raise DataError(f'{path}: {size} bytes is not a positive multiple of the size of {token_dtype}; set '
                    'config.data.dtype to the type of its token ids')
  file = TokenFile(path, token_dtype.name, size // token_dtype.itemsize)
  if dtype is None:
    _check_width(file)
  return file


def _check_width(file: TokenFile) -> None:
  """Raises DataError for wider ids that are read as uint16: every second place holds a high half, 0 or nearly so."""
  begins = np.linspace(0, max(0, file.size - _SAMPLE), 8, dtype=np.int64) // 4 * 4
  sample = np.concatenate([file.array[begin:begin + _SAMPLE // 4 * 4] for begin in begins])
  if len(sample) < 64:
    return
  places = sample[:len(sample) // 4 * 4].reshape(-1, 4)
  low, high = places[:, ::2].max(), places[:, 1::2].max()
  if (high == 0 and low > 0) or (high <= 15 and low > 255):
    wide = 'int32' if places[:, 2].any() else 'int64'
    raise DataError(f'{file.path}: read as uint16, every second id is {f"{high} or less" if high else 0}: its ids seem '
                    f'to be {wide}; set config.data.dtype={wide}, or uint16 if they are not')


def document_starts(tokens: np.ndarray, eot_id: int | None) -> np.ndarray:
  """Positions where documents start, int64: 0 and each `eot_id`. If `eot_id` is None, all is one document."""
  return np.zeros(1, np.int64) if eot_id is None else np.union1d([0], np.flatnonzero(tokens == eot_id))


def sampled_sha256(tokens: np.ndarray) -> str:
  """sha256 of the length and 256 evenly spaced blocks: identifies a file of any size in milliseconds."""
  digest = hashlib.sha256(str(len(tokens)).encode())
  for begin in np.linspace(0, max(0, len(tokens) - 4096), 256, dtype=np.int64):
    digest.update(tokens[begin:begin + 4096].tobytes())
  return digest.hexdigest()


def bin_file(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """Documents of a .bin, in pieces; for a .bin among other files, which is copied into a store instead of mapped."""
  opened = open_bin(file.path, config.dtype)
  tokens = opened.array
  starts = document_starts(tokens, config.eot_id) if opened.starts is None else opened.starts
  for number, (begin, end) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True), 1):
    for piece in range(begin, end, _PIECE):
      ids = np.asarray(tokens[piece:min(piece + _PIECE, end)], np.int64)
      yield Document(f'{file.name}:{number}', ids, continues=piece > begin)


def megatron_index(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """No documents: an index is read with the .bin beside it. Raises DataError without one."""
  del config
  if not file.path.with_suffix('.bin').is_file():
    raise DataError(f'{file.path}: an index of token ids, and {file.path.stem}.bin is not beside it')
  return iter(())


def raw_bytes(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """Any file as one document of its bytes, ids 0 to 255."""
  del config
  with open(file.path, 'rb') as f:
    first = True
    while chunk := f.read(_PIECE):
      yield Document(file.name, np.frombuffer(chunk, np.uint8), continues=not first)
      first = False
