"""Writes files atomically and never through a symbolic link, as a folder may come from someone else."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from llm_jax.base.errors import StorageError


def write_file(path: Path, content: str | bytes) -> None:
  """Writes or replaces a file atomically; a link in its place is replaced, not followed. Raises OSError."""
  aside = path.with_name(f'{path.name}.partial-{os.getpid()}')
  aside.unlink(missing_ok=True)
  flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, 'O_NOFOLLOW', 0)
  with os.fdopen(os.open(aside, flags, 0o666), 'wb') as f:
    f.write(content.encode() if isinstance(content, str) else content)
  os.replace(aside, path)


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
