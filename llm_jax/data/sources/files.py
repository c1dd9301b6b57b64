"""From a path to a stream of documents: finds the files and their formats; reading can resume at any record."""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, islice
from pathlib import Path

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import register
from llm_jax.data.formats.encoding import check_encoding
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.loaders import SOURCES, UNPACKERS
from llm_jax.data.sources.content import FileHashes
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig, is_url, shown
from llm_jax.data.sources.finding import LeftOut, below, find
from llm_jax.data.sources.kinds import among_texts, formats_of, refuse_pointers
from llm_jax.data.sources.naming import cards, missing_shards, splits_of
from llm_jax.data.sources.standard_input import is_pipe, keep_pipe
from llm_jax.data.stores.cache import hold

ARCHIVES = ('.zip', '.tar', '.tar.gz', '.tgz', '.tar.xz', '.tar.bz2', '.tar.zst')

Position = tuple[int, int]  # (file, record in it) to read next


@dataclasses.dataclass(frozen=True)
class Source:
  """Files in a fixed order with their formats; every call of `records` reads them again."""

  config: SourceConfig
  files: tuple[File, ...]
  formats: tuple[str, ...]
  notes: tuple[str, ...] = ()  # what to say about them

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

  def keep(self, use: Callable[[int], bool], note: str = '') -> Source:
    """The source with the files whose index passes `use`, and a further note."""
    kept = [use(index) for index in range(len(self.files))]
    return dataclasses.replace(self, files=tuple(compress(self.files, kept)), formats=tuple(
        compress(self.formats, kept)), notes=self.notes + ((note,) if note else ()))

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
    return self.keep(lambda i: parts[i] == index)

  def fingerprint(self, hashes: FileHashes) -> list:
    """Names, formats and contents of the files, and the code of formats that are not the package's."""
    contents = hashes.of(self.files, self.config.path)
    return [[file.name, fmt, content, *FORMATS.code(fmt)]
            for file, fmt, content in zip(self.files, self.formats, contents, strict=True)]


def open_source(config: SourceConfig, cache_dir: Path) -> Source:
  """Finds the files of `config.path`; downloads URLs and unpacks archives once. Raises DataError, ConfigError."""
  check_encoding(config.encoding)
  left_out = LeftOut()
  files = locate(config, cache_dir, left_out)
  hold((file.path for file in files), cache_dir)
  found = formats_of(files, config, left_out)
  files, formats = [f for f, fmt in zip(files, found, strict=True) if fmt], [fmt for fmt in found if fmt]
  notes: tuple[str, ...] = ()
  if len(files) > 1 and config.format == 'auto':
    for card in cards(files, formats):
      index = files.index(card)
      left_out.add('file that describes the data', files.pop(index).name)
      formats.pop(index)
    chosen, notes = among_texts(files, formats, config, left_out)
    files, formats = [f for f, fmt in zip(files, chosen, strict=True) if fmt], [fmt for fmt in chosen if fmt]
  return Source(config, tuple(files), tuple(formats), left_out.lines() + notes)


def locate(config: SourceConfig, cache_dir: Path, left_out: LeftOut) -> list[File]:
  """The files of `config.path`, by one of SOURCES or on this machine. Raises DataError, ConfigError."""
  path = config.path
  name = 'url' if is_url(path) else path.split(':')[0]
  if name in SOURCES:
    found = SOURCES[name](config, cache_dir)
  elif config.sha256 is not None:
    raise ConfigError(f'config.data.sha256 is for downloads; config.data.path {path} is not a URL')
  elif is_pipe(path):
    found = [keep_pipe(path, cache_dir)]
  else:
    found = find(Path(path).expanduser(), shown(path), left_out)
  refuse_pointers(file.path for file in found)
  files = []
  for file in found:
    if file.name.lower().endswith(ARCHIVES) and file.path.is_file():
      unpacked = UNPACKERS['archive'](file.path, cache_dir)
      files += [File(f'{file.name}/{inner.name}', inner.path)
                for inner in below(unpacked, str(file.path), left_out)]
    else:
      files.append(file)
  return files


def open_sides(config: SourceConfig, cache_dir: Path, held_out: Sequence[Source], on_bad_record: str) -> list[
    tuple[str | None, Source]]:
  """[(split, source)] of `path`, `val_path` and `test_path`, what is held out first; None: to be split.

  `held_out`: sources whose files `path` must not hold. In `path`, names of files tell val and test apart from train.
  Raises DataError, ConfigError.
  """
  sides = {side: open_source(dataclasses.replace(config, path=path), cache_dir)
           for side, path in (('val', config.val_path), ('test', config.test_path)) if path is not None}
  own = open_source(config, cache_dir)
  for source in (own, *sides.values()):
    _check_shards(source, on_bad_record)
  elsewhere = {_real(file) for source in (*held_out, *sides.values()) for file in source.files}
  names = [file.name for file in own.files if _real(file) in elsewhere] if elsewhere else []
  if names:
    own = own.keep(lambda i, own=own: _real(own.files[i]) not in elsewhere,  # type: ignore[misc]
                   f'{len(names)} file(s) of path are those of val_path or test_path, and are no training data: '
                   f'{", ".join(names[:8])}')
  if not own.files:
    raise DataError(f'config.data.path: {shown(config.path)} holds no other file than val_path and test_path')
  splits = splits_of(own.files, own.formats)
  train, notes = own.keep(lambda i: splits[i] == 'train'), []
  for side in ('val', 'test'):
    names = [file.name for file, split in zip(own.files, splits, strict=True) if split == side]
    if not names:
      continue
    notes.append(f'{"left out, as there is a " + side + "_path" if side in sides else "for " + side}, by name: '
                 f'{", ".join(names[:8])}{f" and {len(names) - 8} more" if len(names) > 8 else ""}')
    if side not in sides:
      sides[side] = dataclasses.replace(own.keep(lambda i, side=side: splits[i] == side), notes=())  # type: ignore[misc]
  return [*sides.items(), (None, dataclasses.replace(train, notes=(*train.notes, *notes)))]


def _real(file: File) -> Path:
  return file.path.resolve()


def _check_shards(source: Source, on_bad_record: str) -> None:
  missing = missing_shards(source.files) if len(source.files) > 1 else []
  if missing and on_bad_record == 'fail':
    raise DataError(f'config.data.path: {shown(source.config.path)} lacks {", ".join(missing[:8])}'
                    f'{f" and {len(missing) - 8} more" if len(missing) > 8 else ""}: get the missing shard(s), or set '
                    'config.data.on_bad_record=skip to go on without')


def _of_archive(message: str, file: File) -> str:
  """The message, with archive and member name added to the path of an unpacked file."""
  unpacked = file.path.is_absolute() and not file.path.as_posix().endswith(file.name)
  return message.replace(str(file.path), f'{file.path} (of {file.name})', 1) if unpacked else message


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
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in skipped]  # site-packages may hold 100 times as much
    files += [Path(folder, name) for name in names if name.endswith('.py')]
  return [File(p.relative_to(root).as_posix(), p) for p in sorted(files)]


def _size(path: Path) -> int:
  try:
    state = os.stat(path)
  except OSError:
    return 0
  return sum(p.stat().st_size for p in path.rglob('*') if p.is_file()) if stat.S_ISDIR(state.st_mode) else state.st_size


register(SOURCES, 'stdlib', stdlib_files)
