"""Token stores in object storage (gs://, s3:// and others of fsspec): blocks are fetched when a row first needs them.

The blocks are kept in the cache, at most data.remote_cache_gb of them; those not used for longest are deleted first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.errors import DataError, StorageError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.config import DataConfig, cache_dir
from llm_jax.data.loaders import LOADERS
from llm_jax.data.sources.documents import shown
from llm_jax.data.stores.cache import hold
from llm_jax.data.stores.checks import BLOCK
from llm_jax.data.stores.prepared import Prepared
from llm_jax.data.stores.token_files import TokenFile
from llm_jax.extras.fetch import remote_files

BLOCK_BYTES = 4 * BLOCK  # 256 KB: a row needs a few KB, and a request costs about as much time as this many bytes
NUM_THREADS = 32
TRIES, WAIT = 4, 0.5  # of a request; seconds before the second one, doubled for each further one
CHECK_EVERY = 256  # blocks written between two looks at the size of the cache


@dataclasses.dataclass
class Blocks:
  """The blocks of one store on this machine; shared by processes, and pickled without its file system."""

  url: str
  folder: Path
  max_bytes: float
  _written: int = 0
  _crc: dict[str, list[int]] = dataclasses.field(default_factory=dict)

  @cached_property
  def _remote(self) -> tuple[Any, str]:
    with remote_files(self.url) as found:
      return found

  @cached_property
  def _threads(self) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix='blocks')

  def __getstate__(self) -> dict:
    return {name: value for name, value in vars(self).items() if name not in ('_remote', '_threads')}

  def map(self, make: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
    """As the builtin, in threads: rows wait for their requests at the same time."""
    return self._threads.map(make, *arguments)

  def get(self, name: str, number: int, size: int) -> bytes:
    """A block, of `size` bytes, from this machine or fetched."""
    kept = self._kept(name, number, size)
    return self._fetch(name, number, size) if kept is None else kept

  def _sums(self, name: str) -> list[int]:
    if name not in self._crc:
      self._crc[name] = np.fromfile(self.folder / f'{name}.crc', '<u4').tolist()
    return self._crc[name]

  def fetch_whole(self, name: str) -> bytes:
    return self._request(name, None, None)

  def _path(self, name: str, number: int) -> Path:
    return self.folder / f'{name}.{number:07}'

  def _kept(self, name: str, number: int, size: int) -> bytes | None:
    path = self._path(name, number)
    try:
      content = path.read_bytes()
      os.utime(path)  # for the order of deletion; the time of reading is not kept on every file system
    except OSError:  # never fetched, or deleted by another process
      return None
    return content if len(content) == size else None

  def _fetch(self, name: str, number: int, size: int) -> bytes:
    begin = number * BLOCK_BYTES
    content = self._request(name, begin, begin + size)
    if len(content) != size:
      raise DataError(f'{shown(self.url)}/{name}: has {len(content)} bytes from byte {begin} on where the manifest '
                      f'says {size}; upload the store again')
    sums = self._sums(name)[begin // BLOCK:-(-(begin + size) // BLOCK)]
    if sums != [zlib.crc32(content[i:i + BLOCK]) for i in range(0, size, BLOCK)]:
      raise DataError(f'{shown(self.url)}/{name}: damaged between bytes {begin} and {begin + size}: the checksum '
                      'differs from the one that was written with it; upload the store again')
    path = self._path(name, number)
    aside = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}.partial')
    try:
      aside.write_bytes(content)
      os.replace(aside, path)
    except OSError as e:
      raise StorageError(f'{path}: cannot be written ({e.strerror or e}); lower config.data.remote_cache_gb, or set '
                         'config.data.cache_dir to another folder') from None
    self._written += 1
    if self._written % CHECK_EVERY == 0:
      self.prune()
    return content

  def _request(self, name: str, begin: int | None, end: int | None) -> bytes:
    for attempt in range(TRIES):
      try:
        with remote_files(self.url):  # turns the errors of file systems into a DataError
          fs, root = self._remote
          return fs.cat_file(f'{root.rstrip("/")}/{name}', start=begin, end=end)
      except DataError:
        if attempt == TRIES - 1:
          raise
        time.sleep(WAIT * 2 ** attempt)
    raise AssertionError('the last try returns or raises')

  def prune(self) -> None:
    """Deletes the blocks that were not used for longest, until nine tenths of the bound are left."""
    found = []
    for path in self.folder.glob('*.tokens.[0-9]*'):
      with contextlib.suppress(OSError):
        found.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= self.max_bytes:
      return
    for _, size, path in sorted(found):
      if total <= 0.9 * self.max_bytes:
        break
      path.unlink(missing_ok=True)
      total -= size


@dataclasses.dataclass(frozen=True)
class RemoteTokens:
  """A token file in object storage; `read` fetches the blocks that it needs."""

  blocks: Blocks
  name: str
  dtype: str
  size: int

  @property
  def path(self) -> str:
    return f'{shown(self.blocks.url)}/{self.name}'

  def wait_for_checks(self) -> None:
    """Blocks are checked when they are fetched."""

  def read(self, begin: int, end: int) -> np.ndarray:
    """The ids [begin, end). Raises DataError."""
    width = np.dtype(self.dtype).itemsize
    first, last = begin * width // BLOCK_BYTES, -(-end * width // BLOCK_BYTES)
    content = b''.join(self.blocks.get(self.name, number, min(BLOCK_BYTES, self.size * width - number * BLOCK_BYTES))
                       for number in range(first, last))
    return np.frombuffer(content, self.dtype, end - begin, begin * width - first * BLOCK_BYTES)


def open_remote(url: str, config: DataConfig) -> Prepared | None:
  """The store at a URL; None where there is no manifest. Raises DataError, ConfigError, StorageError."""
  with remote_files(url) as (fs, root):
    manifest_path = f'{root.rstrip("/")}/manifest.json'
    if not fs.exists(manifest_path):
      return None
    manifest = fs.cat_file(manifest_path)
  try:
    files = json.loads(manifest)['files']
  except (ValueError, KeyError):
    raise DataError(f'{shown(url)}/manifest.json: is not the manifest of a store; upload the store again') from None
  # The manifest has the hashes of all files: blocks of another version of the store are never used.
  key = hashlib.sha256(url.encode() + manifest).hexdigest()[:16]
  folder = cache_dir(config) / 'remote' / key
  blocks = Blocks(url, folder, config.remote_cache_gb * 1e9)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'manifest.json').write_bytes(manifest)
    for name, entry in files.items():
      path = folder / name
      if path.suffix != '.tokens' and not (path.exists() and path.stat().st_size == entry['size']):
        content = blocks.fetch_whole(name)
        if hashlib.sha256(content).hexdigest() != entry['sha256']:
          raise DataError(f'{shown(url)}/{name}: differs from the manifest; upload the store again')
        aside = path.with_name(f'{name}.{uuid.uuid4().hex[:8]}.partial')
        aside.write_bytes(content)
        os.replace(aside, path)
  except OSError as e:
    raise StorageError(f'{folder}: cannot be written: {e.strerror or e}') from None
  hold([folder / 'manifest.json'], cache_dir(config))
  blocks.prune()

  def token_file(path: Path, dtype: str, size: int) -> TokenFile | RemoteTokens:
    return RemoteTokens(blocks, path.name, dtype, size) if path.suffix == '.tokens' else TokenFile(path, dtype, size)

  return Prepared(folder, token_file, {'map': blocks.map})


register(LOADERS, 'remote', open_remote, NoSettings)
