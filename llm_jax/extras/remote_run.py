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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.errors import ConfigError, DataError, StorageError
from llm_jax.base.files import MANIFEST, saved_steps, write_file
from llm_jax.base.multihost import gather
from llm_jax.base.progress import Progress
from llm_jax.base.registry import NoSettings, register
from llm_jax.base.runtime import user_cache
from llm_jax.base.storage import STORAGE
from llm_jax.config import CheckpointConfig
from llm_jax.data.given import FILE
from llm_jax.data.sources.documents import shown
from llm_jax.extras.fetch import remote_files
from llm_jax.extras.remote_lock import RemoteLock
from llm_jax.training.manifest import damage
from llm_jax.training.retention import kept, read_scores

OWNER = 'launch.json'  # the launch that wrote a folder last, here and there
EVERY = 10.0  # seconds between two copies
LARGE, EVERY_LARGE = 1 << 20, 60.0  # a small file of so many bytes is copied less often
NUM_THREADS = 16
LAST_TRIES, WAIT = 6, 2.0  # to copy at the end of a run; seconds before the second try, doubled for each further one
# Parts of the names of what is not copied.
LOCAL_ONLY = ('.lock', '.partial', '.unfinished', '.corrupt', '.rewound', '.unreadable')


class Bucket:
  """The files of one run there. Raises DataError, ConfigError."""

  def __init__(self, url: str):
    self.url = url.rstrip('/')
    with remote_files(self.url) as (fs, root):
      self.fs, self._root = fs, root.rstrip('/')
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
      self.fs.pipe_file(self.path(name), content)

  def put(self, folder: Path, names: Iterable[str]) -> None:
    """Copies files of a local folder. Raises FileNotFoundError if one is not there any more."""
    def put(name: str) -> None:
      local = folder / name
      if not local.exists():
        raise FileNotFoundError(name)
      with self.errors():
        self.fs.put_file(str(local), self.path(name))
    list(self._threads.map(put, names))

  def get(self, folder: Path, names: Iterable[str]) -> None:
    """Copies files to a local folder."""
    def get(name: str) -> None:
      local = folder / name
      local.parent.mkdir(parents=True, exist_ok=True)
      with self.errors():
        self.fs.get_file(self.path(name), str(local))
    list(self._threads.map(get, names))

  def delete(self, names: Iterable[str]) -> None:
    for name in names:
      with self.errors(), contextlib.suppress(FileNotFoundError):
        self.fs.rm_file(self.path(name))

  def errors(self) -> contextlib.AbstractContextManager:
    """Turns errors of the file system into a DataError."""
    return _errors(self.url)


@contextlib.contextmanager
def _errors(url: str) -> Any:
  try:
    with remote_files(url):
      yield
  except DataError as e:
    raise StorageError(str(e)) from None


