"""The folder of a run, which may be a URL of object storage; extras/remote_run.py registers what copies it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.registry import Registry

# 'remote': a class with open(url, retention) -> what has a local `folder` and is a context manager that copies it to
# the URL while a run trains in it; and read(url, checkpoint) -> a local folder with the run. 'hub': read(name) for
# hf:name.
STORAGE = Registry('storage')


_urls: dict[Path, str] = {}  # by local folder
_fetchers: dict[Path, Any] = {}  # by local folder: what copies there what is needed of a checkpoint
_parts: dict[Path, Any] = {}  # by local folder, while a run trains in it: what copies from there what a process saved


HUB = 'hf:'  # before the name of a published model: hf:org/name


def is_remote(workdir: str | Path) -> bool:
  return '://' in str(workdir)


def is_published(folder: str | Path) -> bool:
  """Whether it names a published model, and is no folder here."""
  return str(folder).startswith(HUB) and not Path(folder).exists()


def open_workdir(workdir: str | Path, retention: Any) -> tuple[Path, AbstractContextManager]:
  """(the local folder to train in, a context manager to train within). Raises ConfigError, StorageError."""
  if not is_remote(workdir):
    return Path(workdir), contextlib.nullcontext()
  remote = STORAGE['remote'].open(str(workdir), retention)
  _urls[remote.folder] = str(workdir)
  return remote.folder, remote


def read_workdir(workdir: str | Path, checkpoint: str = 'latest') -> Path:
  """A local folder with the run and this checkpoint; `workdir` may be the result of a call before.

  A published model, as hf:org/name, is downloaded first. Raises ConfigError, StorageError.
  """
  if is_published(workdir):
    return STORAGE['hub'].read(str(workdir).removeprefix(HUB))
  url = _urls[Path(workdir)] if Path(workdir) in _fetchers else str(workdir)
  return STORAGE['remote'].read(url, checkpoint) if is_remote(url) else Path(workdir).expanduser()


def read_start(run: str, checkpoint: str = 'latest') -> Path:
  """read_workdir of config.start.run. Raises ConfigError."""
  try:
    return read_workdir(run, checkpoint)
  except (StorageError, ConfigError) as e:
    raise as_start_error(e) from None


def as_start_error(error: Exception) -> ConfigError:
  """An error about a run as one about config.start."""
  return ConfigError(str(error).replace('--workdir', 'config.start.run')
                     .replace('--checkpoint', 'config.start.checkpoint'))


def fetch_from(folder: Path, url: str, fetcher: Any) -> None:
  """Notes that a local folder gets the files of the checkpoints at a URL when they are read.

  `fetcher` has fetch(step, items), which copies metadata, and then fetch_shards(step, trees); both raise DamagedError
  and UnreachableError.
  """
  _urls[folder], _fetchers[folder] = url, fetcher


def fetcher_of(folder: Path) -> Any:
  """The `fetcher` of `fetch_from`; None for a folder that has its files."""
  return _fetchers.get(folder)


@contextlib.contextmanager
def keeping_parts(folder: Path, parts: Any) -> Iterator[None]:
  """Within it, `folder` has what this process saves of a run, and no other process sees it.

  parts.push(step, problem) copies that to storage; all processes call it.
  """
  _parts[folder] = parts
  try:
    yield
  finally:
    del _parts[folder]


def own_parts(folder: Path) -> Any:
  """The `parts` of `keeping_parts`; None for a folder that all processes see."""
  return _parts.get(folder)


def place_of(folder: Path) -> str:
  """Where a run is, for messages: its folder, or the URL of which that is a copy."""
  return _urls.get(folder, str(folder))
