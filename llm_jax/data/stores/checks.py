"""Checks of a store against the hashes in its manifest: a small store when it is opened; of a large one, each block of
tokens before it is first used, while a thread checks the rest.

Tokens have a CRC-32 for each BLOCK bytes, in NAME.tokens.crc, which has a sha256 in the manifest as all files do.
"""

from __future__ import annotations

import hashlib
import threading
import time
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.base.progress import Progress

BLOCK = 1 << 16  # bytes: some 20 microseconds to check, and less than what a disk reads ahead
SMALL = 32 << 20  # bytes that are checked when a store is opened: some 30 ms
BACKGROUND_SECONDS = 60  # the rest of a very large store is checked block by block, when it is used
_PIECE = 1 << 20


class Problem:
  """What the thread has found; every later read raises it."""

  error: DataError | None = None
  thread: threading.Thread | None = None

  def wait(self) -> None:
    """Waits for the thread. Raises what it has found."""
    if self.thread is not None:
      self.thread.join()
    if self.error is not None:
      raise self.error


class BlockChecks:
  """The checks of one file of tokens. In another process they begin anew."""

  def __init__(self, path: Path, problem: Problem):
    self.path, self.problem = path, problem
    self.all_done = False

  def __reduce__(self) -> tuple:
    return BlockChecks, (self.path, Problem())

  @cached_property
  def _expected(self) -> list[int]:
    return np.fromfile(f'{self.path}.crc', '<u4').tolist()

  @cached_property
  def _done(self) -> bytearray:
    return bytearray(len(self._expected))

  def before(self, data: np.ndarray, begin: int, end: int) -> None:
    """Checks the blocks of bytes [begin, end) that were not checked yet; `data`: the file's bytes, mapped."""
    if self.problem.error is not None:
      raise self.problem.error
    if self.all_done:
      return
    done = self._done
    for block in range(begin // BLOCK, -(-end // BLOCK)):
      if not done[block]:
        self._check(block, data[block * BLOCK:(block + 1) * BLOCK])

  def check_all(self, deadline: float) -> None:
    """Reads the file and checks the blocks that are left, until the deadline."""
    with open(self.path, 'rb') as file:
      for first in range(0, len(self._done), _PIECE // BLOCK):
        if time.monotonic() > deadline:
          return
        piece = file.read(_PIECE)
        for block in range(first, min(first + _PIECE // BLOCK, len(self._done))):
          if not self._done[block]:
            self._check(block, piece[(block - first) * BLOCK:(block - first + 1) * BLOCK])
    self.all_done = True

  def _check(self, block: int, data: Any) -> None:
    """Raises DataError."""
    if zlib.crc32(data) != self._expected[block]:
      raise DataError(f'{self.path}: damaged between bytes {block * BLOCK} and {block * BLOCK + len(data)}: the '
                      'checksum differs from the one that was written with it; delete the folder and start again')
    self._done[block] = 1


def checks_of(folder: Path, files: dict[str, dict]) -> dict[str, BlockChecks]:
  """Checks the files of a small store, or the small files of a large one; by name, the checks of its tokens to come.

  `files`: {name: {'size': bytes, 'sha256': hex}} of the manifest. Raises DataError.
  """
  if sum(entry['size'] for entry in files.values()) <= SMALL:
    check_files(folder, files)
    return {}
  later = [name for name, entry in files.items() if name.endswith('.tokens') or entry['size'] > SMALL]
  check_files(folder, {name: entry for name, entry in files.items() if name not in later})
  problem = Problem()
  blocks = {name: BlockChecks(folder / name, problem) for name in later if name.endswith('.tokens')}
  columns = {name: files[name] for name in later if name not in blocks}
  problem.thread = threading.Thread(target=_check_later, args=(folder, columns, list(blocks.values()), problem),
                                    daemon=True, name='check of the token store')
  problem.thread.start()
  return blocks


def _check_later(folder: Path, columns: dict[str, dict], blocks: list[BlockChecks], problem: Problem) -> None:
  deadline = time.monotonic() + BACKGROUND_SECONDS
  try:
    check_files(folder, columns)
    for part in blocks:
      part.check_all(deadline)
  except DataError as e:
    problem.error = e
  except OSError as e:
    problem.error = DataError(f'{folder}: cannot be read: {e.strerror or e}')


def check_files(folder: Path, files: dict[str, dict], shown: bool = False) -> None:
  """Checks the sha256 of each file. Raises DataError naming the first one that differs."""
  with Progress(f'verifying {folder.name}', sum(entry['size'] for entry in files.values()), 'B', shown=shown) as bar:
    for name, entry in files.items():
      if (found := file_sha256(folder / name)) != entry['sha256']:
        raise DataError(f'{folder / name}: sha256 is {found}, the manifest says {entry["sha256"]}: '
                        'the file is damaged; delete the folder and start again')
      bar.update(entry['size'])


def write_crc(path: Path) -> str:
  """Writes the checksums of the file's blocks to NAME.crc, and returns the file's sha256."""
  digest, sums = hashlib.sha256(), []
  with open(path, 'rb') as file:
    while piece := file.read(_PIECE):
      digest.update(piece)
      sums += [zlib.crc32(piece[begin:begin + BLOCK]) for begin in range(0, len(piece), BLOCK)]
  np.array(sums, '<u4').tofile(f'{path}.crc')
  return digest.hexdigest()


def file_sha256(path: Path) -> str:
  try:
    digest = hashlib.sha256()
    with open(path, 'rb', buffering=0) as f:
      while piece := f.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None
