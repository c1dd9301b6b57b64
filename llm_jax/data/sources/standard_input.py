"""Standard input and named pipes as data: they can be read once, so their bytes are kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import sys
import tempfile
from pathlib import Path

from llm_jax.base.errors import DataError, StorageError
from llm_jax.base.process import waiting
from llm_jax.base.progress import progress_bar
from llm_jax.data.sources.documents import File

STDIN = ('-', '/dev/stdin', '/dev/fd/0', '/proc/self/fd/0')
_SECONDS = 2  # to wait for a process that writes to a named pipe
_PIECE = 1 << 20


def is_pipe(path: str) -> bool:
  return path in STDIN or Path(path).is_fifo()


def keep_pipe(path: str, cache_dir: Path) -> File:
  """The file that holds what the pipe gave; equal bytes are one file. Raises DataError, StorageError."""
  name = 'stdin' if path in STDIN else Path(path).name
  source = _open_stdin() if path in STDIN else _open_pipe(path)
  folder, digest, count = cache_dir / 'pipes', hashlib.sha256(), 0
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with (os.fdopen(source, 'rb') as stream, tempfile.NamedTemporaryFile(dir=folder, delete=False) as kept,
          progress_bar(f'reading {name}', None, 'B') as bar):
      while piece := stream.read1(_PIECE):
        digest.update(piece)
        kept.write(piece)
        count += len(piece)
        bar.update(len(piece))
    target = folder / digest.hexdigest()[:32]
    if target.exists():
      Path(kept.name).unlink()  # a file that keeps its time is tokenized once
    else:
      os.replace(kept.name, target)
  except OSError as e:
    with contextlib.suppress(OSError, NameError):
      Path(kept.name).unlink(missing_ok=True)
    raise StorageError(f'{folder}: {path} cannot be kept there ({e.strerror or e}); set --config.data.cache_dir or '
                       'LLM_JAX_CACHE to a folder that can be written, with room') from None
  if not count:
    raise DataError(f'config.data.path: {path} gave no bytes; write the data to it, as in `zcat a.gz | llm-jax ...`')
  return File(name, target)


def _open_stdin() -> int:
  if sys.__stdin__ is None or sys.__stdin__.closed:
    raise DataError('config.data.path: standard input is closed; write the data to it, or name a file')
  if os.isatty(0):
    raise DataError('config.data.path: standard input is a terminal; write the data to it, as in '
                    '`zcat a.gz | llm-jax data prepare -`, or name a file')
  waiting('reading standard input')
  return os.dup(0)


def _open_pipe(path: str) -> int:
  """Opens a named pipe. Raises DataError if nothing writes to it within _SECONDS."""
  pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  ready = select.poll()
  ready.register(pipe, select.POLLIN)
  if not ready.poll(1000 * _SECONDS):
    os.close(pipe)
    raise DataError(f'config.data.path: {path} is a pipe to which nothing has written for {_SECONDS} seconds; start '
                    'the program that writes to it first')
  os.set_blocking(pipe, True)
  return pipe
