"""Pickles: rejected as a source; the command that converts them reads those of plain data.

The unpickler accepts built-in containers, text, bytes, numbers and NumPy arrays, and checks all arguments from the
pickle before it passes them to NumPy. Any other name in a pickle is an error.
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
from llm_jax.data.formats.compression import open_stream
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.extras.compression import expands_too_much

_COMMAND = 'llm-jax data convert'
_MAX_DEPTH = 8


def pickle_refused(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """Raises DataError for every file, because unpickling runs any code that the file names."""
  del config
  raise DataError(f'{file.path}: pickles are not read, because loading one runs the code that it names; '
                  f'{_COMMAND} {file.path} OUTPUT.parquet reads one that holds only data, and runs none')


class _Dtype:
  """A dtype as a pickle describes it; checked before NumPy makes a dtype of it, as NumPy trusts the state."""

  def __init__(self, spec: Any, align: bool = False, copy: bool = False):
    del align, copy
    self.spec = spec
    self.order: Any = '='

  def __setstate__(self, state: tuple) -> None:
    self.order = state[1]

  def dtype(self) -> np.dtype:
    """The NumPy dtype. Raises DataError if it is not one of numbers, text or objects."""
    dtype = np.dtype(self.spec) if isinstance(self.spec, str) else np.dtype('V')
    if dtype.kind not in 'biufcSUO' or self.order not in ('<', '>', '|', '='):
      raise DataError(f'a pickled array has dtype {self.spec!r}; only numbers, strings and objects are allowed')
    return dtype.newbyteorder(self.order)


class _Array:
  """An array under construction: pickles make an empty array and then set its state."""

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
  """Placeholder for numpy.ndarray, which pickles only mention; cannot be called with arguments."""


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple, order: Any) -> _Array:
  array = _Array()
  array.value = np.frombuffer(data, dtype.dtype()).reshape(shape, order=order)
  return array


def _scalar(dtype: _Dtype, data: bytes) -> Any:
  return np.frombuffer(data, dtype.dtype())[0].item()


def _latin1(text: str, encoding: str) -> bytes:
  """The bytes that old protocols write as text; other codecs than Latin-1 may run code."""
  if encoding not in ('latin1', 'latin-1'):
    raise DataError(f'it asks for the codec {encoding!r}')
  return text.encode('latin1')


# (module, name) in a pickle -> its replacement here. NumPy 1's `numpy.core` is NumPy 2's `numpy._core`.
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
  """Resolves only the names in _ALLOWED."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _ALLOWED:
      raise DataError(f'it asks for {module}.{name}, which is not plain data; nothing was run. '
                      'If you trust it, load it yourself and save plain lists, dicts and arrays')
    return _ALLOWED[module, name]


def load_plain(path: Path) -> Any:
  """The value in a pickle of plain data; numeric arrays stay arrays, all others become lists.

  Raises DataError if it is not plain data, is damaged, nested too deeply, or expands like a bomb.
  """
  try:
    with open_stream(path) as stream:
      value = _Unpickler(stream).load()
      if stream.read(1):
        raise DataError('more follows the first pickle; save one object')
    size = _size(value, {}, _MAX_DEPTH)
    if expands_too_much(path.stat().st_size, size):
      raise DataError(f'it would expand to {size} bytes by repeating its objects')
    return _plain(value)
  except UserError as e:
    raise DataError(str(e) if str(path) in str(e) else f'{path}: {e}') from None
  except Exception as e:  # a damaged pickle can raise nearly anything
    raise DataError(f'{path}: damaged or truncated, or not a pickle of plain data: {type(e).__name__}: {e}') from None


def _size(value: Any, known: dict[int, int], depth: int) -> int:
  """Bytes of the value with every repeated object counted each time; each object is visited once."""
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