class RemoteRun:
  """A run whose folder is a URL. A context manager: within it, what changes in `folder` is copied there.

  Process 0 copies; the processes of other hosts must see the same local folder. Raises StorageError, ConfigError.
  """

  def __init__(self, url: str, retention: CheckpointConfig):
    self.url, self._retention = url.rstrip('/'), retention
    self.folder = user_cache() / 'runs' / _local_name(self.url)
    self._launch = uuid.uuid4().hex
    self._copied: dict[str, tuple[int, int, float]] = {}  # (time of change, size, when it was copied) by name
    self._steps: dict[int, bytes | None] = {}  # complete there, with their manifests
    self._problem, self._stopping = '', threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> RemoteRun:
    problem = ''
    if jax.process_index() == 0:
      try:
        self._begin()
      except (StorageError, ConfigError, OSError) as e:
        problem = str(e)
    launches = gather([problem, self._launch])
    if problem := launches[0][0]:
      raise StorageError(problem)
    if not all(gather(_launch_of(self.folder) == launches[0][1])):
      self.__exit__()
      raise ConfigError(f'--workdir: {shown(self.url)} is copied from {self.folder}, which other hosts do not see; set '
                        'LLM_JAX_CACHE to a folder that all hosts share')
    return self

  def __exit__(self, *exc: object) -> None:
    if self._thread is None:
      return
    self._stopping.set()
    self._thread.join()
    with Progress(f'copying the run to {shown(self.url)}'):
      for attempt in range(LAST_TRIES):
        try:
          self._copy(last=True)
          break
        except StorageError as e:
          if attempt == LAST_TRIES - 1:
            raise StorageError(f'{shown(self.url)}: the end of the run could not be copied there ({e}); {self.folder} '
                               'has all of it, and the same command on this host copies it') from None
          time.sleep(WAIT * 2 ** attempt)
    self._lock.release()

  def _begin(self) -> None:
    self._bucket = Bucket(self.url)
    self._lock = RemoteLock(self._bucket, self._launch)
    self._lock.acquire()
    try:
      self._pull()
      owner = json.dumps({'launch': self._launch}).encode()
      self._bucket.write(OWNER, owner)
      write_file(self.folder / OWNER, owner)
    except BaseException:
      self._lock.release()
      raise
    print(f'workdir: {shown(self.url)}, copied from {self.folder} every {EVERY:.0f} s', flush=True)
    self._thread = threading.Thread(target=self._work, name='copy of the run', daemon=True)
    self._thread.start()

  def _pull(self) -> None:
    """Makes the local folder equal the run there, unless the launch before was of this host, which is ahead."""
    names = self._bucket.names()
    self._steps = {step: self._bucket.read(_manifest(step)) for step in steps_in(names)}
    content = self._bucket.read(OWNER)
    if content is not None and content == _content_of(self.folder / OWNER):
      return
    data = _content_of(self.folder / FILE)  # just passed from Python: if other data are there, resuming reports it
    keep = {step for step, content in self._steps.items() if content == _content_of(self.folder / _manifest(step))}
    for path in [*self.folder.glob('checkpoints/*'), *self.folder.glob('*')]:
      if path.name not in map(str, keep) and path.name != 'checkpoints':
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    self.folder.mkdir(parents=True, exist_ok=True)
    pull(self._bucket, self.folder, names)
    if data is not None:
      write_file(self.folder / FILE, data)

  def _work(self) -> None:
    while not self._stopping.wait(EVERY):
      try:
        self._lock.beat()
        self._copy()
        if self._problem:
          print(f'{shown(self.url)}: can be written again; all was copied', flush=True)
        self._problem = ''
      except (StorageError, OSError) as e:
        if not self._problem:
          print(f'WARNING: {shown(self.url)}: cannot be written ({e}); training continues in {self.folder}, and what '
                'is missing there is copied later', file=sys.stderr, flush=True)
        self._problem = str(e)

  def _copy(self, last: bool = False) -> None:
    """Copies what has changed, and deletes the steps there that need not be kept. Raises StorageError."""
    manifests = {step: _content_of(self.folder / _manifest(step)) for step in saved_steps(self.folder / 'checkpoints')}
    # Gone back, or damaged there: first, so that no host takes a step there for one of this run.
    for step in [step for step, content in self._steps.items() if manifests and (
        step > max(manifests) or manifests.get(step, content) != content)]:
      self._delete(step)
    for name, state in self._changed(last):
      with contextlib.suppress(FileNotFoundError):
        self._bucket.put(self.folder, [name])
        self._copied[name] = state
    local = set(manifests)
    for step in sorted(local - self._steps.keys(), reverse=True):
      folder = self.folder / 'checkpoints' / str(step)
      files = [path.relative_to(self.folder).as_posix() for path in folder.rglob('*') if path.is_file()]
      with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, as a newer one is there
        self._bucket.put(self.folder, [name for name in files if name != _manifest(step)])
        self._bucket.put(self.folder, [_manifest(step)])
        self._steps[step] = manifests[step]
    everywhere = self._steps.keys() | local
    keep = local | kept(everywhere, read_scores(self.folder / 'checkpoints', everywhere), self._retention)
    for step in self._steps.keys() - keep:
      self._delete(step)

  def _delete(self, step: int) -> None:
    """Deletes a step there, its manifest first."""
    names = [name for name in self._bucket.names() if name.startswith(f'checkpoints/{step}/')]
    self._bucket.delete(sorted(names, key=lambda name: name != _manifest(step)))
    self._bucket.delete([f'checkpoints/{step}.score.json'])
    self._copied.pop(f'checkpoints/{step}.score.json', None)
    del self._steps[step]

  def _changed(self, last: bool) -> list[tuple[str, tuple[int, int, float]]]:
    """The small files to copy now, with their state."""
    found, now = [], time.monotonic()
    for path in sorted(self.folder.rglob('*')):
      name = path.relative_to(self.folder).as_posix()
      reports = name.startswith('processes/') and path.suffix != '.stacks'  # of the watchdog
      if step_of(name) is not None or name == OWNER or reports or any(part in name for part in LOCAL_ONLY):
        continue
      with contextlib.suppress(OSError):
        if path.is_file() and not path.is_symlink():
          stat, before = path.stat(), self._copied.get(name, (0, -1, float('-inf')))
          waits = stat.st_size > LARGE and now < before[2] + EVERY_LARGE and not last
          if (stat.st_mtime_ns, stat.st_size) != before[:2] and not waits:
            found.append((name, (stat.st_mtime_ns, stat.st_size, now)))
    return found

  @staticmethod
  def read(url: str, checkpoint: str = 'latest') -> Path:
    """A local folder with the run and one checkpoint. Raises StorageError, ConfigError."""
    bucket, folder = Bucket(url), user_cache() / 'read' / _local_name(url.rstrip('/'))
    names = bucket.names()
    if 'config.json' not in names:
      raise ConfigError(f'--workdir: {shown(url)} does not contain a run (no config.json)')
    for path in [*folder.glob('checkpoints/*.score.json'), *(p for p in folder.glob('*') if p.is_file())]:
      path.unlink()
    for step in saved_steps(folder / 'checkpoints'):
      if f'checkpoints/{step}/{MANIFEST}' not in names:
        shutil.rmtree(folder / 'checkpoints' / str(step))
    folder.mkdir(parents=True, exist_ok=True)
    pull(bucket, folder, names, checkpoint)
    return folder


