"""The CPU table: our step and PyTorch's, by default and with our allocator settings, timed in turn in one run.

  python -m benchmarks.table --torch=/path/to/an/environment/with/torch/bin/python

Each variant is a process that sleeps while another one runs: A B C ... A B C ...; the first round warms up. Writes
benchmarks/results/<date>-<machine>.json and .md. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import GEMM_SIZE, rates

RESULTS = Path(__file__).parent / 'results'
# The settings that llm_jax.base.runtime makes by mallopt, as environment variables of glibc.
MALLOC = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': '-1', 'MALLOC_TOP_PAD_': str(64 << 20),
          'MALLOC_ARENA_MAX': '1'}
SECONDS = {'char_tiny': 1.5, 'char_small': 5.0, 'gpt2_cpu': 5.0}  # of each variant in a round; at least one step
HOPELESS = 2  # times PyTorch's best: a variant that is slower in the first round is not timed again
VARIANTS = [(f'PyTorch {"compiled" if "--compile" in flags else "eager"} {dtype}{" + malloc" if env else ""}',
             [f'--dtype={dtype}', *flags], env)
            for env in ({}, MALLOC) for flags in ([], ['--compile']) for dtype in ('f32', 'bf16')]


class Worker:
  """A step in a process of its own (see common.serve)."""

  def __init__(self, python: str, module: str, preset: str, flags: list[str], env: dict[str, str]):
    start = time.perf_counter()
    self._process = subprocess.Popen([python, '-m', module, f'--preset={preset}', '--serve', *flags], text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | env)
    self.about = self._read()
    self.start_s = time.perf_counter() - start
    self.seconds: list[float] = []

  def ask(self, what: str, seconds: float) -> list[float]:
    self._process.stdin.write(f'{what} {seconds}\n')
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def _read(self):
    for line in self._process.stdout:  # skips other output of the program
      if line[0] in '[{':
        return json.loads(line)
    raise SystemExit(f'{" ".join(self._process.args)} ended with {self._process.wait()}')


def measure(preset: str, torch: str | None, rounds: int) -> dict:
  """All variants of one preset, best first, and the rate of a large matrix product."""
  running = {'llm_jax': Worker(sys.executable, 'benchmarks.step', preset, [], {})}
  running['llm_jax'].ask('step', SECONDS[preset])
  workers, left_out = dict(running), {}
  for name, flags, env in VARIANTS if torch else ():
    dtype = 'bf16' if 'bf16' in name else 'f32'
    best = min((w.seconds[0] for w in workers.values() if w.seconds), default=float('inf'))
    if env and all(w.seconds[0] > HOPELESS * best for n, w in workers.items() if dtype in n):
      left_out[name] = f'without it, {dtype} takes over {HOPELESS} times as long as the best'
      continue
    worker = workers[name] = running[name] = Worker(torch, 'benchmarks.torch_step', preset, flags, env)
    worker.seconds = [statistics.median(worker.ask('step', SECONDS[preset]))]
    print(f'{preset}: {name}: ready after {worker.start_s:.1f} s, {1e3 * worker.seconds[0]:.1f} ms', flush=True)
    best = min(best, worker.seconds[0])
    for slow in [n for n, w in running.items() if w.seconds and w.seconds[0] > HOPELESS * best]:
      running.pop(slow).close()  # frees its memory
  for worker in running.values():
    worker.seconds = []
  gemm: list[float] = []
  for i in range(rounds):
    for name, worker in running.items():
      worker.seconds += worker.ask('step', SECONDS[preset])
      if name in ('llm_jax', 'PyTorch eager f32', 'PyTorch eager bf16'):
        gemm.append(statistics.median(worker.ask('gemm', 1)))
    print(f'{preset}: round {i + 1} of {rounds}: ' + ', '.join(
        f'{name} {1e3 * statistics.median(w.seconds):.1f} ms' for name, w in running.items()), flush=True)
  rows = []
  for name, worker in workers.items():
    about = worker.about
    rows.append({'variant': name, **{k: about[k] for k in ('framework', 'dtype', 'first_step_s')},
                 'start_s': round(worker.start_s, 1), 'timed_steps': len(worker.seconds),
                 **rates(worker.seconds, about['tokens'], about['flops'])})
  for worker in running.values():
    worker.close()
  peak = 2 * GEMM_SIZE**3 / min(gemm)
  for row in rows:
    row['share_of_gemm'] = round(row['model_flops_per_second'] / peak, 3)
  rows.sort(key=lambda row: row['step_ms'])
  return {'preset': preset, 'gemm_flops_per_second': round(peak, -7), 'rows': rows, 'left_out': left_out}


def ratios(rows: list[dict]) -> dict[str, float]:
  """Our speed divided by PyTorch's best: by default, and with our allocator settings."""
  ours = next(row['step_ms'] for row in rows if row['variant'] == 'llm_jax')
  theirs = {row['variant']: row['step_ms'] for row in rows if row['variant'] != 'llm_jax'}
  best = {'stock': min((ms for name, ms in theirs.items() if 'malloc' not in name), default=0),
          'with malloc': min((ms for name, ms in theirs.items() if 'malloc' in name), default=0)}
  return {name: round(ms / ours, 2) for name, ms in best.items() if ms}


