"""The files of one run in object storage, by fsspec."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llm_jax.base.errors import DataError, StorageError
from llm_jax.base.files import MANIFEST
from llm_jax.extras.fetch import BY_HAND, remote_files

NUM_THREADS = 16
OWNER = 'launch.json'  # the launch that wrote a folder last, here and there
# Parts of the names of what is not copied.
LOCAL_ONLY = ('.lock', '.partial', '.unfinished', '.corrupt', '.rewound', '.unreadable')


class Bucket:
  """The files of one run there. Raises DataError, ConfigError."""

  def __init__(self, url: str):
    self.url = url.rstrip('/')
    logging.getLogger('gcsfs').setLevel(logging.ERROR)  # it warns at each call if it may not read the bucket's type
    with remote_files(self.url) as (fs, root):
      self.fs, self._root = fs, root.rstrip('/')
    self._has_root = False
    self._threads = ThreadPoolExecutor(NUM_THREADS, 'storage')

  def path(self, name: str) -> str:
    return f'{self._root}/{name}'

  def names(self) -> list[str]:
    with self.errors():
      self.fs.invalidate_cache()
      found = self.fs.find(self._root) if self.fs.exists(self._root) else []
    return sorted(path.removeprefix(f'{self._root}/') for path in found)

  def read(self, name: str) -> bytes | None:
    """The content of a file; None if there is none."""
    with self.errors():
      try:
        return self.fs.cat_file(self.path(name))
      except FileNotFoundError:
        return None

  def write(self, name: str, content: bytes) -> None:
    with self.errors():
      self._with_folder(name, lambda path: self.fs.pipe_file(path, content))

  def create(self, name: str, content: bytes) -> bool:
    """Writes a file if there is none; returns whether it did."""
    with self.errors():
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
      with self.errors():
        self._with_folder(name, lambda path: self.fs.put_file(str(local), path))
    list(self._threads.map(put, names))

  def get(self, folder: Path, names: Iterable[str]) -> None:
    """Copies files to a local folder; each is replaced at once, as others may read it."""
    def get(name: str) -> None:
      local = folder / name
      aside = local.with_name(f'{local.name}.partial-{os.getpid()}')
      local.parent.mkdir(parents=True, exist_ok=True)
      with self.errors():
        self.fs.get_file(self.path(name), str(aside))
      os.replace(aside, local)
    list(self._threads.map(get, names))

  def delete(self, names: Iterable[str]) -> None:
    for name in names:
      with self.errors(), contextlib.suppress(FileNotFoundError):
        self.fs.rm_file(self.path(name))

  def _with_folder(self, name: str, write: Callable[[str], Any]) -> None:
    """Calls write(path); storage that has folders (file://, sftp://) may lack that of the file.

    A run's own folder is made once: if it is gone later, its disk may be, and nothing is written in its place.
    """
    try:
      write(self.path(name))
    except FileNotFoundError:
      if self._has_root and not self.fs.exists(self._root):
        raise
      self.fs.makedirs(self.path(name).rpartition('/')[0], exist_ok=True)
      write(self.path(name))
    self._has_root = True

  def errors(self) -> contextlib.AbstractContextManager:
    """Turns errors of the file system into a DataError."""
    return _errors(self.url)


@contextlib.contextmanager
def _errors(url: str) -> Any:
  try:
    with remote_files(url):
      yield
  except DataError as e:
    raise StorageError(str(e).removesuffix(f'; {BY_HAND}')) from None


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
