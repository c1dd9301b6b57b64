"""Rewinds: a run goes back to an earlier checkpoint and leaves out the batches that it has used since.

`rewinds.json` in the run's folder is the journal. It determines the batches: a run with the same config and a copy of
the journal ends with the same bits.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import ConfigError, DivergedError, Interrupted, StorageError
from llm_jax.base.files import saved_steps, set_aside, write_file, writing
from llm_jax.base.multihost import barrier, gather, say, writes_files
from llm_jax.base.seal import seal, unseal
from llm_jax.base.storage import read_start
from llm_jax.config import Config
from llm_jax.training.event import Rewind
from llm_jax.training.stages import Gaps, Stage, make_stages

FILE = 'rewinds.json'


def read_journal(workdir: Path) -> dict[str, Any]:
  """{'rewinds': [{'time', 'at', 'to', 'why'}], 'gaps': [[step, tokens]]}. Raises StorageError if it is damaged."""
  path = workdir / FILE
  try:
    return unseal(path.read_bytes())
  except FileNotFoundError:
    return {'rewinds': [], 'gaps': []}
  except (OSError, ValueError) as e:
    raise StorageError(f'{path}: damaged: {e}; copy it back, as it determines which batches the run uses; or set '
                       '--start_over to begin at step 0') from None


def gaps_of(workdir: Path) -> Gaps:
  """What the run leaves out, as all processes know it. Raises StorageError."""
  problem, gaps = '', []
  if jax.process_index() == 0:
    try:
      gaps = read_journal(workdir)['gaps']
    except StorageError as e:
      problem = str(e)
  problem, gaps = gather([problem, gaps])[0]
  if problem:
    raise StorageError(problem)
  return tuple((step, tokens) for step, tokens in gaps)


def stages_of(workdir: Path, config: Config) -> list[Stage]:
  """The stages of a run with what they leave out. A branch without a checkpoint gets the journal of the run that it
  branches from. Raises StorageError, ConfigError."""
  if config.start.whole:
    problem, journal = '', dict[str, Any](rewinds=[])
    if jax.process_index() == 0 and not saved_steps(workdir / 'checkpoints'):
      try:
        journal = read_journal(read_start(config.start.run))
      except (StorageError, ConfigError) as e:
        problem = str(e)
    problem, journal = gather([problem, journal])[0]
    if problem:
      raise ConfigError(problem)
    if journal['rewinds'] and writes_files(workdir):
      with writing(str(workdir)):
        write_file(workdir / FILE, seal(journal), durable=True)
  return make_stages(config, gaps_of(workdir))


def go_back(workdir: Path, rewind: Rewind) -> None:
  """Sets later checkpoints aside and adds to the journal, in this order: a run that is killed between the two meets the
  same trouble again. Raises DivergedError without a checkpoint to go back to, and Interrupted after a signal."""
  ACTIVITY.enter('start')
  folder = workdir / 'checkpoints'
  steps = [step for step in saved_steps(folder) if step < rewind.at] if jax.process_index() == 0 else []
  target = gather(max((step for step in steps if step <= rewind.newest), default=min(steps, default=None)))[0]
  if target is None:
    raise DivergedError(f'step {rewind.at}: {rewind}; there is no checkpoint to go back to')
  if changes := [step for step in rewind.stage.config.data.weights_from if target < step <= rewind.at]:
    raise DivergedError(f'step {rewind.at}: {rewind}; the run cannot go back to step {target}, over step {changes[0]} '
                        'of config.data.weights_from')
  say(f'step {rewind.at}: {rewind}; going back to step {target}, without the batches that were used since')
  if writes_files(workdir):
    with writing(str(workdir)):
      for path in folder.glob('*.score.json'):
        if (number := path.name.partition('.')[0]).isdigit() and int(number) > target:
          path.unlink(missing_ok=True)
      for step in reversed(saved_steps(folder)):
        if step > target:
          set_aside(folder / str(step), 'rewound')
      journal = read_journal(workdir)
      entry = {'time': datetime.datetime.now().astimezone().isoformat(timespec='seconds'), 'at': rewind.at,
               'to': target, 'why': str(rewind)}
      write_file(workdir / FILE, seal({'rewinds': [*journal['rewinds'], entry],
                                       'gaps': gaps_after(rewind.stage, rewind.at, target)}), durable=True)
  barrier('rewind')
  if rewind.stop.requested:
    raise Interrupted(f'stopped after going back to step {target}; repeat the command to resume')


def gaps_after(stage: Stage, at: int, target: int) -> Gaps:
  """The gaps with which step `target` is followed by the batch that would have followed step `at`."""
  kept = tuple((step, tokens) for step, tokens in stage.gaps if step < target)
  return *kept, (target, stage.tokens_at(at) - stage.with_gaps(kept).tokens_at(target))