def markdown(results: dict) -> str:
  lines = [f'{results["date"]}, {results["machine"]}, {results["cores"]} cores, Python {results["python"]}. '
           'Ratios are of medians; "malloc" is PyTorch with our allocator settings.', '',
           '| preset | variant | ms a step | steps | tokens/s | GFLOP/s | of the best GEMM |',
           '|---|---|---|---|---|---|---|']
  for table in results['tables']:
    lines += [f'| {table["preset"]} | {row["variant"]} ({row["dtype"]}) | {row["step_ms"]:.1f} | '
              f'{row["timed_steps"]} | {row["tokens_per_second"]:,} | {row["model_flops_per_second"] / 1e9:.0f} | '
              f'{row["share_of_gemm"]:.0%} |'
              for row in table['rows']]
  lines += ['', '| preset | speed of llm_jax over the best stock PyTorch | over the best with our malloc |',
            '|---|---|---|']
  lines += ['| {} | {} | {} |'.format(table['preset'], *(f'{r:.2f}x' for r in table['ratios'].values()))
            for table in results['tables'] if len(table['ratios']) == 2]
  lines += [f'\nLeft out on {table["preset"]}: {name}: {why}.' for table in results['tables']
            for name, why in table['left_out'].items()]
  return '\n'.join(lines) + '\n'


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--torch', help='a Python that has torch (default: only our step is timed)')
  parser.add_argument('--presets', nargs='+', default=list(SECONDS), choices=list(SECONDS))
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--out', type=Path, default=RESULTS, help='folder of the two files')
  args = parser.parse_args()
  cpuinfo = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
  model = re.search(r'model name\s*: (.*)', cpuinfo)
  results = {'date': datetime.date.today().isoformat(), 'machine': model[1] if model else platform.processor(),
             'cores': os.cpu_count(), 'python': platform.python_version(), 'malloc': MALLOC, 'tables': []}
  args.out.mkdir(parents=True, exist_ok=True)
  slug = re.sub(r'\W+', '-', re.sub(r'\(R\)|CPU|Processor', '', results['machine'])).strip('-').lower()
  path = args.out / f'{results["date"]}-{slug}.json'
  for preset in args.presets:
    table = measure(preset, args.torch, args.rounds)
    results['tables'].append(table | {'ratios': ratios(table['rows'])})
    path.write_text(json.dumps(results, indent=1) + '\n')  # keeps the results so far
    path.with_suffix('.md').write_text(markdown(results))
  print(markdown(results))
  print(json.dumps({'results': str(path), **{t['preset']: t['ratios'] for t in results['tables']}}))


if __name__ == '__main__':
  main()
