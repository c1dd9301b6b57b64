"""Pickles: refused as a source; and read, as plain data alone, for the command that converts them.

The unpickler knows built-in containers, text, bytes, numbers and NumPy arrays, and calls nothing of NumPy with what the
pickle says before it is checked; whatever else a pickle names ends it.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.errors import DataError, UserError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.compression import expands_too_much, open_stream
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig

_COMMAND = 'llm-jax data convert'
_MAX_DEPTH = 8


def pickle_refused(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """A reader that reads nothing: unpickling runs whatever code the file names."""
  del config
  raise DataError(f'{file.path}: pickles are not read, because loading one runs the code that it names; '
                  f'{_COMMAND} {file.path} OUTPUT.parquet reads one that holds only data, and runs none')


class _Dtype:
  """What a pickle says of a dtype; made into one only after a check, for NumPy trusts its state."""

  def __init__(self, spec: Any, align: bool = False, copy: bool = False):
    del align, copy
    self.spec = spec
    self.order: Any = '='

  def __setstate__(self, state: tuple) -> None:
    self.order = state[1]

  def dtype(self) -> np.dtype:
    """Raises DataError but for plain numbers, text and objects."""
    dtype = np.dtype(self.spec) if isinstance(self.spec, str) else np.dtype('V')
    if dtype.kind not in 'biufcSUO' or self.order not in ('<', '>', '|', '='):
      raise DataError(f'a pickled array has dtype {self.spec!r}; numbers, strings and objects are known')
    return dtype.newbyteorder(self.order)


class _Array:
  """An array in the making: pickles make an empty one and then set its state."""

  def __init__(self, *of_an_empty_one: Any):
    del of_an_empty_one
    self.value = np.empty(0, np.int64)

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, fortran_order, data = state
    if isinstance(data, list):
      self.value = np.empty(len(data), object)
      self.value[:] = data
      self.value = self.value.reshape(shape, order='F' if fortran_order else 'C')
    else:
      self.value = _from_buffer(data, dtype, shape, 'F' if fortran_order else 'C').value


class _Type:
  """Stands for numpy.ndarray, which pickles only name; cannot be called."""


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple, order: Any) -> _Array:
  array = _Array()
  array.value = np.frombuffer(data, dtype.dtype()).reshape(shape, order=order)
  return array


def _scalar(dtype: _Dtype, data: bytes) -> Any:
  return np.frombuffer(data, dtype.dtype())[0].item()


def _latin1(text: str, encoding: str) -> bytes:
  """Old protocols write bytes as text; other codecs than this one may do anything."""
  if encoding not in ('latin1', 'latin-1'):
    raise DataError(f'it asks for the codec {encoding!r}')
  return text.encode('latin1')


# (module, name) as pickles say -> what stands in for it. NumPy 1 calls `numpy.core` what NumPy 2 calls `numpy._core`.
_ALLOWED: dict[tuple[str, str], Callable] = {
    **{(module, kind.__name__): kind for module in ('builtins', '__builtin__')
       for kind in (set, frozenset, bytearray, bytes, complex, list, dict, tuple, str, int, float, bool)},
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('_codecs', 'encode'): _latin1,
    ('numpy', 'ndarray'): _Type,
    ('numpy', 'dtype'): _Dtype,
    **{(f'numpy.{core}.{module}', name): function for core in ('core', '_core') for module, name, function in (
        ('multiarray', '_reconstruct', _Array), ('multiarray', 'scalar', _scalar),
        ('numeric', '_frombuffer', _from_buffer))},
}


class _Unpickler(pickle.Unpickler):
  """Finds only what is allowed."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      raise DataError(f'it asks for {module}.{name}, which is no plain data; nothing was run. '
                      'Load it where you trust it, and save plain lists, dicts and arrays')
    return _ALLOWED[module, name]


def load_plain(path: Path) -> Any:
  """What a pickle of plain data holds, its numeric arrays as such and all other ones as lists.

  Raises DataError for whatever is no plain data, is damaged, nested deeply, or so full of repetition as to be a bomb.
  """
  try:
    with open_stream(path) as stream:
      value = _Unpickler(stream).load()
      if stream.read(1):
        raise DataError('more follows the first pickle; save one object')
    size = _size(value, {}, _MAX_DEPTH)
    if expands_too_much(path.stat().st_size, size):
      raise DataError(f'it would expand to {size} bytes by repeating what it holds')
    return _plain(value)
  except UserError as e:
    raise DataError(str(e) if str(path) in str(e) else f'{path}: {e}') from None
  except Exception as e:  # a damaged pickle can raise nearly anything
    raise DataError(f'{path}: damaged or truncated, or not a pickle of plain data: {type(e).__name__}: {e}') from None


def _size(value: Any, known: dict[int, int], depth: int) -> int:
  """Bytes that the value takes with all repetition written out; each object is looked at once."""
  if id(value) in known:
    return known[id(value)]
  if depth == 0:
    raise DataError(f'it nests deeper than {_MAX_DEPTH} levels')
  if isinstance(value, _Array):
    value_size = value.value.nbytes
    if value.value.dtype.kind == 'O':
      value_size += sum(_size(x, known, depth - 1) for x in value.value.flat)
  elif isinstance(value, str | bytes | bytearray):
    value_size = len(value)
  elif isinstance(value, dict):
    value_size = sum(8 + _size(x, known, depth - 1) for item in value.items() for x in item)
  elif isinstance(value, list | tuple | set | frozenset):
    value_size = sum(8 + _size(x, known, depth - 1) for x in value)
  else:
    return 8
  known[id(value)] = value_size
  return value_size


def _plain(value: Any) -> Any:
  if isinstance(value, _Array):
    return value.value if value.value.dtype.kind in 'biuf' else _plain(value.value.tolist())
  if isinstance(value, dict):
    return {key: _plain(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(x) for x in value] if isinstance(value, list) else tuple(_plain(x) for x in value)
  return value


register(FORMATS, 'pickle', pickle_refused, NoSettings)
