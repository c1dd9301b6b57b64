"""Decompresses gzip, Zstandard, bzip2 and xz as streams. Damage and decompression bombs raise DataError."""

from __future__ import annotations

import bz2
import dataclasses
import lzma
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.compression import stream_of
from llm_jax.data.loaders import UNPACKERS

# Highly repetitive text stays below 100 to 1; bombs reach 1000 (gzip) to a million (bzip2, Zstandard).
MAX_RATIO = 200
FREE_BYTES = 16 << 20  # output that is allowed at any ratio
_PIECE = 1 << 20


def expands_too_much(compressed: int, expanded: int) -> bool:
  """Whether the sizes are those of a decompression bomb."""
  return expanded > FREE_BYTES and expanded > MAX_RATIO * compressed


@dataclasses.dataclass(frozen=True)
class Codec:
  """How one kind of compressed file is decompressed."""

  decompressor: Callable[[], Any]
  chunk: int  # input bytes at once: their output must fit in memory if the decompressor cannot limit it
  padding: bytes  # allowed after the last member


def _zstd() -> Any:
  """A decompressor of one frame. Raises ConfigError where the package is not installed."""
  try:
    import zstandard
  except ImportError:
    raise ConfigError("Zstandard files need the package zstandard: pip install 'llm_jax[data]'") from None
  # A window takes memory only as data fill it, so the limit of `zstd --long=31` costs small files nothing.
  return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _errors(name: str) -> tuple[type[Exception], ...]:
  """The exceptions that the decompressor raises for damaged data."""
  if name != 'Zstandard':
    return zlib.error, lzma.LZMAError, OSError, EOFError, ValueError
  import zstandard
  return zstandard.ZstdError, OSError


CODECS = {
    'gzip': Codec(lambda: zlib.decompressobj(wbits=31), 8 << 10, b'\0'),
    'Zstandard': Codec(_zstd, 2 << 10, b''),
    'bzip2': Codec(bz2.BZ2Decompressor, 64 << 10, b''),
    'xz': Codec(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), 64 << 10, b'\0'),
}


def decompressed(path: Path, name: str, raw: BinaryIO) -> BufferedReader:
  """The stream of the decompressed bytes of `raw`, the file at `path`; `name`: of one of CODECS."""
  return stream_of(_expand(path, raw, name), raw)


def _expand(path: Path, raw: BinaryIO, name: str) -> Iterator[bytes]:
  """Decompressed pieces of all members or frames in order; each must be complete."""
  codec = CODECS[name]
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
  except _errors(name) as e:
    raise DataError(f'{path} at byte {consumed}: damaged {name} data ({e}); get the file again') from None
  if not machine.eof:
    raise DataError(f'{path} at byte {consumed}: truncated: the {name} data is incomplete; get the file again')


def _feed(machine: Any, data: bytes) -> Iterator[bytes]:
  """Output for `data`, in bounded pieces if the decompressor supports that."""
  if not hasattr(machine, 'needs_input'):
    yield machine.decompress(data)
    return
  yield machine.decompress(data, _PIECE)
  while not (machine.eof or machine.needs_input):
    yield machine.decompress(b'', _PIECE)


register(UNPACKERS, 'stream', decompressed, NoSettings)
