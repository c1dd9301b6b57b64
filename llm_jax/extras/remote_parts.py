"""Runs in object storage whose hosts share no folder: each process has its part of a checkpoint, the URL has all of it.

A save is complete once all parts are there and process 0 has added the manifest. To resume, a process copies back the
shards of its devices, so that the number of processes and the mesh may change.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import StorageError
from llm_jax.base.files import MANIFEST, saved_steps, write_file
from llm_jax.base.multihost import barrier
from llm_jax.base.reports import FOLDER, prepare_reports
from llm_jax.base.seal import file_hash, seal, unseal
from llm_jax.base.storage import keeping_parts
from llm_jax.config import CheckpointConfig
from llm_jax.data.sources.documents import shown
from llm_jax.extras.bucket import Bucket, manifest_of, small_files
from llm_jax.extras.coordinator_reports import CoordinatorReports
from llm_jax.extras.remote_run import RemoteRun
from llm_jax.training.manifest import VERSION, reason, step_manifest

_TURNS = itertools.count()  # as each barrier needs a name of its own
AT_ONCE = 64  # files of a checkpoint that are copied between two signs of progress


class RemoteParts(RemoteRun):
  """A run whose folder is a URL, for processes that see no common folder. Raises StorageError."""

  def __init__(self, url: str, retention: CheckpointConfig):
    super().__init__(url, retention)
    self._index, self._count = jax.process_index(), jax.process_count()
    self._whole = self.folder  # that of a launch whose processes shared it
    self.folder = self.folder.with_name(f'{self.folder.name}.process_{self._index}')
    self._mutex = threading.Lock()  # of _steps and _copied
    self._open = contextlib.ExitStack()
    self._kept = f'the newest lines of its logs are in {self.folder}'

  def __enter__(self) -> RemoteRun:
    self._together(self._prepare)
    self._together(self._pull)
    self._together(self._begin)
    self._open.enter_context(keeping_parts(self.folder, self.url, self))
    self._open.enter_context(CoordinatorReports(self.folder / FOLDER, self._index, self._count))
    return self

  def __exit__(self, *exc: object) -> None:
    self._open.close()
    super().__exit__(*exc)

  def _prepare(self) -> None:
    """Opens the storage; process 0 takes the lock, and copies what a launch before has left on its host."""
    self._bucket = Bucket(self.url)
    if self._index == 0:
      self._acquire()
      self._delete_incomplete()
      own, self.folder = self.folder, self._whole
      if self._is_ahead():
        self._read_steps(self._bucket.names())
        super()._copy(last=True)
        self._copied.clear()
      self.folder = own

  def _begin(self) -> None:
    if self._index == 0:
      self._own()
    else:
      prepare_reports(self.folder / FOLDER, self._count)
    self._start('where each process copies its part, as they share no folder (LLM_JAX_CACHE)')

  def _pull(self) -> None:
    """Copies the small files; what is needed of a checkpoint comes when it is read."""
    names = self._bucket.names()
    self._read_steps(names)
    with self._cleared(set(self._steps)):
      self._bucket.get(self.folder, small_files(names))
      for step in self._steps:
        self._note(step, {'step': step}, {})

  def _note(self, step: int, values: dict[str, Any], files: dict[str, Any]) -> None:
    """Writes the local manifest of a step, with the files that are here."""
    folder = self.folder / 'checkpoints' / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / MANIFEST, seal({'version': VERSION, **values, 'files': files}))

  def fetch(self, step: int, trees: dict[str, Any]) -> None:
    """Copies here the files of a step that have the shards of this process in `trees`.

    Raises StorageError, OSError, and ConfigError for other arrays than those of `trees`.
    """
    from llm_jax.training.orbax_io import is_shard, shards_here
    folder = self.folder / 'checkpoints' / str(step)
    try:
      manifest = unseal(self._bucket.read(manifest_of(step)) or b'')
    except ValueError as e:
      raise StorageError(f'{MANIFEST}: {reason(e)}') from None
    wanted = manifest.pop('files')
    common = {name for name in wanted if not is_shard(name, wanted)}
    self._get(folder, wanted, common)
    shards = shards_here(folder, trees) & wanted.keys() if common != wanted.keys() else set[str]()
    self._get(folder, wanted, shards)
    self._note(step, {name: manifest[name] for name in manifest if name != 'version'},
               {name: wanted[name] for name in common | shards})

  def _get(self, folder: Path, wanted: dict[str, Any], names: Collection[str]) -> None:
    """Copies files of a step here that are not here yet."""
    missing = [name for name in sorted(names) if not _is_here(folder / name, wanted[name])]
    for some in _groups(missing):
      self._bucket.get(self.folder, [f'checkpoints/{folder.name}/{name}' for name in some])
      ACTIVITY.sign()

  def push(self, step: int, problem: str) -> str:
    """Copies there what this process has saved of a step; process 0 adds the manifest. Returns what failed.

    All processes call it, also those with a `problem` of their own.
    """
    turn = next(_TURNS)
    if self._index == 0 and step in self._steps:
      problem = problem or self._try(self._forget, step)
    barrier(f'parts_begin_{turn}')  # a step that was rewound is not overwritten, but deleted before
    problem = problem or self._try(self._put_part, step)
    barrier(f'parts_{turn}')
    if self._index == 0:
      problem = problem or self._try(self._put_manifest, step)
      if problem:
        self._try(self._forget, step)
    return problem

  def _try(self, act: Any, step: int) -> str:
    try:
      act(step)
    except Exception as e:  # of many types, by storage
      return reason(e)
    return ''

  def _forget(self, step: int) -> None:
    with self._mutex:
      self._delete(step)

  def _put_part(self, step: int) -> None:
    """Copies this process's shards; process 0 also what all have in common. Their list comes last."""
    from llm_jax.training.orbax_io import is_shard
    folder = self.folder / 'checkpoints' / str(step)
    files = step_manifest(folder)['files']
    own = {name: files[name] for name in files if self._index == 0 or is_shard(name, files)}
    for some in _groups(sorted(own)):
      self._bucket.put(self.folder, [f'checkpoints/{step}/{name}' for name in some])
      if ACTIVITY.phase != 'step':
        ACTIVITY.sign()
    self._bucket.write(_part(step, self._index), json.dumps(own).encode())

  def _put_manifest(self, step: int) -> None:
    """Adds the manifest of all parts, with which the step counts."""
    parts = [self._bucket.read(_part(step, i)) for i in range(self._count)]
    if missing := [i for i, part in enumerate(parts) if part is None]:
      raise StorageError(f'{shown(self.url)}: process {missing[0]} did not copy its part of step {step}')
    values = step_manifest(self.folder / 'checkpoints' / str(step))
    files = {name: file for part in parts for name, file in json.loads(part or b'').items()}
    content = seal({**values, 'files': files})
    with self._mutex:
      self._copy_small_files(last=True)  # the metrics up to this step
      self._bucket.write(manifest_of(step), content)
      self._steps[step] = content
    self._bucket.delete([_part(step, i) for i in range(self._count)])

  def _copy(self, last: bool = False) -> None:
    """Copies small files; process 0 deletes the steps there that need not be kept. Raises StorageError."""
    with self._mutex:
      self._copy_small_files(last)
      if self._index == 0:
        local = set(saved_steps(self.folder / 'checkpoints'))
        for step in [step for step in self._steps if local and step > max(local)]:
          self._delete(step)  # gone back
        self._delete_old(local)

  def _writes(self, name: str) -> bool:
    own_log = name == f'logs/process_{self._index}.jsonl'
    return own_log or (self._index == 0 and not name.startswith('logs/process_'))


def _part(step: int, process: int) -> str:
  return f'checkpoints/{step}/part_{process}.json'


def _is_here(path: Path, wanted: dict[str, Any]) -> bool:
  with contextlib.suppress(OSError):
    return path.stat().st_size == wanted['bytes'] and file_hash(path) == wanted
  return False


def _groups(names: list[str]) -> list[list[str]]:
  return [names[i:i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]
