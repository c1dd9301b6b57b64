"""Checkpoints of a run, by Orbax: written asynchronously; the last, the best and milestones are kept.

Each holds three items: `params`, `opt_state` (trees of arrays) and `meta` (JSON: step, config, data fingerprint, ...).
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm_jax.base.batch import Params
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import writing
from llm_jax.base.progress import Progress
from llm_jax.config import CheckpointConfig


class Checkpoints:
  """The checkpoints of one run. A context manager: leaving it waits for a save in progress."""

  def __init__(self, directory: Path, config: CheckpointConfig, *, read_only: bool = False):
    self._directory, self._config, self._read_only = directory, config, read_only
    if not read_only:
      with writing(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)

  @functools.cached_property
  def _manager(self) -> Any:
    from llm_jax.training.orbax_manager import keeping_manager
    return keeping_manager(self._directory, self._config, read_only=self._read_only)

  @property
  def _is_open(self) -> bool:
    return '_manager' in vars(self)

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *exc: object) -> None:
    if self._is_open:
      self._manager.close()

  @property
  def workdir(self) -> Path:
    """The folder of the run, as it was named."""
    return self._directory.parent

  def steps(self) -> list[int]:
    if not self._is_open and not any(path.name.isdigit() for path in self._directory.glob('*')):
      return []  # without Orbax, so that a new run need not wait for it
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """The step with the lowest score among the saves with the newest `since`."""
    return self._manager.best_step()

  def named(self, name: str, flag: str) -> int | None:
    """The step for 'latest' (None), 'best' or a number. Raises ConfigError with the name of `flag`."""
    if name == 'latest':
      return None
    if name == 'best' and self.best_step() is None:
      raise ConfigError(f'{flag}: no checkpoint of {self._manager.directory.parent} was evaluated, so there is no best '
                        'one; set it to latest or a step')
    if name != 'best' and not (name.isdigit() and int(name) in self.steps()):
      raise ConfigError(f'{flag}: must be latest, best, or a step of {self.steps()}; got {name!r}')
    return self.best_step() if name == 'best' else int(name)

  def save(self, step: int, params: Params, opt_state: Any, meta: dict, score: float | None = None,
           since: int = 0) -> bool:
    """Starts a save and returns once the arrays are copied; returns False if this step is already saved.

    The best checkpoint has the lowest `score` among the saves with the newest `since`. Raises StorageError, also if an
    earlier save has failed.
    """
    import orbax.checkpoint as ocp
    if step in self._manager.all_steps():
      return False
    metrics = {'since': since, 'score': score} if score is not None and math.isfinite(score) else None
    try:
      saved = self._manager.save(step, args=ocp.args.Composite(
          params=ocp.args.PyTreeSave(params), opt_state=ocp.args.PyTreeSave(opt_state),
          meta=ocp.args.JsonSave({'step': step, **meta})), metrics=metrics, force=True)
    except (OSError, ValueError) as e:
      raise StorageError(f'{self._manager.directory}: checkpoint {step} could not be saved: {_first_line(e)}') from e
    if not saved:
      raise StorageError(f'{self._manager.directory}: Orbax did not save step {step}')
    return True

  def wait(self) -> None:
    """Blocks until a save in progress is complete on disk. Raises StorageError if it failed."""
    if not self._is_open:
      return
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except (OSError, ValueError) as e:
      raise StorageError(f'{self._manager.directory}: a checkpoint could not be saved: {_first_line(e)}') from e

  def restore(self, params: Params, opt_state: Any | None = None, *, step: int | None = None,
              check: Callable[[dict], None] = lambda meta: None) -> tuple[Params, Any, dict]:
    """(params, opt_state, meta) of `step`, or of the newest readable checkpoint.

    `params` and `opt_state` are trees of ShapeDtypeStruct with shardings; with opt_state None, it is not read.
    `check(meta)` may raise ConfigError before any array is read. Raises StorageError if no checkpoint is readable.
    """
    if step is not None and step not in self.steps():
      raise StorageError(f'{self._manager.directory}: no checkpoint of step {step}; steps: {self.steps()}')
    failures = []
    for candidate in reversed(self.steps()) if step is None else [step]:
      failure = ''
      try:
        with Progress(f'reading checkpoint {candidate}', shown=jax.process_index() == 0):
          result = self._read(candidate, params, opt_state, check)
      except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):  # not caused by the checkpoint
        raise
      except Exception as e:  # Orbax raises many types for a damaged folder
        failure = f'{type(e).__name__}: {_first_line(e)}'
      if not np.any(multihost_utils.process_allgather(bool(failure))):  # all processes use the same step
        return result
      failures.append(f'step {candidate}: {failure or "another process cannot read it"}')
      if jax.process_index() == 0:
        print(f'WARNING: {self._manager.directory}: cannot read {failures[-1]}', file=sys.stderr, flush=True)
    raise StorageError(f'{self._manager.directory}: no checkpoint can be read:\n  ' + '\n  '.join(failures))

  def _read(self, step: int, params: Params, opt_state: Any | None, check: Callable) -> tuple[Params, Any, dict]:
    import orbax.checkpoint as ocp

    from llm_jax.training.orbax_manager import reading_manager
    items = {} if opt_state is None else {'opt_state': ocp.args.StandardRestore(opt_state)}
    with reading_manager(Path(self._manager.directory)) as reader:
      meta = reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      check(meta)
      restored = reader.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(params), **items))
    return restored.params, restored.get('opt_state'), meta

  def set_aside_after(self, step: int) -> None:
    """Renames the checkpoints newer than `step`, which could not be read, to STEP.unreadable-TIME."""
    newer = [s for s in self.steps() if s > step]
    if newer and jax.process_index() == 0:
      for path in (Path(self._manager.directory) / str(s) for s in newer):
        path.rename(path.with_name(f'{path.name}.unreadable-{time.time():.0f}'))
    if newer:
      multihost_utils.sync_global_devices('set_aside')
      self._manager.reload()


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [''])[0][:300]
