"""Flat `.bin` token files: nanoGPT's (raw uint16) and llm.c's (a header of 256 int32, then uint16 or uint32)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from llm_jax.data.store import TokenStore
from llm_jax.errors import DataError

# The first int32 of a header; llm.c data files: 20240520 for GPT-2's uint16, 20240801 for Llama 3's uint32.
LLMC_MAGIC = {20240520: np.uint16, 20240801: np.uint32}
_HEADER_BYTES = 256 * 4


def open_bin(path: Path, eot_id: int | None) -> TokenStore:
  """Maps the file. Documents start at each `eot_id`; without one the file is one document.

  Raises DataError when the file is missing, empty, or not as long as its header says.
  """
  if not path.is_file():
    raise DataError(f'{path}: no such token file')
  size = path.stat().st_size
  header = np.fromfile(path, np.int32, count=3)
  if header.size == 3 and int(header[0]) in LLMC_MAGIC:
    dtype = np.dtype(LLMC_MAGIC[int(header[0])])
    expected = _HEADER_BYTES + int(header[2]) * dtype.itemsize
    if size != expected:
      raise DataError(f'{path}: the header says {header[2]} tokens, which take {expected} bytes; the file has {size}')
    tokens = np.memmap(path, dtype, mode='r', offset=_HEADER_BYTES)
  else:
    if size < 2 or size % 2:
      raise DataError(f'{path}: {size} bytes are no flat array of uint16 tokens')
    tokens = np.memmap(path, np.uint16, mode='r')
  starts = np.zeros(1, np.int64) if eot_id is None else np.union1d([0], np.flatnonzero(tokens == eot_id))
  return TokenStore(tokens, starts, _sampled_sha256(tokens), num_bytes=0)


def _sampled_sha256(tokens: np.ndarray) -> str:
  """Of the length and 256 evenly spaced blocks: an identity that is read in milliseconds at any size."""
  digest = hashlib.sha256(str(len(tokens)).encode())
  for begin in np.linspace(0, max(0, len(tokens) - 4096), 256, dtype=np.int64):
    digest.update(tokens[begin:begin + 4096].tobytes())
  return digest.hexdigest()
