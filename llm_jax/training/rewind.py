"""Rewinds: a run goes back to an earlier checkpoint and leaves out the batches that it has used since.

`rewinds.json` in the run's folder is the journal. It determines the batches: a run with the same config and a copy of
the journal ends with the same bits.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.errors import DivergedError, StorageError
from llm_jax.base.files import saved_steps, set_aside, write_file, writing
from llm_jax.base.multihost import barrier, gather, say
from llm_jax.base.seal import seal, unseal
from llm_jax.config import Config
from llm_jax.training.event import Rewind
from llm_jax.training.retention import score_file
from llm_jax.training.stages import Skips, Stage

FILE = 'rewinds.json'


def read_journal(workdir: Path) -> dict[str, Any]:
  """{'rewinds': [{'time', 'at', 'to', 'why'}], 'skips': [[step, tokens]]}. Raises StorageError if it is damaged."""
  path = workdir / FILE
  try:
    return unseal(path.read_bytes())
  except FileNotFoundError:
    return {'rewinds': [], 'skips': []}
  except (OSError, ValueError) as e:
    raise StorageError(f'{path}: damaged: {e}; copy it back, as it determines which batches the run uses; or set '
                       '--start_over to begin at step 0') from None


def skips_of(workdir: Path, config: Config) -> Skips:
  """What the run leaves out, as all processes know it; a new branch takes over the journal. Raises StorageError."""
  problem, skips, of_branch = '', [], Path(config.start.run).expanduser() / FILE if config.start.whole else None
  if jax.process_index() == 0:
    try:
      if of_branch and of_branch.exists() and not ((workdir / FILE).exists() or saved_steps(workdir / 'checkpoints')):
        with writing(str(workdir)):
          write_file(workdir / FILE, of_branch.read_bytes())
      skips = read_journal(workdir)['skips']
    except StorageError as e:
      problem = str(e)
  problem, skips = gather([problem, skips])[0]
  if problem:
    raise StorageError(problem)
  return tuple((step, tokens) for step, tokens in skips)


def go_back(workdir: Path, rewind: Rewind) -> None:
  """Sets later checkpoints aside and adds to the journal, in this order: a run that is killed between the two meets the
  same trouble again. Raises DivergedError without an earlier checkpoint."""
  folder = workdir / 'checkpoints'
  steps = [step for step in saved_steps(folder) if step < rewind.at] if jax.process_index() == 0 else []
  target = gather(max((s for s in steps if s <= rewind.to), default=min(steps, default=None)))[0]
  if target is None:
    raise DivergedError(f'step {rewind.at}: {rewind}; there is no checkpoint to go back to')
  say(f'step {rewind.at}: {rewind}; going back to step {target}, without the batches that were used since')
  if jax.process_index() == 0:
    with writing(str(workdir)):
      for step in reversed(saved_steps(folder)):
        if step > target:
          set_aside(folder / str(step), 'rewound')
          score_file(folder, step).unlink(missing_ok=True)
      journal = read_journal(workdir)
      entry = {'time': datetime.datetime.now().astimezone().isoformat(timespec='seconds'), 'at': rewind.at,
               'to': target, 'why': str(rewind)}
      write_file(workdir / FILE, seal({'rewinds': [*journal['rewinds'], entry],
                                       'skips': skips_after(rewind.stage, rewind.at, target)}))
  barrier('rewind')


def skips_after(stage: Stage, at: int, target: int) -> Skips:
  """The skips with which step `target` is followed by the batch that would have followed step `at`."""
  kept = tuple((step, tokens) for step, tokens in stage.skips if step < target)
  return *kept, (target, stage.tokens_at(at) - stage.replaced(kept).tokens_at(target))
