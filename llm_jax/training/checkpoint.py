"""Checkpoints of a run: written asynchronously by Orbax, committed with a manifest of hashes, verified when read.

Each holds three items: `params`, `opt_state` (trees of arrays) and `meta` (JSON: step, config, data fingerprint, ...).
While it is written its folder is named STEP.unfinished; what a killed process leaves is removed by the next one.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.batch import Params
from llm_jax.base.errors import ConfigError, DivergedError, StorageError, UnreachableError
from llm_jax.base.files import MANIFEST, saved_steps, set_aside, unverified_steps, write_file, writing
from llm_jax.base.multihost import barrier, gather, writes_files
from llm_jax.base.progress import Progress
from llm_jax.base.storage import fetcher_of, own_parts, place_of
from llm_jax.config import CheckpointConfig
from llm_jax.training.finite import non_finite
from llm_jax.training.manifest import DamagedError, commit, damage, reason
from llm_jax.training.retention import kept, read_results, read_scores, score_file, write_results

MAX_FAILED = 3  # saves in a row that may fail before the run ends


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for a save in progress."""

  def __init__(self, directory: Path, config: CheckpointConfig, *, read_only: bool = False):
    self._directory, self._config, self._read_only = directory, config, read_only
    self._is_primary = jax.process_index() == 0
    self._fetcher = fetcher_of(self.workdir)
    self._parts = None if read_only else own_parts(self.workdir)
    self._writes = self._is_primary if read_only else writes_files(self.workdir)
    if not read_only:
      with writing(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        if self._writes:
          write_file(directory / 'probe.unfinished', bytes(1 << 16))  # before anything is compiled
          (directory / 'probe.unfinished').unlink()
    self._saved = set(self._agreed(self.steps))  # the same on all processes
    self._thread = ThreadPoolExecutor(1, 'checkpoint')
    self._pending: tuple[int, Future[str]] | None = None  # a save in progress, and what failed of it
    self._problem, self._failed = '', 0  # of the newest save; number of failed saves in a row

  @functools.cached_property
  def _writer(self) -> Any:
    from llm_jax.training.orbax_io import make_writer
    return make_writer(in_parts=self._parts is not None)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *exc: object) -> None:
    with ACTIVITY.during('save'):  # after an error too, such as a rewind
      self._thread.shutdown()
    self._close_writer()

  @property
  def workdir(self) -> Path:
    """The folder of the run, as it was named."""
    return self._directory.parent

  def steps(self) -> list[int]:
    """The steps that have a manifest."""
    return saved_steps(self._directory)

  @property
  def _place(self) -> str:
    """Where the checkpoints are read and saved, for messages."""
    return str(self._directory) if self._fetcher is None else place_of(self.workdir)

  @property
  def newest(self) -> int | None:
    """The newest step that is complete on disk, as far as this process knows."""
    return max((step for step in self._saved if self._pending is None or step != self._pending[0]), default=None)

  def best_step(self) -> int | None:
    """The step with the lowest score among those evaluated with the newest `since`."""
    scores = read_scores(self._directory, self.steps())
    return min(scores, key=lambda step: scores[step]) if scores else None

  def named(self, name: str, flag: str) -> int | None:
    """The step for 'latest' (None), 'best' or a number. Raises ConfigError with the name of `flag`."""
    if name == 'latest':
      return None
    best = self.best_step() if name == 'best' else None
    if name == 'best' and best is None:
      raise ConfigError(f'{flag}: no checkpoint of {self.workdir} was evaluated, so there is no best one; set it to '
                        'latest or a step')
    if name != 'best' and not (name.isdigit() and int(name) in self.steps()):
      raise ConfigError(f'{flag}: must be latest, best, or a step of {self.steps()}; got {name!r}')
    return best if name == 'best' else int(name)

  def save(self, step: int, params: Params, opt_state: Any, meta: dict) -> bool:
    """Starts a save and returns once the arrays are copied; returns False if this step is already saved.

    A save that fails is reported at once, and the next one is its retry. Raises StorageError after MAX_FAILED in a row,
    and DivergedError for arrays that are not finite.
    """
    self._settle()
    if step in self._saved:
      return False
    if names := non_finite({'params': params, 'opt_state': opt_state}):
      raise DivergedError(f'{", ".join(names[:5])}{" and more" * (len(names) > 5)}: not finite at step {step}, so '
                          'nothing is saved; lower config.optim.learning_rate and repeat the command, which goes on '
                          f'from step {max(self._saved, default=0)}')
    if self._failed:
      self._free(step)
    self._saved.add(step)
    self._pending = step, self._thread.submit(self._finish, step, meta, self._start(step, params, opt_state, meta))
    if self._failed == MAX_FAILED - 1:
      self._settle()
    return True

  def wait(self) -> bool:
    """Blocks until a save in progress is complete on disk; returns whether the newest save succeeded.

    Raises StorageError after MAX_FAILED failures in a row.
    """
    self._settle()
    if not self._problem and not self._read_only:
      self._free()
    return not self._problem

  def record(self, step: int, score: float, since: int, results: dict[str, float]) -> bool:
    """Stores the results of an evaluation with its step; returns False if that is not saved.

    The best checkpoint has the lowest `score` among those with the newest `since`.
    """
    if step in self._saved and self._writes:
      write_results(self._directory, step, score, since, results)
    return step in self._saved

  def results(self, step: int) -> dict[str, float] | None:
    """The results that were recorded for a step; None without them."""
    found = self._agreed(lambda: read_results(self._directory, step))
    return found and found['results']

  def damage(self, step: int) -> list[str]:
    """What is wrong with the files of a step, by file; each process reads a part of them."""
    found = gather(damage(self._directory / str(step), jax.process_index(), jax.process_count()))
    return list(dict.fromkeys(problem for each in found for problem in each))

  def restore(self, params: Params, opt_state: Any | None = None, *, step: int | None = None,
              check: Callable[[dict], None] = lambda meta: None) -> tuple[Params, Any, dict]:
    """(params, opt_state, meta) of `step`, or of the newest intact checkpoint.

    `params` and `opt_state` are trees of ShapeDtypeStruct with shardings; with opt_state None, it is not read.
    `check(meta)` may raise ConfigError before any array is read. Raises StorageError if no checkpoint is intact.
    """
    steps = self._agreed(self.steps)
    if step is not None and step not in steps:
      raise StorageError(f'{self._directory}: no checkpoint of step {step}; steps: {steps}')
    trees = {'params': params} if opt_state is None else {'params': params, 'opt_state': opt_state}
    failures = []
    for candidate in reversed(steps) if step is None else [step]:
      with Progress(f'reading checkpoint {candidate}', shown=self._is_primary):
        arrays, meta, problem = self._read(candidate, trees, check)
      if not problem:
        return arrays['params'], arrays.get('opt_state'), meta
      failures.append(f'step {candidate}: {problem}')
      if self._is_primary:
        print(f'WARNING: {self._place}: damaged: {failures[-1]}', file=sys.stderr, flush=True)
    other = '--start_over to begin at step 0' if self._fetcher is None else '--workdir to another URL'
    raise StorageError(f'{self._place}: no checkpoint is intact; copy one back, or set {other}:\n  '
                       + '\n  '.join(failures))

  def _read(self, step: int, trees: dict[str, Any], check: Callable) -> tuple[dict, dict, str]:
    """(arrays by item, meta, what is damaged). All processes read the same step.

    Raises ConfigError for arrays or a `meta` that do not fit.
    """
    from llm_jax.training.orbax_io import read_arrays, read_meta
    folder, meta, arrays = self._directory / str(step), dict[str, Any](), dict[str, Any]()

    def checked_meta() -> dict:
      check(meta := read_meta(folder))
      return meta

    def shards() -> dict:
      if self._fetcher is not None:
        self._fetcher.fetch_shards(step, trees)
      return read_arrays(folder, trees)

    if self._fetcher is None:
      problem = '; '.join(self.damage(step)[:3])
    else:
      _, problem = self._on_all(step, lambda: self._fetcher.fetch(step, tuple(trees)))
    if not problem:
      meta, problem = self._on_all(step, checked_meta)
    if not problem:
      arrays, problem = self._on_all(step, shards)
    if not problem and (names := [name for item in arrays for name in non_finite({item: arrays[item]})]):
      problem = f'{", ".join(names[:5])}: not finite'
    return arrays, meta, problem

  def _on_all(self, step: int, act: Callable[[], Any]) -> tuple[Any, str]:
    """(act(), what is damaged on any process). Raises StorageError on all processes if one cannot reach storage."""
    result, damaged, unreachable = None, '', ''
    try:
      result = act()
    except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):  # not caused by the checkpoint
      raise
    except UnreachableError as e:
      unreachable = reason(e)
    except DamagedError as e:
      damaged = str(e)
    except Exception as e:  # Orbax raises many types for a folder that it cannot read
      damaged = f'{type(e).__name__}: {reason(e)}'
    found = gather([damaged, unreachable])
    if unreachable := next((each for _, each in found if each), ''):
      raise StorageError(f'{self._place}: checkpoint {step} could not be copied here: {unreachable}; repeat the '
                         'command')
    return result, next((each for each, _ in found if each), '')

  def set_aside_after(self, step: int) -> None:
    """Renames the folders of later steps, which are damaged or have no manifest, to STEP.corrupt-TIME."""
    if self._writes:
      for each in sorted({*self.steps(), *unverified_steps(self._directory)}):
        if each > step:
          folder = self._directory / str(each)
          why = '' if (folder / MANIFEST).is_file() else f' has no {MANIFEST}, and'
          with writing(str(self._directory)):
            aside = set_aside(folder, 'corrupt')
            score_file(self._directory, each).unlink(missing_ok=True)
          if self._is_primary:
            print(f'WARNING: {folder}{why} is now {aside.name}', file=sys.stderr, flush=True)
    self._saved = {each for each in self._saved if each <= step}
    barrier('set_aside')

  def _agreed(self, read: Callable[[], Any]) -> Any:
    """What process 0 reads, on all processes."""
    return read() if jax.process_count() == 1 else gather(read() if self._is_primary else None)[0]

  def _start(self, step: int, params: Params, opt_state: Any, meta: dict) -> str:
    """Starts Orbax's part of a save; returns what failed."""
    from llm_jax.training import orbax_io
    try:
      orbax_io.write(self._writer, self._unfinished(step), params, opt_state, {'step': step, **meta})
      return ''
    except (OSError, ValueError) as e:
      return reason(e)

  def _finish(self, step: int, meta: dict, problem: str) -> str:
    """In the background: waits for Orbax, commits the step, reads it again, frees old steps. Returns what failed."""
    try:
      self._writer.wait_until_finished()  # also after an error, which it clears
      if not problem and self._writes:
        final = self._directory / str(step)
        commit(self._unfinished(step), final, {'step': step} | {
            name: meta[name] for name in ('position', 'versions') if name in meta})
        if found := damage(final):
          set_aside(final, 'corrupt')
          problem = f'the disk returns other bytes than were written: {"; ".join(found[:3])}'
    except Exception as e:  # of many types: TensorStore's, a timeout of other processes, a full disk
      problem = problem or reason(e)
    if self._parts is not None:
      problem = self._parts.push(step, problem)
    elif not problem:
      with contextlib.suppress(OSError):
        self._free()
    if problem:
      self._close_writer()  # as it keeps errors
      self._remove_unfinished()
      print(f'WARNING: {self._place}: checkpoint {step} could not be saved ({problem}); training continues, and '
            'the next save is tried as usual', file=sys.stderr, flush=True)
    return problem

  def _settle(self) -> None:
    """Waits for a save in progress, which then counts. Raises StorageError after MAX_FAILED failures in a row."""
    if self._pending is None:
      return
    (step, future), self._pending = self._pending, None
    first, *others = gather(future.result())
    self._problem = next(filter(None, [*others, first]), '')  # process 0 may just miss what others did not copy
    self._failed = self._failed + 1 if self._problem else 0
    if self._problem:
      self._saved.discard(step)
      if self._writes:
        score_file(self._directory, step).unlink(missing_ok=True)
      if self._parts is not None:
        shutil.rmtree(self._directory / str(step), ignore_errors=True)  # this process's part
    elif self._parts is not None:
      self._free()  # not before, so that all processes have the same steps
    if self._failed >= MAX_FAILED:
      cure = 'make room there' if self._parts is None else 'mend that'
      raise StorageError(f'{self._place}: {self._failed} saves in a row failed, the last one of step {step}: '
                         f'{self._problem}; {cure}, then repeat the command, which goes on from step '
                         f'{max(self._saved, default=0)}')

  def _free(self, coming: int | None = None) -> None:
    """Deletes the steps that need not be kept, also once step `coming` is saved; the newest one is kept always."""
    if not self._writes:
      return
    steps = self.steps()
    keep = kept(steps if coming is None else [*steps, coming], read_scores(self._directory, steps), self._config)
    for step in steps[:-1]:
      if step not in keep:
        with contextlib.suppress(OSError):
          (self._directory / str(step)).rename(self._unfinished(step))  # at once, as a process may be killed here
          shutil.rmtree(self._unfinished(step), ignore_errors=True)
          score_file(self._directory, step).unlink(missing_ok=True)

  def _close_writer(self) -> None:
    if writer := vars(self).pop('_writer', None):
      with contextlib.suppress(Exception):  # of a save that has failed, which was reported
        writer.close()

  def _unfinished(self, step: int) -> Path:
    return self._directory / f'{step}.unfinished'

  def _remove_unfinished(self) -> None:
    if self._writes:
      for path in self._directory.glob('*.unfinished*'):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
