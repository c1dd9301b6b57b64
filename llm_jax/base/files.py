"""Writes files atomically and never through a symbolic link, as a folder may come from someone else; finds runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.nearest import nearest

MANIFEST = 'manifest.json'  # of a checkpoint, and of a run


def write_file(path: Path, content: str | bytes, *, durable: bool = False) -> None:
  """Writes or replaces a file atomically; a link in its place is replaced, not followed. Raises OSError.

  With `durable` it is on disk afterwards.
  """
  aside = path.with_name(f'{path.name}.partial-{os.getpid()}')
  aside.unlink(missing_ok=True)
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_NOFOLLOW', 0)
  try:
    with os.fdopen(os.open(aside, flags, 0o666), 'wb') as f:
      f.write(content.encode() if isinstance(content, str) else content)
      f.flush()
      if durable:
        os.fsync(f.fileno())
    os.replace(aside, path)
  except OSError:
    with contextlib.suppress(OSError):
      aside.unlink(missing_ok=True)  # part of a file on a full disk
    raise
  if durable:
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
  """Writes the names in a folder to disk. Raises OSError."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def set_aside(path: Path, label: str) -> Path:
  """Renames a file or folder to NAME.LABEL-TIME and returns its new path. Raises OSError."""
  for n in itertools.count():
    aside = path.with_name(f'{path.name}.{label}-{time.time():.0f}' + (f'-{n}' if n else ''))
    if not os.path.lexists(aside):
      os.rename(path, aside)
      return aside
  raise AssertionError


def unused(folder: Path) -> Path:
  """A folder of a similar name that does not exist: runs/a_2."""
  return next(path for n in itertools.count(2) if not (path := folder.with_name(f'{folder.name}_{n}')).exists())


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Turns an OSError into the StorageError that `what` cannot be written."""
  try:
    yield
  except OSError as e:
    raise StorageError(f'{what} cannot be written: {e.strerror or e}') from None


def open_append(path: Path) -> TextIO:
  """Opens a file for appending. Raises OSError, also for a link."""
  flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, 'O_NOFOLLOW', 0)
  return os.fdopen(os.open(path, flags, 0o666), 'a')


def check_no_link(path: Path) -> Path:
  """Returns the path. Raises StorageError if it is a symbolic link, because writes would go elsewhere."""
  if path.is_symlink():
    raise StorageError(f'{path} is a link to {os.readlink(path)}, and nothing is written through links; remove it')
  return path


def check_run(folder: Path, flag: str = '--workdir', file: str = 'config.json') -> Path:
  """Returns the folder. Raises ConfigError, with the nearest runs, if it lacks the file that every run has."""
  try:
    if (folder / file).is_file():
      return folder
  except OSError as e:
    raise ConfigError(f'{flag}: {folder} cannot be read: {e.strerror}') from None
  if file == 'config.json' and (folder / 'status.json').is_file():
    raise ConfigError(f'{flag}: the run in {folder} has not trained a step yet')
  problem = f'does not contain a run (no {file})' if folder.exists() else 'does not exist'
  names = {Path(run).name: run for run in list_runs(folder, file)}
  near = nearest(folder.name, names)
  hint = f'did you mean {names[near]}?' if near else f'runs here: {", ".join([*names.values()][:8]) or "none"}'
  raise ConfigError(f'{flag}: {folder} {problem}; {hint}')


def saved_steps(folder: Path) -> list[int]:
  """The steps with a checkpoint in a run's folder checkpoints/: those that have a manifest."""
  return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit() and (path / MANIFEST).is_file())


def unverified_steps(folder: Path) -> list[int]:
  """The steps in checkpoints/ without a manifest: of an earlier version, or copied in part."""
  return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit() and not (path / MANIFEST).is_file())


def latest_step(workdir: Path) -> int:
  """The latest step with a checkpoint in a run's folder; -1 if there is none."""
  return max(saved_steps(workdir / 'checkpoints'), default=-1)


def check_checkpoint(workdir: Path, name: str) -> None:
  """Raises ConfigError for a name other than latest and best that is no step of a run's checkpoints."""
  steps = saved_steps(workdir / 'checkpoints')
  if steps and name not in ('latest', 'best') and not (name.isdigit() and int(name) in steps):
    raise ConfigError(f'--checkpoint: must be latest, best, or a step of {steps}; got {name!r}')


def list_runs(folder: Path, file: str = 'config.json') -> list[str]:
  """The runs in a folder, beside it, and in runs/; up to two levels deep."""
  places = [(folder, '*'), (folder.parent, '*'), (Path('runs'), '*'), (Path('runs'), '*/*')]
  with contextlib.suppress(OSError):
    return list(dict.fromkeys(
        str(path.parent) for place, depth in places for path in sorted(place.glob(f'{depth}/{file}'))))
  return []
