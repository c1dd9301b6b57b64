"""Prints the table of configs/optimizer_race.py: best learning rate, and steps and time to a validation loss.

  python -m benchmarks.race --workdir=runs/race [--target=4.9]

The loss to reach is --target, by default the final loss of AdamW's best trial. Time is steps times the median time of
a step, without evaluations, so other programs on the machine disturb it little.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from llm_jax.training.log import read_metrics


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, required=True)
  parser.add_argument('--target', type=float)
  args = parser.parse_args(argv)
  best: dict[str, dict] = {}
  for trial in json.loads((args.workdir / 'sweep.json').read_text())['trials']:
    name = trial['settings']['optim.chain'].removeprefix('clip_by_global_norm,')
    if trial['best'] is not None and trial['best'] < best.get(name, {'best': float('inf')})['best']:
      best[name] = trial
  target = args.target or best['adamw']['best']
  print(f'| optimizer | learning rate | val/loss | steps to {target:.3f} | of AdamW | ms a step | of its time |')
  print('|---|---|---|---|---|---|---|')
  rows = {name: row_of(args.workdir / trial['name'], target) for name, trial in best.items()}
  for name in sorted(best, key=lambda name: best[name]['best']):
    (steps, ms), (their_steps, their_ms) = rows[name], rows['adamw']
    share = '' if steps is None else f'{steps / their_steps:.2f}'
    time = '' if steps is None else f'{steps * ms / (their_steps * their_ms):.2f}'
    print(f'| {name} | {best[name]["settings"]["optim.learning_rate"]} | {best[name]["best"]:.3f} | '
          f'{"not reached" if steps is None else round(steps)} | {share} | {ms:.0f} | {time} |')


def row_of(folder: Path, target: float) -> tuple[float | None, float]:
  """(steps until the validation loss is at most `target`, by linear interpolation; median ms of a step)."""
  lines = read_metrics(folder / 'metrics.jsonl')
  points = [(line['step'], line['val/loss']) for line in lines if 'val/loss' in line]
  ms = 1e3 * statistics.median(line['train/seconds_per_step'] for line in lines if 'train/seconds_per_step' in line)
  for (step, loss), (before, higher) in zip(points, [(0, float('inf')), *points], strict=False):
    if loss <= target:
      return (step if higher == float('inf') else step - (step - before) * (target - loss) / (higher - loss)), ms
  return None, ms


if __name__ == '__main__':
  main()
