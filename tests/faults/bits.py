"""Single bit flips over every kind of file of a run: each is found, or is without effect on what the run computes."""

from __future__ import annotations

import shutil

from faults.damage import checked, flip, kinds, of_checkpoint, older_step, survived
from faults.lab import Lab, saved_steps
from faults.tally import Tally

TRIALS = 200


def run(lab: Lab, trials: int) -> Tally:
  """Each trial draws a kind of file first, so that the small ones are hit as often as the arrays."""
  tally, base = Tally('bits'), lab.interrupted()
  for name in ('in_checkpoints', 'found_in_checkpoints', 'other_files', 'found_in_other_files'):
    tally.count(name, 0)
  for _ in range(trials):
    folder = lab.copy(base, 'flipped')
    newest = saved_steps(folder)[-1]
    old = lab.rng.random() < 0.2  # an older step is not read by a resumed run, but by `llm-jax check`
    step = older_step(folder) if old else newest
    by_kind = kinds(folder, step)
    kind = lab.rng.choice(sorted(kind for kind in by_kind if 'checkpoints' in kind or not old))
    path = lab.rng.choice(by_kind[kind])
    bit = lab.rng.randrange(8 * path.stat().st_size)
    flip(path, bit)
    if old:
      problem = checked(lab, folder, path)
      found = not problem
    else:
      found, problem = survived(lab, folder, path, newest)
    place = 'checkpoints' if of_checkpoint(path) else 'other_files'
    tally.count({'checkpoints': 'in_checkpoints'}.get(place, place))
    tally.count(f'found_in_{place}', int(found))
    tally.add(f'bit {bit} of {path.relative_to(folder)}', problem)
    shutil.rmtree(folder)
  return tally
