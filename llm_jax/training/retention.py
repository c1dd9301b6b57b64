"""Which checkpoints are kept, and the results of their evaluations, in STEP.score.json beside each."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.base.files import write_file
from llm_jax.base.seal import seal, unseal
from llm_jax.config import CheckpointConfig
from llm_jax.training.manifest import reason


class Score(NamedTuple):
  """The order of checkpoints: the smallest is the best."""

  since: int  # the negative of the first step whose scores can be compared with this one
  value: float


def kept(steps: Iterable[int], scores: Mapping[int, Score], config: CheckpointConfig) -> set[int]:
  """The steps to keep: the last, the best and the milestones. A pure function."""
  steps = sorted(steps)
  best = sorted((step for step in steps if step in scores), key=lambda step: scores[step])[:config.keep_best]
  milestones = [step for step in steps if config.keep_every and step % config.keep_every == 0]
  return {*steps[-config.keep_last:], *best, *milestones}


def score_file(directory: Path, step: int) -> Path:
  return directory / f'{step}.score.json'


def write_results(directory: Path, step: int, score: float, since: int, results: dict[str, float]) -> None:
  """Stores the results of an evaluation of a saved step; warns if they cannot be written."""
  try:
    write_file(score_file(directory, step), seal({'step': step, 'score': score, 'since': since, 'results': results}))
  except OSError as e:
    print(f'WARNING: {score_file(directory, step)}: the results of the evaluation cannot be stored ({reason(e)}); '
          'training continues', file=sys.stderr, flush=True)


def read_results(directory: Path, step: int) -> dict[str, Any] | None:
  """{'score', 'since', 'results'} of a step; None without them, with a warning if the file is damaged."""
  path = score_file(directory, step)
  try:
    values = unseal(path.read_bytes())
    if values['step'] != step:
      raise ValueError(f'is of step {values["step"]}')
    return values
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError) as e:
    print(f'WARNING: {path}: {reason(e)}; the score of step {step} is lost', file=sys.stderr, flush=True)
    return None


def read_scores(directory: Path, steps: Iterable[int]) -> dict[int, Score]:
  """The scores of the steps that have a finite one."""
  found = {step: values for step in steps if (values := read_results(directory, step)) is not None}
  return {step: Score(-values['since'], values['score']) for step, values in found.items()
          if math.isfinite(values['score'])}
