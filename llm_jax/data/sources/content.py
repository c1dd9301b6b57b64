"""Hashes of what files hold, so that a store is found again whatever the files' times and folder.

Files that are unchanged since they were hashed, by size, times and inode, are not read again: `hashes/KEY.json` in the
cache has a line for each file of a source.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from llm_jax.base.progress import Progress
from llm_jax.data.sources.documents import File
from llm_jax.data.stores.checks import file_sha256

SETTLED_SECONDS = 2  # a file may change again within the resolution of its times
SHOWN_BYTES = 1 << 30  # more than this to read is shown

State = list[int]  # size, times of the last change of data and of anything, inode


class FileHashes:
  """The hashes of files; each is read once. For a stream, which may be too large for that, places and times instead."""

  def __init__(self, cache_dir: Path | None = None, *, of_stream: bool = False):
    self._cache_dir, self._of_stream = cache_dir, of_stream
    self._found, self._states = dict[str, str](), dict[str, State]()
    self._below = dict[Path, list[str]]()  # the files of each path

  def of(self, files: Sequence[File], source: str) -> list[list[tuple[str, str]]]:
    """[(name, sha256)] of each file, or of the files in each folder; empty for generated data. Raises DataError."""
    for path in (file.path for file in files if file.path not in self._below):
      self._below[path] = _paths(path)
    below = [self._below[file.path] for file in files]
    if missing := [path for path in dict.fromkeys(path for group in below for path in group)
                   if path not in self._found]:
      self._found |= self._hash(missing, source)
    return [[(os.path.basename(path), self._found[path]) for path in group] for group in below]

  def changed(self) -> str | None:
    """The first file that does not hold what it held when it was hashed."""
    for path, state in self._states.items():
      if not Path(path).exists() or (_state(path)[:2] != state[:2] and file_sha256(Path(path)) != self._found[path]):
        return path
    return None

  def _hash(self, paths: list[str], source: str) -> dict[str, str]:
    if self._of_stream:
      return {path: ' '.join([path, *map(str, _state(path)[:2])]) for path in paths}
    index = self._index(source)
    saved = _read(index)
    states, now = {path: _state(path) for path in paths}, time.time()
    self._states |= states
    known = {path: saved[path][-1] for path, state in states.items() if saved.get(path, [None])[:-1] == state}
    unknown = [path for path in paths if path not in known]
    if not unknown:
      return known
    total = sum(states[path][0] for path in unknown)
    with Progress('reading files', total, 'B', shown=total > SHOWN_BYTES) as bar:
      for path in unknown:
        known[path] = file_sha256(Path(path))
        bar.update(states[path][0])
    settled = [path for path in unknown if _settled(states[path], now) and _state(path) == states[path]]
    if index is not None and settled:
      kept = {path: entry for path, entry in saved.items() if path in states or Path(path).exists()}
      _write(index, kept | {path: [*states[path], known[path]] for path in settled})
    return known

  def _index(self, source: str) -> Path | None:
    if self._cache_dir is None:
      return None
    root = str(Path(source).expanduser().absolute()).encode('utf-8', 'surrogateescape')
    return self._cache_dir / 'hashes' / f'{hashlib.sha256(root).hexdigest()[:16]}.json'


def _paths(path: Path) -> list[str]:
  """The file, or all files below the folder; none for generated data."""
  if os.path.isfile(path):
    return [os.path.abspath(path)]
  return sorted(str(p.absolute()) for p in path.rglob('*') if p.is_file()) if path.is_dir() else []


def _state(path: str) -> State:
  stat = os.stat(path)
  return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _settled(state: State, now: float) -> bool:
  return max(state[1], state[2]) < (now - SETTLED_SECONDS) * 1e9


def _read(index: Path | None) -> dict[str, list]:
  try:
    return json.loads(index.read_bytes()) if index is not None else {}
  except (OSError, ValueError):
    return {}


def _write(index: Path, entries: dict[str, list]) -> None:
  """Writes the index atomically; a cache that cannot be written is reported when a store is made."""
  aside = index.with_name(f'{index.name}.{os.getpid()}.partial')
  try:
    index.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(entries))
    os.replace(aside, index)
  except OSError:
    aside.unlink(missing_ok=True)
