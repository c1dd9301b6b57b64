"""A run whose checkpoints are gone: found before anything is written, and started over only if that is asked for."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import saved_steps, unverified_steps, writing
from llm_jax.base.lock import lock_run
from llm_jax.base.multihost import barrier, gather
from llm_jax.base.storage import is_remote
from llm_jax.training.launches import read_launches
from llm_jax.training.log import read_metrics
from llm_jax.training.status import read_status

# What a run writes while it trains.
FILES = ('checkpoints', 'metrics.jsonl', 'metrics.csv', 'status.json', 'launches.jsonl', 'rewinds.json')


def check_not_lost(workdir: Path) -> None:
  """Raises StorageError if the folder has no checkpoint although its other files show that there was one."""
  problem = gather(lost(workdir) if jax.process_index() == 0 else '')[0]
  if problem:
    raise StorageError(f'{problem}; or set --start_over, which moves the files of the run aside and begins at step 0')


def lost(workdir: Path) -> str:
  """What has happened to the checkpoints of a run; '' if nothing."""
  folder = workdir / 'checkpoints'
  if saved_steps(folder):
    return ''
  if unverified := unverified_steps(folder):
    return (f'{folder}: steps {unverified} have no manifest.json, as those of an earlier version and folders copied '
            f'in part; `llm-jax check --workdir={workdir} --adopt` reads them and writes it')
  if damaged := sorted(path.name for path in folder.glob('*.corrupt-*')):
    return f'{folder}: no checkpoint is intact, only {", ".join(damaged)}; copy one back'
  launches = read_launches(workdir)
  steps: list[float] = [read_status(workdir).get('saved') or 0, *(launch.get('begin', 0) for launch in launches),
           *(launch.get('step', 0) for launch in launches if launch.get('ended') in ('finished', 'stopped'))]
  if not folder.exists():  # it is made before the first step
    lines = read_metrics(workdir / 'metrics.jsonl') if (workdir / 'metrics.jsonl').is_file() else []
    steps += [read_status(workdir).get('step') or 0, *(int(line['step']) for line in lines)]
  step = max(step for step in steps if isinstance(step, int | float))
  return (step and (f'{folder}: there is no checkpoint, but the files beside it show that the run had reached step '
                   f'{step:.0f}; mount or copy that folder back')) or ''


def start_over(named: str) -> None:
  """Moves what a run has trained into the folder before-TIME, so that it begins at step 0.

  Raises StorageError, and ConfigError for a run in object storage.
  """
  if is_remote(named):
    raise ConfigError(f'--start_over: for a run in object storage, set --workdir to another URL than {named}')
  with lock_run(workdir := Path(named)):
    _move_aside(workdir)


def _move_aside(workdir: Path) -> None:
  if jax.process_index() == 0:
    found = [workdir / name for name in FILES if (workdir / name).exists()]
    aside = workdir / f'before-{time.time():.0f}'
    with writing(f'--workdir: {workdir}'):
      for path in found:
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
    if found:
      print(f'--start_over: {", ".join(path.name for path in found)} moved to {aside}', flush=True)
  barrier('start_over')
