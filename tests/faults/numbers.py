"""NaN, Inf, 1e30 and spikes in activations, gradients and updates: skipped or stopped, and never in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from faults.lab import SAVES, STEPS, Lab, arrays_of, has_traceback, last_lines, metrics_of, saved_steps
from faults.poison import PLACES, VALUES
from faults.tally import Tally

TRIALS = 50


def run(lab: Lab, trials: int) -> Tally:
  """One step is poisoned in most trials, all steps from one on in each fifth."""
  tally = Tally('numbers')
  lab.reference(config='poisoned')
  tally.count('non_finite_committed', 0)
  # A spike of the update shows in the losses of the steps after it only, so no rule could skip its own step.
  cases = [(place, value) for place in PLACES for value in VALUES if (place, value) != ('update', 'spike')]
  for number in range(trials):
    place, value = cases[number % len(cases)]
    first = lab.rng.randint(10, STEPS - 25)
    last = 10 ** 6 if number % 5 == 4 and value in ('nan', 'inf') else first
    tally.add(f'{value} in {place} at step {first}{"" if first == last else " and all after it"}',
              one(lab, tally, place, value, first, last))
  return tally


def one(lab: Lab, tally: Tally, place: str, value: str, first: int, last: int) -> str:
  workdir = lab.new('poisoned')
  job = lab.start(workdir, config='poisoned', faults={'poison': [place, first, last, value]})
  [code], text = job.wait(), job.text()
  job.end()
  bad = sum(non_finite(workdir / 'checkpoints' / str(step)) for step in saved_steps(workdir))
  tally.count('non_finite_committed', bad)
  skipped = skipped_steps(workdir, first)
  problems = ['a traceback' if has_traceback(text) else '', f'{bad} non-finite values in checkpoints' if bad else '']
  if last > first or (place == 'update' and code == 70):  # a poisoned update shows in the next step's loss
    problems.append('' if code == 70 else f'exit code {code} instead of 70: {last_lines(text)}')
  else:
    problems += [f'exit code {code}: {last_lines(text)}' if code != 0 else '',
                 f'skipped: {skipped}, not step {first}' if code == 0 and skipped != [first] and not clipped(
                     lab, workdir, value) else '',
                 f'the report does not name step {first}' if skipped and f'step {first}' not in text else '']
  return '; '.join(filter(None, problems))


def clipped(lab: Lab, workdir: Path, value: str) -> bool:
  """Whether a huge finite value was without harm: the run ends with about the loss of an undisturbed one."""
  last, wanted = (lines[-1]['train/loss'] for lines in (metrics_of(workdir), lab.reference(config='poisoned').lines))
  return value == 'huge' and last < wanted + 0.3


def non_finite(step: Path) -> int:
  """The number of NaN and infinite values in a checkpoint. An infinite scalar may be a best value so far."""
  return sum(int(np.sum(~np.isfinite(array))) for array in arrays_of(step).values()
             if np.issubdtype(array.dtype, np.floating) and array.ndim)


def skipped_steps(workdir: Path, first: int) -> list[int]:
  """The skipped steps, without spikes long after the fault: a run without one batch may meet one of its own."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [int(line['step']) for line in lines
          if line.get('train/skipped') and not (line.get('train/spike') and line['step'] > first + SAVES)]
