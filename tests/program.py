"""Runs the package's programs as real processes, with real signals and files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

TINY = '''"""A run of a few seconds."""
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = 60
  config.batch_tokens = 256
  config.tokens_per_device = 128
  config.model.num_layers = 2
  config.model.embed_dim = 32
  config.model.num_heads = 2
  config.model.dropout = 0.1
  config.data.path = {corpus!r}
  config.data.vocab_size = 300
  config.model.vocab_size = 320  # padded: samples must not contain ids without text
  config.data.seq_len = 32
  config.optim.learning_rate = 3e-3
  config.optim.schedule = 'constant'  # so that runs of different lengths share a compiled program
  config.eval.every = 20
  config.eval.prompts = ('', 'def ')
  config.eval.sample_tokens = 16
  config.checkpoint.every = 10
  config.log.every = 1
  return config
'''


def write_config(folder: Path) -> Path:
  """Writes a tiny config, with three files of this project as corpus."""
  corpus = folder / 'corpus'
  corpus.mkdir()
  for name in ('training/loop.py', 'config.py', 'training/log.py'):
    path = ROOT / 'llm_jax' / name
    (corpus / path.name).write_bytes(path.read_bytes())
  path = folder / 'tiny.py'
  path.write_text(TINY.format(corpus=str(corpus)))
  return path


def environment(folder: Path) -> dict[str, str]:
  kept = {k: v for k, v in os.environ.items() if k != 'JAX_NUM_CPU_DEVICES'}
  return kept | {
      'JAX_PLATFORMS': 'cpu', 'LLM_JAX_CACHE': str(folder / 'cache'), 'PYTHONPATH': str(ROOT),
      # All tests share compiled programs, as the same small programs occur in many of them.
      'JAX_COMPILATION_CACHE_DIR': os.environ['LLM_JAX_CACHE'] + '/programs',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true'}


def start(folder: Path, command: str, *flags: str) -> subprocess.Popen:
  program = ['llm_jax.main'] if command == 'main' else ['llm_jax', *command.split()]
  return subprocess.Popen([sys.executable, '-m', *program, *flags], cwd=folder, env=environment(folder),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


IN_TURN = """
import json, sys
from llm_jax.__main__ import main
from llm_jax.base.process import run_as_program
run_as_program(lambda argv: [main(words) for words in json.loads(argv[0])])
"""


def start_in_turn(folder: Path, *commands: tuple[str, ...]) -> subprocess.Popen:
  """One process for several commands of llm-jax; starting takes as long as a tiny run."""
  return subprocess.Popen([sys.executable, '-c', IN_TURN, json.dumps(commands)], cwd=folder, env=environment(folder),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
  """What the process prints, without the lines on what it waits for."""
  output = process.communicate(timeout=240)[0]
  assert process.returncode == code, f'exit {process.returncode}, not {code}:\n{output[-4000:]}'
  return without_waiting(output)


def without_waiting(output: str) -> str:
  lines = r'^mesh: .*\n|^(loading|reading|compiling|starting) .*\.\.\.\n|^compiling \.\.\.\n'
  return re.sub(lines, '', output, flags=re.MULTILINE)


def signal_at(process: subprocess.Popen, workdir: Path, step: int, number: signal.Signals, saved: int = 0) -> None:
  """Sends the signal as soon as metrics.jsonl has a line for `step`, and the checkpoint of step `saved` is complete."""
  deadline = time.monotonic() + 180
  while process.poll() is None and time.monotonic() < deadline:
    path = workdir / 'metrics.jsonl'
    complete = not saved or (workdir / 'checkpoints' / str(saved) / 'manifest.json').exists()
    if complete and path.exists() and f'"step": {step},' in path.read_text():
      break
    time.sleep(0.01)
  assert process.poll() is None, process.communicate()[0][-4000:]
  process.send_signal(number)
