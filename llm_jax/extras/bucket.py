"""The files of one run in object storage, by fsspec."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from llm_jax.base.errors import DataError, StorageError
from llm_jax.base.files import MANIFEST
from llm_jax.extras.fetch import BY_HAND, remote_files

T = TypeVar('T')

NUM_THREADS = 16
TRIES, WAIT = 6, 2.0  # of what must succeed; seconds before the second try, doubled for each further one
FOLDERS = {'file', 'local', 'sftp', 'ssh', 'ftp', 'smb', 'hdfs', 'webhdfs', 'webdav'}  # that a file may lack
OWNER = 'launch.json'  # the launch that wrote a folder last, here and there
SAVING = 'saving.json'  # in a step that processes without a common folder are saving
# Parts of the names of what is not copied.
LOCAL_ONLY = ('.lock', '.partial', '.unfinished', '.corrupt', '.rewound', '.unreadable')


class Bucket:
  """The files of one run there. Raises StorageError, ConfigError."""

  def __init__(self, url: str):
    self.url = url.rstrip('/')
    logging.getLogger('gcsfs').setLevel(logging.ERROR)  # it warns at each call if it may not read the bucket's type
    with remote_files(self.url) as (fs, root):
      self.fs, self._root = fs, root.rstrip('/')
    self._has_root = False
    self._threads = ThreadPoolExecutor(NUM_THREADS, 'storage')

  def path(self, name: str) -> str:
    return f'{self._root}/{name}'

  def names(self, folder: str = '') -> list[str]:
    """The files, or those in a folder."""
    place = f'{self._root}/{folder}'.rstrip('/')
    with self.errors():
      self.fs.invalidate_cache()
      found = self.fs.find(place) if self.fs.exists(place) else []
    return sorted(path.removeprefix(f'{self._root}/') for path in found)

  def read(self, name: str) -> bytes | None:
    """The content of a file; None if there is none."""
    with self.errors():
      try:
        return self.fs.cat_file(self.path(name))
      except FileNotFoundError:
        return None

  def write(self, name: str, content: bytes) -> None:
    with self.errors('written'):
      self._with_folder(name, lambda path: self.fs.pipe_file(path, content))

  def create(self, name: str, content: bytes) -> bool:
    """Writes a file if there is none; returns whether it did."""
    with self.errors('written'):
      try:
        self._with_folder(name, lambda path: self.fs.pipe_file(path, content, mode='create'))
      except FileExistsError:
        return False
    return True

  def put(self, folder: Path, names: Iterable[str]) -> None:
    """Copies files of a local folder. Raises FileNotFoundError if one is not there any more."""
    def put(name: str) -> None:
      local = folder / name
      if not local.exists():
        raise FileNotFoundError(name)
      with self.errors('written'):
        self._with_folder(name, lambda path: self.fs.put_file(str(local), path))
    list(self._threads.map(put, names))

  def get(self, folder: Path, names: Iterable[str]) -> list[str]:
    """Copies files to a local folder, each replaced at once, as others may read it; returns those that are missing.

    Raises StorageError for a name that leads out of the folder.
    """
    names = list(names)
    for name in names:
      if name.startswith('/') or '..' in name.split('/'):
        raise StorageError(f'{self.url}: the name {name!r} leads out of the run; nothing is copied')

    def get(name: str) -> bool:
      local = folder / name
      aside = local.with_name(f'{local.name}.partial-{os.getpid()}')
      local.parent.mkdir(parents=True, exist_ok=True)
      try:
        with self.errors():
          try:
            self.fs.get_file(self.path(name), str(aside))
          except FileNotFoundError:
            return False
        os.replace(aside, local)
      finally:
        aside.unlink(missing_ok=True)
      return True
    return [name for name, found in zip(names, self._threads.map(get, names), strict=True) if not found]

  def delete(self, names: Iterable[str]) -> None:
    def delete(name: str) -> None:
      with self.errors('deleted'), contextlib.suppress(FileNotFoundError):
        self.fs.rm_file(self.path(name))
    list(self._threads.map(delete, names))

  def _with_folder(self, name: str, write: Callable[[str], Any]) -> None:
    """Calls write(path); storage that has folders (file://, sftp://) may lack that of the file.

    A run's own folder is made once: if it is gone later, its disk may be, and nothing is written in its place.
    """
    try:
      write(self.path(name))
    except FileNotFoundError:
      has_folders = FOLDERS.intersection([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol)
      if not has_folders or (self._has_root and not self.fs.exists(self._root)):
        raise
      self.fs.makedirs(self.path(name).rpartition('/')[0], exist_ok=True)
      write(self.path(name))
    self._has_root = True

  @contextlib.contextmanager
  def errors(self, what: str = 'read') -> Iterator[None]:
    """Turns errors of the file system into a StorageError that the storage cannot be read, written or deleted."""
    try:
      with remote_files(self.url):
        yield
    except DataError as e:
      raise StorageError(str(e).removesuffix(f'; {BY_HAND}').replace('cannot be read', f'cannot be {what}')) from None


class NotSavedError(Exception):
  """Why a step is not saved, although storage answers: trying again does not help."""


def persistently(act: Callable[[], T]) -> T:
  """act(), tried again while storage fails, up to TRIES times."""
  for attempt in range(TRIES - 1):
    with contextlib.suppress(StorageError):
      return act()
    time.sleep(WAIT * 2 ** attempt)
  return act()


def step_of(name: str) -> int | None:
  """The step of a file of a checkpoint, by its name in the run's folder."""
  first, _, rest = name.partition('/')
  step, inside, _ = rest.partition('/')
  return int(step) if first == 'checkpoints' and inside and step.isdigit() else None


def steps_in(names: Iterable[str]) -> list[int]:
  """The steps that are complete."""
  return sorted(int(name.split('/')[1]) for name in names
                if step_of(name) is not None and name.count('/') == 2 and name.endswith(f'/{MANIFEST}'))


def manifest_of(step: int) -> str:
  """The name of the manifest of a step."""
  return f'checkpoints/{step}/{MANIFEST}'


def small_files(names: Iterable[str]) -> list[str]:
  """The names of a run's files that are copied back, besides those of checkpoints."""
  return [name for name in names if step_of(name) is None and '/' not in name.removeprefix('checkpoints/')
          and name != OWNER and not any(part in name for part in LOCAL_ONLY)]
