"""SIGKILL at random moments, half of them during a save; each run is then resumed to its end and compared."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from faults.lab import SAVES, Lab, is_saving, last_lines, last_step, resumed_from
from faults.tally import Tally

TRIALS = 200
PER_RUN = 4  # kills of one run, before it is resumed to its end
PACE = {'pace': 0.02}


def run(lab: Lab, trials: int) -> Tally:
  tally = Tally('kill')
  usual = lab.usual_seconds()
  while tally.trials < trials:
    workdir, kills = lab.new('killed'), list[tuple[str, str]]()
    for _ in range(min(PER_RUN, trials - tally.trials)):
      kills.append(kill_once(lab, tally, workdir, usual, in_save=lab.rng.random() < 0.5))
    problem = lab.finish(workdir)
    for label, lost in kills:
      tally.add(label, lost, problem)
  return tally


def kill_once(lab: Lab, tally: Tally, workdir: Path, usual: float, *, in_save: bool) -> tuple[str, str]:
  """Starts or resumes the run and kills it. Returns the trial's label and how too many steps were lost before."""
  before = last_step(workdir)
  delay = lab.rng.uniform(0, 0.3) if in_save else lab.rng.uniform(0.2, 1.2) * usual
  job = lab.start(workdir, faults=PACE)
  if in_save:
    job.until(lambda: is_saving(workdir))
    time.sleep(delay)
  else:
    job.programs[0].wait(delay)
  saving = is_saving(workdir)
  job.signal(signal.SIGKILL)
  [code] = job.wait()
  tally.count('killed_in_a_save', int(code == -9 and saving))
  text, label = job.text(), f'{"in a save + " if in_save else ""}{delay:.3f} s, step {last_step(workdir)}'
  if code not in (-9, 0):
    return label, f'exit code {code} instead of a kill: {last_lines(text)}'
  lost = before - resumed_from(text) if 'resuming from' in text or 'step 1/' in text else 0
  tally.most('most_steps_lost', lost)
  return label, f'{lost} steps lost' if lost > 2 * SAVES - 1 else ''
