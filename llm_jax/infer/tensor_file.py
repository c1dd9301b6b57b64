"""Writes files of safetensors tensor by tensor, so that the host holds one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np

Entry = tuple[str, jax.ShapeDtypeStruct, Callable[[], np.ndarray]]  # a tensor to write: name, shape and dtype, function
# Names of dtypes in a file.
CODES = {np.dtype(dtype): code for dtype, code in (
    (np.float64, 'F64'), (np.float32, 'F32'), (np.float16, 'F16'), (ml_dtypes.bfloat16, 'BF16'), (np.int64, 'I64'),
    (np.uint64, 'U64'), (np.int32, 'I32'), (np.uint32, 'U32'), (np.int16, 'I16'), (np.uint16, 'U16'), (np.int8, 'I8'),
    (np.uint8, 'U8'), (np.bool_, 'BOOL'))}
# The library's order of dtypes in a file, the last one first, so that all tensors are aligned.
_ORDER = ('BOOL', 'U8', 'I8', 'I16', 'U16', 'F16', 'BF16', 'I32', 'U32', 'F32', 'F64', 'I64', 'U64')


def write_tensors(f: BinaryIO | None, entries: Sequence[Entry], metadata: dict[str, str]) -> None:
  """Writes a file of safetensors: the length of its header, the header, and tensor after tensor.

  None only takes part in gathering them.
  """
  entries = sorted(entries, key=lambda entry: (-_ORDER.index(CODES[entry[1].dtype]), entry[0]))  # as the library does
  header: dict[str, Any] = {'__metadata__': metadata}
  end = 0
  for key, spec, _ in entries:
    begin, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
    header[key] = {'dtype': CODES[spec.dtype], 'shape': list(spec.shape), 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # so that tensors begin at a multiple of 8

  def write(array: np.ndarray, spec: jax.ShapeDtypeStruct) -> None:
    assert (array.shape, array.dtype) == (spec.shape, spec.dtype), (array.shape, array.dtype, spec)
    if f is not None:
      f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # in row-major order

  if f is not None:
    f.write(len(text).to_bytes(8, 'little') + text)
  for _, spec, make in entries:
    write(make(), spec)  # without a name here, so that it is gone before the next is made
