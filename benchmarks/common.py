"""Presets, FLOP counts and timing that the JAX and PyTorch steps share. Needs only Python."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Preset(NamedTuple):
  """A GPT-2 shape without biases, and a batch for it."""

  seq_len: int
  batch: int  # rows
  num_layers: int
  num_heads: int
  embed_dim: int
  vocab_size: int

  def flops(self, num_params: int, batch: int) -> int:
    """FLOPs of a step: 6 per parameter and token, without position embeddings; causal attention at half its cost."""
    return (6 * num_params + 6 * self.num_layers * self.embed_dim * self.seq_len) * batch * self.seq_len


PRESETS = {
    'char_tiny': Preset(64, 12, 4, 4, 128, 65),  # nanoGPT's settings for a laptop
    'char_small': Preset(256, 16, 6, 6, 384, 65),  # nanoGPT's shakespeare_char, a quarter of its batch
    'gpt2_cpu': Preset(512, 2, 12, 12, 768, 50304),  # GPT-2 small at a CPU's batch
    'gpt2': Preset(1024, 32, 12, 12, 768, 50304),  # GPT-2 small on one accelerator
    'gpt2_medium': Preset(1024, 16, 24, 16, 1024, 50304),
    'gpt_1b': Preset(2048, 8, 16, 16, 2048, 50304),
}
MEAN_DOCUMENT = 300  # tokens of a document, where rows hold several
GEMM_SIZE = 2048  # n of the n x n x n product that measures the machine's speed


def parser(doc: str) -> argparse.ArgumentParser:
  """The flags of both steps."""
  flags = argparse.ArgumentParser(description=doc.splitlines()[0])
  flags.add_argument('--preset', choices=PRESETS, default='char_small')
  flags.add_argument('--steps', type=int, default=30)
  flags.add_argument('--warmup', type=int, default=5)
  flags.add_argument('--batch', type=int, default=0, help='rows; 0: the preset\'s')
  flags.add_argument('--documents', type=int, default=0, metavar='TOKENS',
                     help='mean length of the documents in a row, to which attention is confined; 0: one per row')
  flags.add_argument('--serve', action='store_true', help='time steps on demand: see `serve`')
  return flags


def segments(rows: int, seq_len: int, mean: int, seed: int = 0) -> list[list[int]]:
  """Segment ids 1, 2, ... of rows of documents whose lengths are exponential with this mean; all 1 if it is 0."""
  draw = random.Random(seed)
  ids = []
  for _ in range(rows):
    row: list[int] = []
    while len(row) < seq_len:
      length = max(2, round(draw.expovariate(1 / mean))) if mean else seq_len
      row += [row[-1] + 1 if row else 1] * length
    ids.append(row[:seq_len])
  return ids


def run(args: argparse.Namespace, about: dict, num_params: int, step: Callable[[], float],
        gemm: Callable[[], None]) -> None:
  """Times `step` (runs one whole step and returns its loss) and prints one JSON line at the end."""
  preset = PRESETS[args.preset]
  batch = args.batch or preset.batch
  start = time.perf_counter()
  loss = step()
  about = {**about, 'preset': args.preset, 'first_step_s': round(time.perf_counter() - start, 2)}
  if args.serve:
    serve(about | {'tokens': batch * preset.seq_len, 'flops': preset.flops(num_params, batch)}, step, gemm)
    return
  for _ in range(args.warmup - 1):
    loss = step()
  seconds = []
  for _ in range(args.steps):
    start = time.perf_counter()
    loss = step()
    seconds.append(time.perf_counter() - start)
  print(json.dumps(about | rates(seconds, batch * preset.seq_len, preset.flops(num_params, batch))
                   | {'loss': round(loss, 4)}))


def rates(seconds: list[float], tokens: int, flops: float) -> dict[str, float]:
  """Median and best tokens/s, the step's milliseconds and FLOP/s, of steps of `tokens` tokens and `flops` FLOPs."""
  median = statistics.median(seconds)
  return {'tokens_per_second': round(tokens / median), 'best_tokens_per_second': round(tokens / min(seconds)),
          'step_ms': round(1e3 * median, 3), 'model_flops_per_second': round(flops / median, -7)}


def serve(about: dict, step: Callable[[], float], gemm: Callable[[], None]) -> None:
  """Prints `about`; then, for each line 'step SECONDS' or 'gemm SECONDS' on stdin, the times of steps or products.

  This times several programs in turn; each sleeps while another one runs.
  """
  print(json.dumps(about), flush=True)
  for line in sys.stdin:
    name, budget = line.split()
    work, seconds = {'step': step, 'gemm': gemm}[name], []
    while not seconds or sum(seconds) < float(budget):
      start = time.perf_counter()
      work()
      seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


def emit(**row: Any) -> None:
  """Prints a measurement, for benchmarks/gpu.py."""
  print('RESULT ' + json.dumps(row), flush=True)


def times(call: Callable[[], Any], budget: float = 0.5, least: int = 5, together: int = 10) -> list[float]:
  """Seconds of a call, within `budget` seconds, each the mean of `together` calls that are waited for at their end."""
  import jax
  jax.block_until_ready(call())
  jax.block_until_ready(call())
  seconds: list[float] = []
  while len(seconds) < least or together * sum(seconds) < budget:
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(together)][-1])
    seconds.append((time.perf_counter() - start) / together)
  return seconds
