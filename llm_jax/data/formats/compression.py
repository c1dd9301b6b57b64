"""The bytes of files; compressed ones are recognized here, and decompressed by extras/compression.py."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llm_jax.base.errors import DataError
from llm_jax.data.loaders import UNPACKERS

# Name and first bytes by ending. Zstandard's magics after the first one mark skippable frames, which parallel
# compressors write.
COMPRESSED = {
    '.gz': ('gzip', (b'\x1f\x8b\x08',)),
    '.zst': ('Zstandard', (b'\x28\xb5\x2f\xfd', *(bytes([0x50 + i]) + b'\x2a\x4d\x18' for i in range(16)))),
    '.bz2': ('bzip2', tuple(b'BZh%d' % level + block for level in range(1, 10)
                            for block in (b'\x31\x41\x59\x26\x53\x59', b'\x17\x72\x45\x38\x50\x90'))),
    '.xz': ('xz', (b'\xfd7zXZ\0',)),
}
_MAGIC_BYTES = 10
_BUFFER = 1 << 20


def codec_of(path: Path) -> str | None:
  """The name of the file's compression, by its first bytes.

  Raises DataError when the ending says compressed and they do not.
  """
  with _open(path) as raw:
    return _codec(path, raw)


def _codec(path: Path, raw: io.BufferedReader) -> str | None:
  first = raw.peek(_MAGIC_BYTES)[:_MAGIC_BYTES]
  for name, magics in COMPRESSED.values():
    if first.startswith(magics):
      return name
  if (ending := os.path.splitext(path)[1].lower()) in COMPRESSED:
    name, _ = COMPRESSED[ending]
    found = f'begins with {first[:4].hex(" ")}' if first else 'is empty'
    raw.close()
    raise DataError(f'{path}: damaged: it is named as {name} but {found}; get it again, or correct its ending')
  return None


def _open(path: Path) -> io.BufferedReader:
  try:
    return open(path, 'rb', buffering=_BUFFER)  # type: ignore[return-value]
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None


def open_stream(path: Path) -> io.BufferedReader:
  """The file's bytes, decompressed where it is compressed. Opening and reading raise DataError with path and offset."""
  raw = _open(path)
  try:
    codec = _codec(path, raw)
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None
  return raw if codec is None else UNPACKERS['stream'](path, codec, raw)


def stream_of(pieces: Iterator[bytes], source: BinaryIO) -> io.BufferedReader:
  """A buffered stream of the bytes of an iterator; closing it closes `source`."""
  return io.BufferedReader(_Pieces(pieces, source), _BUFFER)


class _Pieces(io.RawIOBase):
  """A raw io stream over an iterator of pieces; closing it closes `source`."""

  def __init__(self, pieces: Iterator[bytes], source: BinaryIO):
    self._pieces, self._source, self._rest = pieces, source, memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._rest:
      piece = next(self._pieces, None)
      if piece is None:
        return 0
      self._rest = memoryview(piece)
    count = min(len(buffer), len(self._rest))
    buffer[:count], self._rest = self._rest[:count], self._rest[count:]
    return count

  def close(self) -> None:
    self._source.close()
    super().close()
