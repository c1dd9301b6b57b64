"""Content that proves itself: hashes of files, and JSON whose last field is the hash of all before it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

CHUNK = 1 << 22
_FIELD = b',\n"hash": "'


def file_hash(path: Path, *, sync: bool = False) -> dict[str, Any]:
  """{'bytes': size, 'hash': XXH3 of 128 bits} of a file; with `sync` it is on disk afterwards. Raises OSError.

  A file that was synced leaves the page cache, so that the next to read it reads the disk.
  """
  hasher, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(CHUNK))
  fd = os.open(path, os.O_RDONLY | getattr(os, 'O_NOFOLLOW', 0))
  try:
    while count := os.readv(fd, [buffer]):
      hasher.update(buffer[:count])
      size += count
    if sync:
      os.fsync(fd)
      if hasattr(os, 'posix_fadvise'):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
  finally:
    os.close(fd)
  return {'bytes': size, 'hash': hasher.hexdigest()}


def value_hash(value: Any) -> str:
  """The hash of a value of JSON."""
  return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def seal(values: dict[str, Any]) -> bytes:
  """The values as JSON with a last field `hash`."""
  body = json.dumps(values, indent=1).encode().removesuffix(b'\n}')
  return body + _FIELD + xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n'


def unseal(content: bytes) -> dict[str, Any]:
  """The inverse of `seal`. Raises ValueError if any byte has changed."""
  body, found, tail = content.rpartition(_FIELD)
  if not found or tail != xxhash.xxh3_128_hexdigest(body).encode() + b'"\n}\n':
    raise ValueError('its content does not match the hash in its last field')
  return json.loads(body + b'\n}')
