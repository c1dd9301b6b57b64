"""Readers of arrays: NumPy's .npy and .npz, HDF5. Integers are token ids, strings are texts."""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.compression import codec_of, open_stream
from llm_jax.data.formats.records import content
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.extras.compression import expands_too_much

_PIECE_BYTES = 1 << 20  # read from the file at once
_MAX_CHUNK_BYTES = 256 << 20  # limit for chunks of an HDF5 data set, which are held in memory one at a time


def npy(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """Integers [n]: one document; [m, n]: one per row; strings [n]: one each. Read in pieces, never unpickled."""
  with _numpy_errors(file), open_stream(file.path) as stream:
    size = file.path.stat().st_size if codec_of(file.path) is None else None
    yield from _array(file, config, stream, size)


def npz(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """The array that config.field names, or the only one, as npy reads it."""
  with _numpy_errors(file), zipfile.ZipFile(file.path) as archive:
      members = {info.filename.removesuffix('.npy'): info for info in archive.infolist()}
      info = members[_only(file, list(members), config)]
      if expands_too_much(info.compress_size, info.file_size):
        raise DataError(f'{file.path}: {info.filename} expands from {info.compress_size} to {info.file_size} bytes, '
                        'like a bomb; if you trust it, save it with numpy.savez, which does not compress')
      with archive.open(info) as stream:
        yield from _array(file, config, stream, info.file_size)


def _array(file: File, config: SourceConfig, stream: IO[bytes], size: int | None) -> Iterator[Document | BadRecord]:
  """Documents of one array in .npy format; `size`: bytes of the stream, if known."""
  version = np.lib.format.read_magic(stream)
  read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
  if read_header is None:
    raise DataError(f'{file.path}: .npy version {version} is for arrays with named fields; save one field as an array')
  shape, fortran_order, dtype = read_header(stream)
  if dtype.hasobject:
    raise DataError(f'{file.path}: holds Python objects, which need unpickling, and that runs code; save it with '
                    'a dtype of integers or strings')
  if dtype.kind not in 'iuSU' or not (len(shape) == 1 or (len(shape) == 2 and dtype.kind in 'iu')):
    raise DataError(f'{file.path}: an array of {dtype} {list(shape)}; it must hold integers [n] or [m, n], '
                    'or strings [n]')
  if fortran_order and len(shape) == 2 and min(shape) > 1:
    raise DataError(f'{file.path}: stored in Fortran order; save numpy.ascontiguousarray(array) instead')
  row_items = shape[1] if len(shape) == 2 else 1
  row_bytes, stated = row_items * dtype.itemsize, stream.tell() + math.prod(shape) * dtype.itemsize
  if size is not None and stated != size:
    raise DataError(f'{file.path}: {dtype} {list(shape)} takes {stated} bytes; the file has {size}: it is '
                    f'{"truncated" if size < stated else "followed by something else"}; get it again')
  if not row_bytes:
    raise DataError(f'{file.path}: {dtype} {list(shape)} has rows of 0 bytes')
  blocks = _blocks(file, stream, shape[0], row_bytes, dtype)
  if dtype.kind in 'SU':
    yield from _documents(file, (x for block in blocks for x in _texts(block)), 'item', config.max_record_bytes)
  elif len(shape) == 2:
    rows = (row for block in blocks for row in block.reshape(-1, row_items))
    yield from _documents(file, rows, 'row', config.max_record_bytes)
  else:
    yield from _long_ids(file, blocks)


def _texts(block: np.ndarray) -> Iterator[str | bytes | BadRecord]:
  """Items of an array of strings; a BadRecord for items with numbers beyond Unicode, which NumPy would let pass."""
  if block.dtype.kind == 'S':
    yield from block.tolist()
    return
  codes = block.view(np.dtype('u4').newbyteorder(block.dtype.byteorder)).reshape(len(block), -1)
  is_bad = codes.max(axis=1, initial=0) > 0x10FFFF
  for begin, end in itertools.pairwise([0, *np.flatnonzero(np.diff(is_bad)) + 1, len(block)]):
    if is_bad[begin]:
      yield from [BadRecord('', 'it holds a number that is not a character')] * (end - begin)
    else:
      yield from block[begin:end].tolist()


def _blocks(file: File, stream: IO[bytes], num_rows: int, row_bytes: int, dtype: np.dtype) -> Iterator[np.ndarray]:
  """The items, some rows at a time. Raises DataError when the stream is too short or too long."""
  at_once = max(1, _PIECE_BYTES // row_bytes)
  for begin in range(0, num_rows, at_once):
    wanted = min(at_once, num_rows - begin) * row_bytes
    data = stream.read(wanted)
    if len(data) < wanted:
      raise DataError(f'{file.path}: truncated: it ends in row {begin + len(data) // row_bytes + 1} of {num_rows}; '
                      'get the file again')
    yield np.frombuffer(data, dtype)
  if stream.read(1):
    raise DataError(f'{file.path}: more follows the array of {num_rows} rows')


def _long_ids(file: File, blocks: Iterable[np.ndarray]) -> Iterator[Document | BadRecord]:
  """One document, in pieces."""
  begin = 0
  for block in blocks:
    try:
      ids = content(block, f'the piece from item {begin} on', 1 << 62)
    except ValueError as e:
      yield BadRecord(str(file.path), str(e))
      return
    yield Document(file.name, ids, continues=begin > 0)
    begin += len(block)


def hdf5(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """The data set whose path in the file is config.field, or the only one.

  Strings [n], of fixed or variable length: one document each; integers [n]: one document, in pieces; integers [m, n]
  and ragged integers (of variable length) [n]: one per row.

  A truncated file is always an error. A flipped bit inside values of variable length, which have no checksum, may go
  unnoticed, and can even hang the HDF5 library.
  """
  try:
    import h5py
  except ImportError:
    raise ConfigError("HDF5 files need the package h5py: pip install 'llm_jax[data]'") from None
  try:
    with h5py.File(file.path, 'r') as archive:
      names: list[str] = []
      archive.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
      data = archive[_only(file, names, config)]
      _check_hdf5(file, data)
      yield from _hdf5_documents(file, config, data, h5py)
  except FileNotFoundError:
    raise DataError(f'{file.path}: no such file') from None
  except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as e:
    raise DataError(f'{file.path}: damaged or truncated, or not HDF5: {e}') from None


def _hdf5_documents(file: File, config: SourceConfig, data: Any, h5py: Any) -> Iterator[Document | BadRecord]:
  vlen = h5py.check_vlen_dtype(data.dtype)
  is_text = h5py.check_string_dtype(data.dtype) is not None
  is_ids = data.dtype.kind in 'iu' or (vlen is not None and np.dtype(vlen).kind in 'iu')
  if not (is_text or is_ids) or data.ndim not in ((1, 2) if data.dtype.kind in 'iu' else (1,)):
    raise DataError(f'{file.path}: {data.name} is {data.dtype} {list(data.shape)}; it must be integers [n] or '
                    '[m, n], or strings or ragged integers [n]')
  if data.dtype.kind == 'O':
    _check_lengths(file, data)
  row_bytes = data.dtype.itemsize * math.prod(data.shape[1:])
  # The size of ragged rows is unknown before they are read.
  at_once = 64 if data.dtype.kind == 'O' else max(1, _PIECE_BYTES // max(1, row_bytes))
  blocks = (data[begin:begin + at_once] for begin in range(0, len(data), at_once))
  if data.ndim == 1 and data.dtype.kind in 'iu':
    yield from _long_ids(file, blocks)
  else:
    yield from _documents(file, (x for block in blocks for x in block), 'row', config.max_record_bytes)


def _check_hdf5(file: File, data: Any) -> None:
  """Raises DataError for a data set that is stored in another file, incomplete, or a decompression bomb."""
  where = f'{file.path}: {data.name}'
  if data.external or data.is_virtual:
    raise DataError(f'{where} is stored in another file; copy it into this one with h5repack, or use that file')
  stored = data.id.get_storage_size()
  if data.size and not stored:
    raise DataError(f'{where} was never written')
  if data.chunks is None and stored < data.nbytes:
    raise DataError(f'{where} is damaged: {data.nbytes} bytes are stated and {stored} stored')
  if data.chunks is not None:
    num_chunks = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
    if data.id.get_num_chunks() < num_chunks:
      raise DataError(f'{where} is incomplete: {data.id.get_num_chunks()} of {num_chunks} chunks were written')
    if math.prod(data.chunks) * data.dtype.itemsize > _MAX_CHUNK_BYTES:
      raise DataError(f'{where} has chunks {list(data.chunks)}, above {_MAX_CHUNK_BYTES >> 20} MB each; use h5repack')
  if expands_too_much(stored, data.nbytes):
    raise DataError(f'{where} expands from {stored} to {data.nbytes} bytes, like a bomb; if you trust it, '
                    'decompress it with h5repack -f NONE')


def _check_lengths(file: File, data: Any) -> None:
  """Raises DataError for a ragged row longer than the file, for which HDF5 would allocate memory unchecked.

  A row's entry is uint32 length, uint64 address, uint32 index; entries are checked only if stored without filters.
  """
  size, num_rows = file.path.stat().st_size, data.size
  if data.chunks is None:
    parts = [(data.id.get_offset(), data.id.get_storage_size())]
  else:
    chunks = [data.id.get_chunk_info(i) for i in range(data.id.get_num_chunks())]
    parts, num_rows = [(chunk.byte_offset, chunk.size) for chunk in chunks], data.chunks[0] * len(chunks)
  is_plain = data.id.get_create_plist().get_nfilters() == 0 and data.file.userblock_size == 0
  if not is_plain or sum(num_bytes for _, num_bytes in parts) != 16 * num_rows:
    return
  with open(file.path, 'rb') as stream:
    for offset, num_bytes in parts:
      if offset is None:  # stored in the header of the data set
        continue
      stream.seek(offset)
      lengths = np.frombuffer(stream.read(num_bytes), '<u4')[::4]
      if lengths.size and lengths.max() > size:
        raise DataError(f'{file.path}: damaged: {data.name} has a row of length {lengths.max()} (at byte '
                        f'{offset + 16 * int(lengths.argmax())}), and the file has {size} bytes; get it again')


def _only(file: File, names: list[str], config: SourceConfig) -> str:
  """config.field if it is among `names`, or the only name. Raises DataError."""
  wanted = config.field.strip('/') if config.field is not None else None
  if wanted in names:
    return wanted
  if wanted is None and len(names) == 1:
    return names[0]
  known = ', '.join(names[:20]) or 'none'
  raise DataError(f'{file.path}: holds no {wanted!r}; it has {known}' if wanted is not None else
                  f'{file.path}: holds {len(names)} arrays: {known}; set config.data.field to one of them')


def _documents(file: File, values: Iterable[Any], kind: str, max_bytes: int) -> Iterator[Document | BadRecord]:
  """One document per value of an array; `kind` is the name of one value in messages: row, item."""
  for i, value in enumerate(values, 1):
    where = f'{file.path}, {kind} {i}'
    if isinstance(value, BadRecord):
      yield BadRecord(where, value.why)
      continue
    try:
      yield Document(f'{file.name}:{i}', content(value, 'it', max_bytes))
    except ValueError as e:
      yield BadRecord(where, str(e))


@contextlib.contextmanager
def _numpy_errors(file: File) -> Iterator[None]:
  """Errors of NumPy and zipfile become a DataError with the path."""
  try:
    yield
  except FileNotFoundError:
    raise DataError(f'{file.path}: no such file') from None
  except (ValueError, SyntaxError, TypeError, OSError, EOFError, RuntimeError, NotImplementedError, OverflowError,
          MemoryError, KeyError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile) as e:
    raise DataError(f'{file.path}: damaged or truncated, or not an array that NumPy saved: {e}') from None


register(FORMATS, 'hdf5', hdf5, NoSettings)
register(FORMATS, 'npy', npy, NoSettings)
register(FORMATS, 'npz', npz, NoSettings)
