"""Prints the table of configs/half_time.py over its seeds: final loss and time of all steps.

  python -m benchmarks.half_time --workdir=runs/half_time

The time excludes compiling and evaluations; run nothing else meanwhile. The other recipes are compared with the first
one, seed by seed.
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
  args = parser.parse_args(argv)
  runs: dict[str, dict[int, tuple[float, float]]] = {}  # recipe: {seed: (last loss, seconds)}
  trials = sorted(json.loads((args.workdir / 'sweep.json').read_text())['trials'], key=lambda trial: trial['name'])
  for trial in trials:
    settings = dict(trial['settings'])
    seed = settings.pop('seed')
    recipe = ', '.join(f'{name.removeprefix("optim.")}={value}' for name, value in settings.items())
    runs.setdefault(recipe, {})[seed] = (trial['last'], seconds_of_steps(args.workdir / trial['name']))
  [first, *_] = runs.values()
  print('| recipe | val/loss by seed | their mean | seconds of steps | share of the first one\'s time, by seed |')
  print('|---|---|---|---|---|')
  for recipe, by_seed in runs.items():
    losses, seconds = zip(*by_seed.values(), strict=True)
    shares = [by_seed[seed][1] / first[seed][1] for seed in by_seed]
    print(f'| {recipe} | {", ".join(f"{loss:.3f}" for loss in losses)} | {statistics.mean(losses):.3f} | '
          f'{statistics.mean(seconds):.1f} | {", ".join(f"{share:.2f}" for share in shares)} |')


def seconds_of_steps(folder: Path) -> float:
  """Seconds of all steps of a run, from the times logged for the windows between two lines."""
  lines = [line for line in read_metrics(folder / 'metrics.jsonl') if 'train/loss' in line]
  known = [line['train/seconds_per_step'] for line in lines if 'train/seconds_per_step' in line]
  total, before = 0.0, 0
  for line in lines:  # the first step of a stage compiles; it counts like the steps after it
    total += (line['step'] - before) * line.get('train/seconds_per_step', known[0])
    before = line['step']
  return total


if __name__ == '__main__':
  main()
