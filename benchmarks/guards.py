"""What the guards of a run cost: the same training with them and without, timed in turn.

  python -m benchmarks.guards --before=COMMIT [--rounds=10]

COMMIT is the last one without the guards; its package is taken from git. Both train the same model with a checkpoint
every 100 steps, each in a process of its own that sleeps while the other one runs: A B B A A B ... A window of 300
steps begins and ends halfway between two saves, so that it has three whole saves, with their hashes and checks.
`overhead` is the median over the rounds of the time with guards divided by the time without, minus one. Run nothing
else meanwhile.
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
from pathlib import Path

ROOT = Path(__file__).parent.parent
SAVES, WINDOW = 100, 300  # steps
CONFIG = '''"""A model whose step takes some milliseconds on a CPU."""
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = {steps}
  config.batch_tokens = config.tokens_per_device = 768
  config.model.num_layers = config.model.scan_unroll = 4
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.data.path = {text!r}
  config.data.tokenizer = 'byte'
  config.data.seq_len = 64
  config.eval.every = 0
  config.checkpoint.every = {saves}
  config.log.every = {log}
  return config
'''


class Worker:
  """A training in a process of its own, which goes on by a window for each line that it reads."""

  def __init__(self, tree: Path, folder: Path, name: str, config: Path):
    command = [sys.executable, str(Path(__file__)), f'--worker={config}', f'--workdir={folder / name}']
    self._process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder,
                                     env=os.environ | {'PYTHONPATH': str(tree)})
    self.seconds: list[float] = []
    self._read()

  def time(self) -> float:
    """The seconds of the next window."""
    self._process.stdin.write('\n')
    self._process.stdin.flush()
    self.seconds.append(self._read())
    return self.seconds[-1]

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def _read(self) -> float:
    for line in self._process.stdout:  # skips what the training prints
      if line.startswith('window '):
        return float(line.split()[1])
    raise SystemExit(f'{" ".join(self._process.args)} ended with {self._process.wait()}')


def work(config: str, workdir: str) -> None:
  """Trains, and prints the seconds of each window; between two windows waits for a line, and ends without one."""
  from llm_jax.base import runtime
  runtime.keep_freed_memory()  # as llm_jax.main does
  import llm_jax
  begin = time.perf_counter()
  for metrics in llm_jax.train(llm_jax.load_config(config), workdir):
    if metrics['step'] % WINDOW == SAVES // 2:
      print(f'window {time.perf_counter() - begin}', flush=True)
      if not sys.stdin.readline():
        break
      begin = time.perf_counter()


def package_of(commit: str, folder: Path) -> Path:
  """The package as it was at a commit."""
  archive = subprocess.run(['git', 'archive', commit, 'llm_jax'], cwd=ROOT, capture_output=True, check=True).stdout
  folder.mkdir()
  subprocess.run(['tar', 'x', '-C', str(folder)], input=archive, check=True)
  return folder


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--before', metavar='COMMIT', help='the last commit without the guards')
  parser.add_argument('--rounds', type=int, default=10, help='of two windows each')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  parser.add_argument('--workdir', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    return work(args.worker, args.workdir)
  if not args.before:
    parser.error('--before: name the last commit without the guards')
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / 'text.txt').write_bytes((ROOT / 'llm_jax' / 'config.py').read_bytes() * 20)
    config = folder / 'guards.py'
    config.write_text(CONFIG.format(text=str(folder / 'text.txt'), saves=SAVES, log=SAVES // 2,
                                    steps=WINDOW * (args.rounds + 3)))
    workers = [Worker(ROOT, folder, 'with', config),
               Worker(package_of(args.before, folder / 'before'), folder, 'without', config)]
    for each in workers:
      each.time()  # warms up
    for turn in range(args.rounds):
      for each in workers if turn % 2 == 0 else workers[::-1]:
        each.time()
    for each in workers:
      each.close()
  with_guards, without = (each.seconds[1:] for each in workers)
  ratios = [a / b - 1 for a, b in zip(with_guards, without, strict=True)]
  print(json.dumps({
      'benchmark': 'guards', 'before': args.before, 'rounds': args.rounds, 'cores': os.cpu_count(),
      'step_ms': round(1e3 * statistics.median(with_guards) / WINDOW, 3),
      'step_ms_without': round(1e3 * statistics.median(without) / WINDOW, 3),
      'overhead': round(statistics.median(ratios), 4),
      'overhead_quartiles': [round(x, 4) for x in statistics.quantiles(ratios)[::2]]}))


if __name__ == '__main__':
  main()
