"""Compressed files as plain streams: gzip, Zstandard, bzip2, xz. Damage and decompression bombs raise DataError."""

from __future__ import annotations

import bz2
import dataclasses
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llm_jax.base.errors import ConfigError, DataError

# Highly repetitive text stays below 100 to 1; bombs reach 1000 (gzip) to a million (bzip2, Zstandard).
MAX_RATIO = 200
FREE_BYTES = 16 << 20  # output that is allowed at any ratio
_PIECE = 1 << 20
_MAGIC_BYTES = 10


def expands_too_much(compressed: int, expanded: int) -> bool:
  """Whether the sizes are those of a decompression bomb."""
  return expanded > FREE_BYTES and expanded > MAX_RATIO * compressed


@dataclasses.dataclass(frozen=True)
class Codec:
  """How one kind of compressed file is recognized and decompressed."""

  name: str
  magics: tuple[bytes, ...]  # first bytes
  decompressor: Callable[[], Any]
  chunk: int  # input bytes at once: their output must fit in memory if the decompressor cannot limit it
  padding: bytes  # allowed after the last member


def _zstd() -> Any:
  """A decompressor of one frame. Raises ConfigError where the package is not installed."""
  try:
    import zstandard
  except ImportError:
    raise ConfigError("Zstandard files need the package zstandard: pip install 'llm_jax[data]'") from None
  return zstandard.ZstdDecompressor().decompressobj()


def _errors(codec: Codec) -> tuple[type[Exception], ...]:
  """The exceptions that the decompressor raises for damaged data."""
  if codec.name != 'Zstandard':
    return zlib.error, lzma.LZMAError, OSError, EOFError, ValueError
  import zstandard
  return zstandard.ZstdError, OSError


# Zstandard's magics after the first one mark skippable frames, which parallel compressors write.
CODECS = {
    '.gz': Codec('gzip', (b'\x1f\x8b\x08',), lambda: zlib.decompressobj(wbits=31), 8 << 10, b'\0'),
    '.zst': Codec('Zstandard', (b'\x28\xb5\x2f\xfd', *(bytes([0x50 + i]) + b'\x2a\x4d\x18' for i in range(16))), _zstd,
                  2 << 10, b''),
    '.bz2': Codec('bzip2', tuple(b'BZh%d' % level + block for level in range(1, 10)
                                 for block in (b'\x31\x41\x59\x26\x53\x59', b'\x17\x72\x45\x38\x50\x90')),
                  bz2.BZ2Decompressor, 64 << 10, b''),
    '.xz': Codec('xz', (b'\xfd7zXZ\0',), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 64 << 10, b'\0'),
}


def codec_of(path: Path) -> Codec | None:
  """The codec, by the file's first bytes. Raises DataError when the ending says compressed and they do not."""
  try:
    with open(path, 'rb') as f:
      first = f.read(_MAGIC_BYTES)
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None
  for codec in CODECS.values():
    if first.startswith(codec.magics):
      return codec
  if path.suffix.lower() in CODECS:
    name = CODECS[path.suffix.lower()].name
    found = f'begins with {first[:4].hex(" ")}' if first else 'is empty'
    raise DataError(f'{path}: damaged: it is named as {name} but {found}; get it again, or correct its ending')
  return None


def open_stream(path: Path) -> BinaryIO:
  """The file's bytes, decompressed where it is compressed. Opening and reading raise DataError with path and offset."""
  codec = codec_of(path)
  try:
    raw = open(path, 'rb', buffering=_PIECE)  # noqa: SIM115
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None
  return raw if codec is None else io.BufferedReader(_Pieces(_expand(path, raw, codec), raw), _PIECE)


def _expand(path: Path, raw: BinaryIO, codec: Codec) -> Iterator[bytes]:
  """Decompressed pieces of all members or frames in order; each must be complete."""
  consumed, produced, machine = 0, 0, codec.decompressor()
  try:
    while data := raw.read(codec.chunk):
      consumed += len(data)
      while data:
        if machine.eof:
          data = data.lstrip(codec.padding)
          if not data:
            break
          machine = codec.decompressor()
        for piece in _feed(machine, data):
          produced += len(piece)
          if expands_too_much(consumed, produced):
            raise DataError(f'{path} at byte {consumed}: expands to more than {MAX_RATIO} times its size, like a '
                            'decompression bomb; if you trust it, decompress it yourself and use the result')
          yield piece
        data = machine.unused_data if machine.eof else b''
  except _errors(codec) as e:
    raise DataError(f'{path} at byte {consumed}: damaged {codec.name} data ({e}); get the file again') from None
  if not machine.eof:
    raise DataError(f'{path} at byte {consumed}: truncated: the {codec.name} data is incomplete; get the file again')


def _feed(machine: Any, data: bytes) -> Iterator[bytes]:
  """Output for `data`, in bounded pieces if the decompressor supports that."""
  if not hasattr(machine, 'needs_input'):
    yield machine.decompress(data)
    return
  yield machine.decompress(data, _PIECE)
  while not (machine.eof or machine.needs_input):
    yield machine.decompress(b'', _PIECE)


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
