"""From a path to a stream of documents: finds the files and their formats; reading can resume at any record."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import os
import stat
import sysconfig
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import register
from llm_jax.data.formats.registry import FORMATS, format_of
from llm_jax.data.loaders import SOURCES, UNPACKERS
from llm_jax.data.sources.content import FileHashes
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig, is_url, shown
from llm_jax.data.stores.cache import hold

ARCHIVES = ('.zip', '.tar', '.tar.gz', '.tgz', '.tar.xz', '.tar.bz2', '.tar.zst')

Position = tuple[int, int]  # (file, record in it) to read next


@dataclasses.dataclass(frozen=True)
class Source:
  """Files in a fixed order with their formats; every call of `records` reads them again."""

  config: SourceConfig
  files: tuple[File, ...]
  formats: tuple[str, ...]

  def records(self, begin: Position = (0, 0)) -> Iterator[tuple[Position, Document | BadRecord]]:
    """Every record from `begin` on, with the position after it. A file that cannot be read further is a BadRecord."""
    for index in range(begin[0], len(self.files)):
      skipped = begin[1] if index == begin[0] else 0
      number = skipped
      try:
        for item in islice(FORMATS[self.formats[index]](self.files[index], self.config), skipped, None):
          number += 1
          if isinstance(item, BadRecord):
            item = BadRecord(_of_archive(item.where, self.files[index]), item.why)
          yield (index, number), item
      except DataError as e:
        yield (index + 1, 0), BadRecord('', _of_archive(str(e), self.files[index]))
      except OSError as e:
        yield (index + 1, 0), BadRecord(str(self.files[index].path), f'cannot be read: {e.strerror or e}')

  def sizes(self) -> list[int]:
    """Bytes of each file; 0 for generated data."""
    return self._sizes

  @functools.cached_property
  def _sizes(self) -> list[int]:
    return [_size(file.path) for file in self.files]

  def shard(self, index: int, count: int) -> Source:
    """The files whose middle lies in part `index` of `count` equal parts of all bytes."""
    sizes = np.array(self.sizes(), np.float64) + 1
    parts = ((np.cumsum(sizes) - sizes / 2) / sizes.sum() * count).astype(int)
    chosen = np.flatnonzero(parts == index)
    return dataclasses.replace(self, files=tuple(self.files[i] for i in chosen),
                               formats=tuple(self.formats[i] for i in chosen))

  def fingerprint(self, hashes: FileHashes) -> list:
    """Names, formats and contents of the files, and the code of formats that are not the package's."""
    contents = hashes.of(self.files, self.config.path)
    return [[file.name, fmt, content, *FORMATS.code(fmt)]
            for file, fmt, content in zip(self.files, self.formats, contents, strict=True)]


def open_source(config: SourceConfig, cache_dir: Path) -> Source:
  """Finds the files of `config.path`; downloads URLs and unpacks archives once. Raises DataError, ConfigError."""
  files = tuple(locate(config, cache_dir))
  hold((file.path for file in files), cache_dir)
  formats = tuple(format_of(file, config) for file in files)
  return Source(config, files, formats)


def locate(config: SourceConfig, cache_dir: Path) -> list[File]:
  """The files of `config.path`, by one of SOURCES or on this machine. Raises DataError, ConfigError."""
  path = config.path
  name = 'url' if is_url(path) else path.split(':')[0]
  if name in SOURCES:
    found = SOURCES[name](config, cache_dir)
  elif config.sha256 is not None:
    raise ConfigError(f'config.data.sha256 is for downloads; config.data.path {path} is not a URL')
  else:
    found = _local(Path(path).expanduser(), shown(path))
  files = []
  for file in found:
    if file.path.is_file() and file.name.lower().endswith(ARCHIVES):
      unpacked = UNPACKERS['archive'](file.path, cache_dir)
      files += [File(f'{file.name}/{inner.name}', inner.path) for inner in _below(unpacked, str(file.path))]
    else:
      files.append(file)
  return files


def _of_archive(message: str, file: File) -> str:
  """The message, with archive and member name added to the path of an unpacked file."""
  unpacked = file.path.is_absolute() and not file.path.as_posix().endswith(file.name)
  return message.replace(str(file.path), f'{file.path} (of {file.name})', 1) if unpacked else message


def _local(root: Path, path: str) -> list[File]:
  if root.is_file():
    return [File(root.name, root)]
  if root.is_dir():
    return [File(root.name, root, 'huggingface')] if _is_saved_dataset(root) else _below(root, path)
  if root.is_symlink():
    raise DataError(f'config.data.path: {path} is a link to {root.readlink()}, which does not exist')
  if root.exists():
    raise DataError(f'config.data.path: {path} is neither a file nor a folder')
  matches = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
  if not matches:
    near = difflib.get_close_matches(root.name, [p.name for p in root.parent.glob('*')], n=1)
    hint = f' (did you mean {root.parent / near[0]}?)' if near else ''
    raise DataError(f'config.data.path: there is no file or folder {path!r}, and as a glob it matches nothing{hint}')
  # Names relative to the last folder without a wildcard are the same in any working directory and on any machine.
  fixed = Path(*takewhile(lambda part: not glob.has_magic(part), root.parts))
  return [File(p.relative_to(fixed).as_posix(), p) for p in matches]


def _below(root: Path, path: str) -> list[File]:
  """All files below the folder that are not hidden."""
  files = [p for p in sorted(root.rglob('*'))
           if p.is_file() and not any(part.startswith('.') for part in p.relative_to(root).parts)]
  if not files:
    raise DataError(f'config.data.path: the folder {path} holds no files')
  return [File(p.relative_to(root).as_posix(), p) for p in files]


def stdlib_files(config: SourceConfig, cache_dir: Path) -> list[File]:
  """The source `stdlib`."""
  if config.path != 'stdlib':
    raise ConfigError(f'config.data.path: {config.path}: nothing may follow stdlib')
  return stdlib()


def stdlib() -> list[File]:
  """The running Python's own standard library, without its tests and installed packages: about 12 MB of code."""
  root = Path(sysconfig.get_paths()['stdlib'])
  skipped = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  files = []
  for folder, below, names in os.walk(root):
    below[:] = [name for name in below if name not in skipped]  # site-packages may hold 100 times as much
    files += [Path(folder, name) for name in names if name.endswith('.py')]
  return [File(p.relative_to(root).as_posix(), p) for p in sorted(files)]


def _is_saved_dataset(root: Path) -> bool:
  return (root / 'dataset_dict.json').is_file() or ((root / 'state.json').is_file()
                                                    and (root / 'dataset_info.json').is_file())


def _size(path: Path) -> int:
  try:
    state = os.stat(path)
  except OSError:
    return 0
  return sum(p.stat().st_size for p in path.rglob('*') if p.is_file()) if stat.S_ISDIR(state.st_mode) else state.st_size


register(SOURCES, 'stdlib', stdlib_files)
