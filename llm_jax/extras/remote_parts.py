"""Runs in object storage whose hosts share no folder: each process has its part of a checkpoint, the URL has all of it.

A save is complete once all parts are there and process 0 has added the manifest. To resume, a process copies back the
shards of its devices, so that the number of processes and the mesh may change.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable
from functools import partial

import jax

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import StorageError
from llm_jax.base.files import saved_steps
from llm_jax.base.multihost import barrier, from_first
from llm_jax.base.reports import FOLDER, prepare_reports
from llm_jax.base.seal import seal
from llm_jax.base.storage import fetch_from, keeping_parts
from llm_jax.config import CheckpointConfig
from llm_jax.extras.bucket import SAVING, Bucket, NotSavedError, manifest_of, persistently, small_files
from llm_jax.extras.coordinator_reports import CoordinatorReports
from llm_jax.extras.remote_lock import TAKEN
from llm_jax.extras.remote_run import RemoteRun
from llm_jax.extras.remote_steps import RemoteSteps, groups
from llm_jax.training.manifest import reason, step_manifest

_TURNS = itertools.count()  # as each barrier needs a name of its own


class RemoteParts(RemoteRun):
  """A run whose folder is a URL, for processes that see no common folder. Raises StorageError."""

  def __init__(self, url: str, retention: CheckpointConfig):
    super().__init__(url, retention)
    self._index, self._count = jax.process_index(), jax.process_count()
    self._whole = self.folder  # that of a launch whose processes shared it
    self.folder = self.folder.with_name(f'{self.folder.name}.process_{self._index}')
    self._mutex = threading.Lock()  # of _steps and _copied
    self._open = contextlib.ExitStack()
    self._kept = 'the newest lines of its metrics and logs are missing there'
    self._meanwhile = 'training continues, and the newest lines of its metrics and logs are copied later'

  def __enter__(self) -> RemoteRun:
    self._name = from_first(self._launch)
    self._together(self._prepare)
    self._together(self._pull)
    self._together(self._begin)
    fetch_from(self.folder, self.url, self._here)
    self._open.enter_context(keeping_parts(self.folder, self))
    self._open.enter_context(CoordinatorReports(self.folder / FOLDER, self._index, self._count))
    return self

  def __exit__(self, *exc: object) -> None:
    self._open.close()
    super().__exit__(*exc)

  def _prepare(self) -> None:
    """Opens the storage; process 0 takes the lock, and copies what a launch before has left on its host."""
    self._bucket = Bucket(self.url)
    self._here = RemoteSteps(self._bucket, self.folder)
    if self._index == 0:
      self._acquire()
      self._delete_unfinished()
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
      self._here.note(self._steps)

  def push(self, step: int, problem: str) -> str:
    """Copies there what this process has saved of a step; process 0 adds the manifest. Returns what failed.

    All processes call it, also those with a `problem` of their own.
    """
    turn = next(_TURNS)
    save, begun = f'{self._name}_{turn}', False
    if self._index == 0:
      problem = problem or self._try(self._begin_save, step, save)
      begun = not problem
    barrier(f'save_{turn}')
    problem = problem or self._try(self._put_part, step, save)
    barrier(f'saved_{turn}')
    if begun:
      problem = problem or self._try(self._put_manifest, step, save)
      if problem and not self._is_lost():
        with contextlib.suppress(StorageError), self._mutex:
          self._delete(step)
    return problem

  def _try(self, act: Callable[[int, str], None], step: int, save: str) -> str:
    try:
      persistently(partial(act, step, save))
    except Exception as e:  # any, as the other processes wait
      return reason(e)
    return ''

  def _begin_save(self, step: int, save: str) -> None:
    """Deletes what is there of a step, which was rewound or not finished, and names the save for all processes."""
    if self._lock is None or self._lock.is_lost:
      raise NotSavedError(TAKEN)
    with self._mutex:
      if self._bucket.names(f'checkpoints/{step}'):
        self._delete(step)
    self._bucket.write(f'checkpoints/{step}/{SAVING}', save.encode())

  def _put_part(self, step: int, save: str) -> None:
    """Copies this process's shards; process 0 also what all have in common. Their list comes last.

    Does nothing if process 0 has not begun the save, which it reports.
    """
    from llm_jax.training.orbax_io import is_shard
    if self._bucket.read(f'checkpoints/{step}/{SAVING}') != save.encode():
      return
    files = step_manifest(self.folder / 'checkpoints' / str(step))['files']
    own = {name: files[name] for name in files if self._index == 0 or is_shard(name, files)}
    for some in groups(sorted(own)):
      self._bucket.put(self.folder, [f'checkpoints/{step}/{name}' for name in some])
      if ACTIVITY.phase != 'step':
        ACTIVITY.sign()
    self._bucket.write(_part(step, self._index), json.dumps({'save': save, 'files': own}).encode())

  def _put_manifest(self, step: int, save: str) -> None:
    """Adds the manifest of all parts, with which the step counts."""
    names = [_part(step, i) for i in range(self._count)]
    parts = [json.loads(self._bucket.read(name) or b'{}') for name in names]
    if missing := [i for i, part in enumerate(parts) if part.get('save') != save]:
      raise NotSavedError(f'process {missing[0]} did not copy its part of step {step}')
    values = step_manifest(self.folder / 'checkpoints' / str(step))
    content = seal({**values, 'files': {name: file for part in parts for name, file in part['files'].items()}})
    with self._mutex:
      self._copy_small_files(last=True)  # the metrics up to this step
      self._bucket.write(manifest_of(step), content)
      self._steps[step] = content
    with contextlib.suppress(StorageError):
      self._bucket.delete([*names, f'checkpoints/{step}/{SAVING}'])

  def _copy(self, last: bool = False) -> None:
    """Process 0 deletes the steps there that need not be kept; all copy small files. Raises StorageError."""
    with self._mutex:
      if self._index == 0 and (local := set(saved_steps(self.folder / 'checkpoints'))):
        for step in self._steps.keys() - local:  # gone back, or as many as are kept: each one there is known here
          self._delete(step)
      self._copy_small_files(last)

  def _writes(self, name: str) -> bool:
    own_log = name == f'logs/process_{self._index}.jsonl'
    return own_log or (self._index == 0 and not name.startswith('logs/process_'))


def _part(step: int, process: int) -> str:
  return f'checkpoints/{step}/part_{process}.json'
