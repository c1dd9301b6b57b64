"""Where text comes from: each source is a function path -> Source. Add one here and a line in SOURCES."""

from __future__ import annotations

import dataclasses
import glob
import sysconfig
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

from llm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Document:
  name: str  # stable across machines; the split hashes it
  text: str


@dataclasses.dataclass(frozen=True)
class Source:
  """Named files in a fixed order, one document each; they are read anew at every call of `documents`."""

  files: tuple[tuple[str, Path], ...]

  def documents(self) -> Iterator[Document]:
    for name, path in self.files:
      yield Document(name, _read_text(path))

  def fingerprint(self) -> list[list]:
    """Names, sizes and times of change: equal as long as no file was touched."""
    stats = [(name, path.stat()) for name, path in self.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def stdlib(path: str) -> Source:
  """The running Python's own standard library, without its tests and installed packages: about 12 MB of code."""
  del path
  root = Path(sysconfig.get_paths()['stdlib'])
  skipped = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  files = [p for p in sorted(root.rglob('*.py')) if not skipped & set(p.relative_to(root).parts)]
  return Source(tuple((p.relative_to(root).as_posix(), p) for p in files))


def text(path: str) -> Source:
  """UTF-8 text: a file, a folder (every file below it that is not hidden), or a glob (** crosses folders)."""
  root = Path(path).expanduser()
  if root.is_file():
    return Source(((root.name, root),))
  if root.is_dir():
    files = [p for p in sorted(root.rglob('*'))
             if p.is_file() and not any(part.startswith('.') for part in p.relative_to(root).parts)]
    if not files:
      raise DataError(f'config.data.path: the folder {path} holds no files')
    return Source(tuple((p.relative_to(root).as_posix(), p) for p in files))
  matches = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
  if not matches:
    raise DataError(f'config.data.path: there is no file or folder {path!r}, and as a glob it matches nothing')
  # Named below the last folder without a wildcard: the same from any working directory and on any machine.
  fixed = Path(*takewhile(lambda part: not glob.has_magic(part), root.parts))
  return Source(tuple((p.relative_to(fixed).as_posix(), p) for p in matches))


SOURCES: dict[str, Callable[[str], Source]] = {
    'stdlib': stdlib,
    'text': text,
}


def open_source(source: str, path: str) -> Source:
  """The source by name; 'auto' takes the standard library for the path 'stdlib', else text."""
  if source == 'auto':
    source = 'stdlib' if path == 'stdlib' else 'text'
  return SOURCES[source](path)


def _read_text(path: Path) -> str:
  try:
    return path.read_bytes().decode('utf-8')
  except UnicodeDecodeError as e:
    raise DataError(f'{path}: not UTF-8 text at byte {e.start} ({e.object[e.start:e.start + 4].hex(" ")}); '
                    'convert it, or name only text files, for example --config.data.path="FOLDER/**/*.txt"') from None
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None
