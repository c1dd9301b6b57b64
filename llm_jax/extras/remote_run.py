"""Runs in object storage (gs://, s3:// and others of fsspec): training uses a local folder, whose changes are copied.

Small files are copied whole. A checkpoint counts there once its manifest is there, which is copied last; what is read
back is verified by the manifest's hashes. The same design serves all kinds of storage, and training never waits for a
network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import filelock
import jax

from llm_jax.base.errors import ConfigError, StorageError, UserError
from llm_jax.base.files import saved_steps, write_file
from llm_jax.base.multihost import all_see, gather
from llm_jax.base.progress import Progress
from llm_jax.base.registry import NoSettings, register
from llm_jax.base.runtime import user_cache
from llm_jax.base.storage import STORAGE, fetch_from
from llm_jax.config import CheckpointConfig
from llm_jax.data.given import FILE
from llm_jax.data.sources.documents import shown
from llm_jax.extras.bucket import (
  LOCAL_ONLY,
  OWNER,
  SAVING,
  Bucket,
  manifest_of,
  persistently,
  small_files,
  step_of,
  steps_in,
)
from llm_jax.extras.remote_lock import TAKEN, RemoteLock
from llm_jax.extras.remote_steps import RemoteSteps
from llm_jax.training.manifest import damage
from llm_jax.training.retention import kept, read_scores

EVERY = 10.0  # seconds between two copies
LARGE, EVERY_LARGE = 1 << 20, 60.0  # a small file of so many bytes is copied less often


class RemoteRun:
  """A run whose folder is a URL. A context manager: within it, what changes in `folder` is copied there by process 0.

  All processes see the same local folder; extras/remote_parts.py is for hosts that share none. Raises StorageError.
  """

  def __init__(self, url: str, retention: CheckpointConfig):
    self.url, self._retention = url.rstrip('/'), retention
    self.folder = user_cache() / 'runs' / _local_name(self.url)
    self._launch = uuid.uuid4().hex
    self._copied: dict[str, tuple[int, int, float]] = {}  # (time of change, size, when it was copied) by name
    self._steps: dict[int, bytes | None] = {}  # complete there, with their manifests
    self._problem, self._stopping = '', threading.Event()
    self._lock: RemoteLock | None = None  # which process 0 holds
    self._released = threading.Event()
    self._beats: threading.Thread | None = None
    self._copies: threading.Thread | None = None
    self._meanwhile = f'training continues in {self.folder}, and what is missing there is copied later'
    self._kept = f'{self.folder} has all of it, and the same command on this host copies it'

  @staticmethod
  def open(url: str, retention: CheckpointConfig) -> RemoteRun:
    """The run at a URL, by what its processes share. All processes call this together. Raises StorageError."""
    if all_see(user_cache()):
      return RemoteRun(url, retention)
    from llm_jax.extras.remote_parts import RemoteParts
    return RemoteParts(url, retention)

  def __enter__(self) -> RemoteRun:
    self._together(self._begin if jax.process_index() == 0 else lambda: None)
    return self

  def __exit__(self, *exc: object) -> None:
    if self._copies is None:
      return
    self._stopping.set()
    self._copies.join()
    self._copies = None
    try:
      if self._is_lost():
        raise StorageError(TAKEN)
      with Progress(f'copying the run to {shown(self.url)}', shown=jax.process_index() == 0):
        persistently(partial(self._copy, last=True))
    except StorageError as e:
      raise StorageError(f'{shown(self.url)}: the end of the run could not be copied there ({e}); '
                         f'{self._kept}') from None
    finally:
      self._release()

  def _is_lost(self) -> bool:
    """Whether another run has taken the lock, as far as storage says."""
    with contextlib.suppress(StorageError):
      return self._lock is not None and self._lock.is_lost
    return False

  def _together(self, act: Callable[[], None]) -> None:
    """Calls act() on all processes. Raises StorageError on all of them if it fails on one."""
    problem = ''
    try:
      act()
    except Exception as e:  # any, as the other processes wait
      problem = str(e) if isinstance(e, UserError | OSError) else f'{type(e).__name__}: {e}'
    except BaseException:
      self._release()
      raise
    if problem := next(filter(None, gather(problem)), ''):
      self._release()
      raise StorageError(problem)

  def _release(self) -> None:
    self._released.set()
    if self._beats is not None:
      self._beats.join()
      self._beats = None
    if self._lock is not None and not self._is_lost():
      with contextlib.suppress(StorageError):  # then it becomes stale
        self._lock.release()
    self._lock = None

  def _begin(self) -> None:
    self._bucket = Bucket(self.url)
    self._acquire()
    self._delete_unfinished()
    self._pull()
    self._own()
    self._start(f'copied from {self.folder} every {EVERY:.0f} s')

  def _acquire(self) -> None:
    lock = RemoteLock(self._bucket, self._launch)
    lock.acquire()
    self._lock = lock
    self._released.clear()
    self._beats = threading.Thread(target=self._beat, args=(lock,), name='lock of the run', daemon=True)
    self._beats.start()

  def _own(self) -> None:
    """Notes there and here that this launch is the last one to write."""
    owner = json.dumps({'launch': self._launch}).encode()
    self._bucket.write(OWNER, owner)
    write_file(self.folder / OWNER, owner)

  def _start(self, how: str) -> None:
    if jax.process_index() == 0:
      print(f'workdir: {shown(self.url)}, {how}', flush=True)
    self._stopping.clear()
    self._copies = threading.Thread(target=self._work, name='copy of the run', daemon=True)
    self._copies.start()

  def _is_ahead(self) -> bool:
    """Whether the launch before was of this host, whose folder may have more than what is there."""
    content = self._bucket.read(OWNER)
    return content is not None and content == _content_of(self.folder / OWNER)

  def _read_steps(self, names: list[str]) -> None:
    self._steps = {step: self._bucket.read(manifest_of(step)) for step in steps_in(names)}

  def _delete_unfinished(self) -> None:
    """Deletes the files of steps that a launch without a common folder has begun to save, and not finished."""
    names = self._bucket.names()
    begun = {step_of(name) for name in names if name.endswith(f'/{SAVING}')} - set(steps_in(names))
    self._bucket.delete([name for name in names if step_of(name) in begun])

  def _pull(self) -> None:
    """Makes the local folder equal the run there, unless this host is ahead."""
    names = self._bucket.names()
    self._read_steps(names)
    if self._is_ahead():
      return
    with self._cleared({step for step, content in self._steps.items()
                        if content == _content_of(self.folder / manifest_of(step))}):
      pull(self._bucket, self.folder, names)

  @contextlib.contextmanager
  def _cleared(self, keep: set[int]) -> Iterator[None]:
    """The local folder without what is there, but for some checkpoints and data that were just passed from Python."""
    data = _content_of(self.folder / FILE)  # if other data are there, resuming reports it
    for path in [*self.folder.glob('checkpoints/*'), *self.folder.glob('*')]:
      if path.name not in map(str, keep) and path.name != 'checkpoints':
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (self.folder / 'checkpoints').mkdir(parents=True, exist_ok=True)  # storage has no empty folders
    yield
    if data is not None:
      write_file(self.folder / FILE, data)

  def _beat(self, lock: RemoteLock) -> None:
    """Renews the lock, however long copies take."""
    while not self._released.wait(EVERY):
      with contextlib.suppress(StorageError):  # _work says what fails
        lock.beat()

  def _work(self) -> None:
    while not self._stopping.wait(EVERY):
      try:
        if self._is_lost():
          raise StorageError(TAKEN)
        self._copy()
        if self._problem:
          print(f'{shown(self.url)}: can be written again; all was copied', flush=True)
        self._problem = ''
      except (StorageError, OSError) as e:
        if not self._problem:
          print(f'WARNING: {shown(self.url)}: cannot be written ({e}); {self._meanwhile}', file=sys.stderr,
                flush=True)
        self._problem = str(e)

  def _copy(self, last: bool = False) -> None:
    """Copies what has changed, and deletes the steps there that need not be kept. Raises StorageError."""
    local = saved_steps(self.folder / 'checkpoints')
    manifests = {step: _content_of(self.folder / manifest_of(step)) for step in local}
    # Gone back, or damaged there: first, so that no host takes a step there for one of this run.
    for step in [step for step, content in self._steps.items() if manifests and (
        step > max(manifests) or manifests.get(step, content) != content)]:
      self._delete(step)
    new = sorted(manifests.keys() - self._steps.keys(), reverse=True)
    self._copy_small_files(last or bool(new))  # first, so that the metrics up to a step are there
    for step in new:
      folder = self.folder / 'checkpoints' / str(step)
      files = [path.relative_to(self.folder).as_posix() for path in folder.rglob('*') if path.is_file()]
      with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, as a newer one is there
        self._bucket.put(self.folder, [name for name in files if name != manifest_of(step)])
        self._bucket.put(self.folder, [manifest_of(step)])
        self._steps[step] = manifests[step]
    self._delete_old(set(manifests))

  def _copy_small_files(self, last: bool) -> None:
    for name, state in self._changed(last):
      with contextlib.suppress(FileNotFoundError):
        self._bucket.put(self.folder, [name])
        self._copied[name] = state

  def _delete_old(self, local: set[int]) -> None:
    """Deletes the steps there that need not be kept."""
    everywhere = self._steps.keys() | local
    keep = local | kept(everywhere, read_scores(self.folder / 'checkpoints', everywhere), self._retention)
    for step in self._steps.keys() - keep:
      self._delete(step)

  def _delete(self, step: int) -> None:
    """Deletes a step there, its manifest first."""
    self._bucket.delete([manifest_of(step)])
    self._bucket.delete([*self._bucket.names(f'checkpoints/{step}'), f'checkpoints/{step}.score.json'])
    self._copied.pop(f'checkpoints/{step}.score.json', None)
    self._steps.pop(step, None)

  def _changed(self, last: bool) -> list[tuple[str, tuple[int, int, float]]]:
    """The small files to copy now, with their state."""
    found, now = [], time.monotonic()
    for path in sorted(self.folder.rglob('*')):
      name = path.relative_to(self.folder).as_posix()
      reports = name.startswith('processes/') and path.suffix != '.stacks'  # of the watchdog
      if step_of(name) is not None or name == OWNER or reports or any(part in name for part in LOCAL_ONLY):
        continue
      if not self._writes(name):
        continue
      with contextlib.suppress(OSError):
        if path.is_file() and not path.is_symlink():
          stat, before = path.stat(), self._copied.get(name, (0, -1, float('-inf')))
          waits = stat.st_size > LARGE and now < before[2] + EVERY_LARGE and not last
          if (stat.st_mtime_ns, stat.st_size) != before[:2] and not waits:
            found.append((name, (stat.st_mtime_ns, stat.st_size, now)))
    return found

  def _writes(self, name: str) -> bool:
    """Whether this process copies a small file."""
    return True

  @staticmethod
  def read(url: str, checkpoint: str = 'latest') -> Path:
    """A local folder with the run, which gets what is needed of a checkpoint when that is read.

    Raises StorageError, ConfigError.
    """
    bucket, folder = Bucket(url), user_cache() / 'read' / _local_name(url.rstrip('/'))
    names = bucket.names()
    if 'config.json' not in names:
      raise ConfigError(f'--workdir: {shown(url)} does not contain a run (no config.json)')
    steps = steps_in(names)
    if checkpoint not in ('latest', 'best', *map(str, steps)):
      raise ConfigError(f'--checkpoint: must be latest, best, or a step of {steps}; got {checkpoint!r}')
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f'.{folder.name}.lock')):  # several processes of a host may read
      for path in [*folder.glob('checkpoints/*.score.json'), *(p for p in folder.glob('*') if p.is_file())]:
        if path.relative_to(folder).as_posix() not in names:
          path.unlink()
      for step in set(saved_steps(folder / 'checkpoints')) - set(steps):
        shutil.rmtree(folder / 'checkpoints' / str(step))
      folder.mkdir(parents=True, exist_ok=True)
      with Progress(f'copying the run from {shown(url)}'):
        bucket.get(folder, small_files(names))
      here = RemoteSteps(bucket, folder)
      here.note(steps)
    fetch_from(folder, url, here)
    return folder


def pull(bucket: Bucket, folder: Path, names: list[str]) -> None:
  """Copies a run's small files and its newest intact checkpoint to a local folder. Raises StorageError."""
  with Progress(f'copying the run from {shown(bucket.url)}'):
    bucket.get(folder, small_files(names))
    steps = steps_in(names)
    for step in reversed(steps):
      local = folder / 'checkpoints' / str(step)
      if not local.exists() or damage(local):
        shutil.rmtree(local, ignore_errors=True)
        bucket.get(folder, [name for name in names if step_of(name) == step])
      if not (problems := damage(local)):
        return
      shutil.rmtree(local)
      print(f'WARNING: {shown(bucket.url)}: damaged: step {step}: {"; ".join(problems[:3])}', file=sys.stderr,
            flush=True)
    if steps:
      raise StorageError(f'{shown(bucket.url)}: no checkpoint is intact; copy one back, or set --workdir to another '
                         'URL')


def _local_name(url: str) -> str:
  return f'{url.rsplit("/", 1)[1]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}'


def _content_of(path: Path) -> bytes | None:
  return path.read_bytes() if path.is_file() else None


register(STORAGE, 'remote', RemoteRun, NoSettings)
