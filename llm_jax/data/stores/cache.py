"""What the cache holds, and its bound: the entries that were used least recently are deleted, never one in use.

An entry is a folder or file KIND/NAME. Its last use is the time of KIND/NAME.used, on which whoever uses it holds a
shared lock; whoever deletes it needs an exclusive one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

BESIDE = ('.used', '.lock', '.partial')  # of an entry
OWN_BOUND = ('compiled',)  # by JAX
GRACE_SECONDS = 60  # from the last use, for entries that are found before they are locked

_held: dict[Path, IO | None] = {}  # for as long as the process runs


@dataclasses.dataclass(frozen=True)
class CacheEntry:
  kind: str  # 'stores', 'tokenizers', 'downloads', 'unpacked', ...
  path: Path
  num_bytes: int
  used: float  # seconds since 1970
  in_use: bool
  about: str  # of a store: its source and tokenizer


def lease(path: Path) -> IO | None:
  """Keeps the entry from being deleted until the result is closed or forgotten; None where nothing can be written."""
  marker = _marker(path)
  while True:
    try:
      marker.parent.mkdir(parents=True, exist_ok=True)
      file = open(marker, 'a')  # noqa: SIM115
      fcntl.flock(file, fcntl.LOCK_SH)
      os.utime(file.fileno())
    except OSError:
      return None
    if _is_current(file, marker):
      return file
    file.close()  # deleted while this process waited


def hold(paths: Iterable[Path], cache_dir: Path) -> None:
  """Keeps the entries with these files from being deleted for as long as the process runs."""
  top = Path(cache_dir).absolute()
  for path in paths:
    if str(path.absolute()).startswith(f'{top}{os.sep}') and len(parts := path.absolute().relative_to(top).parts) > 1:
      entry = top.joinpath(*parts[:2])
      if entry not in _held:
        _held[entry] = lease(entry)


def entries(cache_dir: Path) -> list[CacheEntry]:
  """All entries, the least recently used first."""
  return sorted(itertools.chain.from_iterable(_of_kind(kind) for kind in _folders(cache_dir)),
                key=lambda entry: entry.used)


def prune(cache_dir: Path, max_bytes: float | None, max_days: float | None) -> list[CacheEntry]:
  """Deletes what was not used for `max_days`, and then the least recently used until `max_bytes` remain. Returns it."""
  now, deleted = time.time(), []
  # Shards are left until they are merged.
  found = [entry for entry in entries(cache_dir) if entry.kind not in OWN_BOUND and '.shard-' not in entry.path.name]
  total = sum(entry.num_bytes for entry in found)
  for entry in found:
    is_old = max_days is not None and now - entry.used > max_days * 86400
    is_too_much = max_bytes is not None and total > max_bytes and entry.num_bytes
    if (is_old or is_too_much) and now - entry.used > GRACE_SECONDS and _delete(entry):
      total -= entry.num_bytes
      deleted.append(entry)
  return deleted


def _delete(entry: CacheEntry) -> bool:
  """Deletes the entry, unless it is in use. A process killed meanwhile leaves the entry whole, or none."""
  with _exclusive(entry.path) as is_mine:
    if not is_mine:
      return False
    trash = entry.path.with_name(f'{entry.path.name}.deleted')
    with contextlib.suppress(OSError):
      os.rename(entry.path, trash)
    for path in (trash, *(_beside(entry.path, ending) for ending in BESIDE[::-1])):
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        with contextlib.suppress(OSError):
          path.unlink(missing_ok=True)
    return not entry.path.exists()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[bool]:
  """Whether no one uses the entry; then no one begins to before the end."""
  try:
    file = open(_marker(path), 'a')  # noqa: SIM115
  except OSError:
    yield False
    return
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      yield False
    else:
      yield _is_current(file, _marker(path))


def _is_current(file: IO, path: Path) -> bool:
  try:
    return os.fstat(file.fileno()).st_ino == os.stat(path).st_ino
  except OSError:
    return False


def _folders(cache_dir: Path) -> list[Path]:
  return sorted(path for path in cache_dir.iterdir() if path.is_dir()) if cache_dir.is_dir() else []


def _of_kind(folder: Path) -> Iterator[CacheEntry]:
  names = {_name(path.name) for path in folder.iterdir()}
  if folder.name in OWN_BOUND:
    yield _entry(folder.name, folder)
    return
  yield from (_entry(folder.name, folder / name) for name in sorted(names))


def _entry(kind: str, path: Path) -> CacheEntry:
  parts = [part for part in (path, *(_beside(path, ending) for ending in BESIDE)) if part.exists()]
  num_bytes, newest = 0, 0.0
  for part in parts:
    for file in (part, *part.rglob('*')) if part.is_dir() else (part,):
      with contextlib.suppress(OSError):  # deleted meanwhile
        stat = file.stat()
        num_bytes, newest = num_bytes + (stat.st_size if file.is_file() else 0), max(newest, stat.st_mtime)
  marker = _marker(path)
  used = marker.stat().st_mtime if marker.exists() and path.exists() else newest
  return CacheEntry(kind, path, num_bytes, used, _in_use(path), _about(path))


def _in_use(path: Path) -> bool:
  if not _marker(path).exists():
    return False
  with _exclusive(path) as is_mine:
    return not is_mine


def _about(path: Path) -> str:
  try:
    manifest = json.loads((path / 'manifest.json').read_bytes())
    tokens = sum(split['tokens'] for split in manifest['splits'].values())
    return f'{tokens:,} tokens of {manifest["path"]}, tokenizer {manifest["tokenizer"]}'
  except (OSError, ValueError, KeyError, TypeError):
    return '' if path.exists() else 'unfinished'


def _name(name: str) -> str:
  for ending in BESIDE:
    name = name.removesuffix(ending)
  return name


def _beside(path: Path, ending: str) -> Path:
  return path.with_name(path.name + ending)


def _marker(path: Path) -> Path:
  return _beside(path, '.used')
