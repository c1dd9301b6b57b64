"""Time from the command to the first training step, for this package and for PyTorch.

  python -m benchmarks.startup --torch=/path/to/python/with/torch

Each is a new process, stopped after its first step of the same model (configs/shakespeare_char.py, char_tiny). Cold:
without compiled programs; warm: with those of the run before. Python's bytecode exists in all of them, as after an
installation. The data are tokenized once, before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent


def first_step_of_ours(folder: Path, cold: bool, python: str) -> float:
  if cold:
    shutil.rmtree(folder / 'cache' / 'compiled', ignore_errors=True)
  shutil.rmtree(folder / 'run', ignore_errors=True)
  return seconds_until('step 1/', folder, [
      python, '-m', 'llm_jax.main', f'--config={ROOT}/configs/shakespeare_char.py', f'--workdir={folder}/run',
      f'--config.data.path={folder}/text.txt', '--config.data.sha256=None'])


def first_step_of_torch(folder: Path, cold: bool, python: str, *flags: str) -> float:
  """It prints after its second step, about 40 ms after the first."""
  if cold:
    shutil.rmtree(folder / 'inductor', ignore_errors=True)
  return seconds_until('{', folder, [python, str(ROOT / 'benchmarks' / 'torch_step.py'), '--preset=char_tiny',
                                     '--warmup=1', '--steps=1', *flags])


def seconds_until(beginning: str, folder: Path, command: list[str]) -> float:
  """Seconds from the command to the line with this beginning; then stops it. Raises RuntimeError if it ends before."""
  start, said = time.perf_counter(), ['']
  with subprocess.Popen(command, env=environment(folder), cwd=folder, text=True, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, start_new_session=True) as process:
    assert process.stdout is not None
    while not said[-1].startswith(beginning) and (line := process.stdout.readline()):
      said.append(line)
    seconds = time.perf_counter() - start
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # with its compiler processes
  if not said[-1].startswith(beginning):
    raise RuntimeError(f'{" ".join(command)} ended before it said {beginning}\n{"".join(said[-20:])}')
  return seconds


def environment(folder: Path) -> dict[str, str]:
  kept = {name: value for name, value in os.environ.items()
          if name != 'PYTHONDONTWRITEBYTECODE' and not name.startswith('JAX_COMPILATION_CACHE')}
  return kept | {'PYTHONPATH': str(ROOT), 'PYTHONPYCACHEPREFIX': str(folder / 'bytecode'), 'PYTHONUNBUFFERED': '1',
                 'LLM_JAX_CACHE': str(folder / 'cache'), 'TORCHINDUCTOR_CACHE_DIR': str(folder / 'inductor')}


def write_text(path: Path) -> None:
  """Writes a megabyte of Python's standard library in its 65 most frequent characters, the size of tinyshakespeare."""
  files = sorted(Path(os.__file__).parent.glob('*.py'))
  text = ''.join(file.read_text(errors='ignore') for file in files)[:1_100_000]
  common = set(sorted(set(text), key=text.count, reverse=True)[:65])
  path.write_text(''.join(character for character in text if character in common))


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--torch', help='a Python with PyTorch; default: only llm_jax')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='startup_') as name:
    folder = Path(name)
    write_text(folder / 'text.txt')
    programs: dict[str, Callable[[], float]] = {  # each warm run follows its cold one
        'ours_cold': partial(first_step_of_ours, folder, True, sys.executable),
        'ours_warm': partial(first_step_of_ours, folder, False, sys.executable)}
    if args.torch:
      programs |= {
          'torch_eager': partial(first_step_of_torch, folder, False, args.torch),
          'torch_compile_cold': partial(first_step_of_torch, folder, True, args.torch, '--compile'),
          'torch_compile_warm': partial(first_step_of_torch, folder, False, args.torch, '--compile')}
    for program in programs.values():  # creates tokens and bytecode
      program()
    seconds: dict[str, list[float]] = {program: [] for program in programs}
    for _ in range(args.rounds):
      for program, run in programs.items():
        seconds[program].append(run())
        print(f'{program:20} {seconds[program][-1]:6.2f} s', flush=True)
  medians = {program: round(statistics.median(times), 2) for program, times in seconds.items()}
  ratios = {program: round(median / medians['ours_warm'], 2) for program, median in medians.items()}
  print(json.dumps({'benchmark': 'startup', 'config': 'shakespeare_char', 'rounds': args.rounds,
                    'first_step_s': medians, 'times_ours_warm': ratios}))


if __name__ == '__main__':
  main()
