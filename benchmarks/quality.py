"""Wall-clock time from command to final loss: configs/shakespeare_char.py and the same in PyTorch, in turn.

  python -m benchmarks.quality --data=input.txt --torch=/path/to/an/environment/with/torch/bin/python

The data is tinyshakespeare (see the config). The time includes imports, compiling, evaluations and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


def timed(command: list[str]) -> tuple[float, str]:
  start = time.perf_counter()
  output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
  return time.perf_counter() - start, output


def ours(data: str) -> tuple[float, float]:
  """(seconds, val/loss) of a run in a new folder, with the user's caches as they are."""
  with tempfile.TemporaryDirectory() as workdir:
    seconds, _ = timed([sys.executable, '-m', 'llm_jax.main', '--config=configs/shakespeare_char.py',
                        f'--config.data.path={os.path.abspath(data)}', '--config.data.sha256=none',
                        f'--workdir={workdir}'])
    last = json.loads((Path(workdir) / 'metrics.jsonl').read_text().splitlines()[-1])
  return seconds, last['val/loss']


def theirs(torch: str, data: str, flags: list[str]) -> tuple[float, float]:
  seconds, output = timed([torch, '-m', 'benchmarks.torch_quality', f'--data={data}', *flags])
  return seconds, json.loads(output.splitlines()[-1])['val/loss']


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', required=True)
  parser.add_argument('--torch')
  parser.add_argument('--rounds', type=int, default=2)
  args = parser.parse_args()
  programs = {'llm_jax': lambda: ours(args.data)}
  if args.torch:
    for dtype in ('f32', 'bf16'):
      flags = [f'--dtype={dtype}']
      programs |= {f'PyTorch eager {dtype}': partial(theirs, args.torch, args.data, flags),
                   f'PyTorch compiled {dtype}': partial(theirs, args.torch, args.data, [*flags, '--compile'])}
  seconds, losses = {name: [] for name in programs}, {}
  for _ in range(args.rounds):
    for name, program in programs.items():
      taken, losses[name] = program()
      seconds[name].append(round(taken, 1))
      print(f'{name}: {taken:.1f} s, val/loss {losses[name]:.4f}', flush=True)
  print(json.dumps({name: {'seconds': seconds[name], 'median_s': statistics.median(seconds[name]),
                           'val/loss': losses[name]} for name in programs}))


if __name__ == '__main__':
  main()