def _manifest(step: int) -> str:
  return f'checkpoints/{step}/{MANIFEST}'


def pull(bucket: Bucket, folder: Path, names: list[str], checkpoint: str = 'latest') -> None:
  """Copies a run's small files and one checkpoint to a local folder: the newest one that is intact, or the named one.

  Raises StorageError.
  """
  with Progress(f'copying the run from {shown(bucket.url)}'):
    bucket.get(folder, [name for name in names if step_of(name) is None and '/' not in name.removeprefix('checkpoints/')
                        and name != OWNER and not any(part in name for part in LOCAL_ONLY)])
    steps = steps_in(names)
    scores = read_scores(folder / 'checkpoints', steps)
    if checkpoint == 'best' and scores:
      steps = [min(scores, key=lambda step: scores[step])]
    elif checkpoint.isdigit() and int(checkpoint) in steps:
      steps = [int(checkpoint)]
    for step in sorted(steps, reverse=True):
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


def step_of(name: str) -> int | None:
  """The step of a file of a checkpoint, by its name in the run's folder."""
  first, _, rest = name.partition('/')
  step, inside, _ = rest.partition('/')
  return int(step) if first == 'checkpoints' and inside and step.isdigit() else None


def steps_in(names: Iterable[str]) -> list[int]:
  """The steps that are complete."""
  return sorted(int(name.split('/')[1]) for name in names
                if step_of(name) is not None and name.count('/') == 2 and name.endswith(f'/{MANIFEST}'))


def _local_name(url: str) -> str:
  return f'{url.rsplit("/", 1)[1]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}'


def _content_of(path: Path) -> bytes | None:
  return path.read_bytes() if path.is_file() else None


def _launch_of(folder: Path) -> str:
  with contextlib.suppress(OSError, ValueError, KeyError):
    return json.loads((folder / OWNER).read_text())['launch']
  return ''


register(STORAGE, 'remote', RemoteRun, NoSettings)
