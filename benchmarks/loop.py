"""Overhead of the training loop around the step: data, transfer, logging, progress, checks, signals.

  python -m benchmarks.loop [--rounds=8]

The real loop.train is paused after each window of steps, and the same compiled step is called as often with one batch
that is already on the device. Windows of both are timed in turn. `overhead` is the median over rounds of loop/bare - 1.
`host_us` is the processor time per step of the loop's own thread, without waiting; `bare_host_us` that of the bare
calls, the cost of jax's dispatch; `cpu_us` the processor time per step of the whole process beyond the bare calls,
including its data and TensorBoard threads.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from benchmarks.common import PRESETS, Preset
from llm_jax.base import runtime
from llm_jax.base.builder import build
from llm_jax.base.sharding import local_rows, make_mesh, num_batch_shards, put_batch
from llm_jax.config import Config, base
from llm_jax.data import pipeline
from llm_jax.data.pipeline import example_batch
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import make_optimizer
from llm_jax.training import loop
from llm_jax.training.custom import Custom
from llm_jax.training.program import jit_step
from llm_jax.training.shardings import abstract_state, boxed_params, shardings_of
from llm_jax.training.state import init_state

CASES = [  # preset, intended milliseconds of a step, steps in a window
    ('char_tiny', 5, 200),
    ('char_small', 50, 40),
    ('char_tiny', 50, 40),  # dozens of short rows, each of which costs the data thread 10 us
]


def make_config(folder: Path, preset: Preset, rows: int, num_steps: int) -> Config:
  path = folder / 'tokens.bin'
  np.random.default_rng(0).integers(0, 65, 2_000_000, dtype=np.uint16).tofile(path)
  config = base()
  config.num_steps = num_steps
  config.batch_tokens = config.tokens_per_device = rows * preset.seq_len
  config.model.num_layers = config.model.scan_unroll = preset.num_layers
  config.model.embed_dim = preset.embed_dim
  config.model.num_heads = preset.num_heads
  config.model.vocab_size = preset.vocab_size
  config.model.max_len = preset.seq_len
  config.data.path = str(path)
  config.data.tokenizer = 'none'
  config.data.split = 'tail'
  config.data.seq_len = preset.seq_len
  config.data.mask_documents = False
  config.data.cache_dir = str(folder / 'cache')
  config.eval.every = config.checkpoint.every = 10 ** 9
  config.eval.max_tokens = preset.seq_len
  return build(Config, config.to_dict())


def bare_step(config: Config):
  """A function that runs the loop's compiled step `n` times on one batch and waits."""
  mesh = make_mesh(config.mesh)
  model = make_model(config.model)
  tx = make_optimizer(config.optim, config.num_steps)
  shape = (config.rows_per_batch, config.data.seq_len)
  tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
  features = {'tokens': tokens, 'targets': tokens, 'loss_mask': np.ones(shape, np.float32)}
  with jax.set_mesh(mesh):
    example = example_batch(config.data)
    shardings = shardings_of(abstract_state(boxed_params(example, model=model), mesh, tx=tx))
    state = jax.jit(partial(init_state, model=model, tx=tx), out_shardings=shardings)(jax.random.key(0), example)
    batch = put_batch(features, local_rows(mesh, shape[0]), shape[0], mesh)
    _, num_microbatches = config.split_batch(num_batch_shards(mesh))
    step = jit_step(config, mesh, shardings, None, num_microbatches, model=model, tx=tx)

  def run(n: int) -> None:
    nonlocal state
    metrics = None
    for _ in range(n):
      before = metrics
      state, metrics = step(state, batch, None)
      jax.block_until_ready(before)  # as far ahead as the loop dispatches
    jax.block_until_ready((state, metrics))

  return run


def clocks() -> np.ndarray:
  return np.array([time.perf_counter(), time.thread_time(), time.process_time()])


@dataclasses.dataclass
class Halted:
  """The loop's batches; times `bare` after every `window` steps before the loop continues."""

  batches: pipeline.Batches
  bare: object
  window: int
  warmup: int
  results: list
  num_given: int = 0
  start: np.ndarray | None = None

  def __next__(self):
    if self.num_given >= self.warmup and (self.num_given - self.warmup) % self.window == 0:
      jax.block_until_ready(jax.live_arrays())
      loop_end = clocks()
      self.bare(self.window)
      bare_end = clocks()
      if self.start is not None:
        self.results.append((loop_end - self.start, bare_end - loop_end))
      self.start = clocks()
    self.num_given += 1
    return next(self.batches)

  def __getattr__(self, name):
    return getattr(self.batches, name)


def find_rows(folder: Path, preset: Preset, milliseconds: int) -> int:
  """The number of rows for which a step takes about that long on this machine."""
  rows = 4
  for _ in range(3):  # the time does not grow in proportion to the rows
    bare = bare_step(make_config(folder, preset, rows, 1))
    bare(20)
    start = time.perf_counter()
    bare(20)
    rows = max(1, round(rows * milliseconds / (1e3 * (time.perf_counter() - start) / 20)))
  return rows


def measure(name: str, milliseconds: int, window: int, rounds: int) -> dict:
  preset, warmup, results = PRESETS[name], 20, []
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    rows = find_rows(folder, preset, milliseconds)
    config = make_config(folder, preset, rows, warmup + window * rounds + 1)
    bare = bare_step(config)
    bare(5)
    open_batches = pipeline.open_batches

    def halted(*args):
      return Halted(open_batches(*args), bare, window, warmup, results)

    with mock.patch.object(pipeline, 'open_batches', halted), contextlib.redirect_stdout(io.StringIO()):
      collections.deque(loop.train(config, folder / 'run', Custom()), maxlen=0)
  loop_times, bare_times = (np.array(times) / window for times in zip(*results, strict=True))
  median = partial(np.median, axis=0)
  return {'preset': name, 'rows': rows, 'rounds': len(results), 'bare_ms': round(1e3 * median(bare_times)[0], 2),
          'loop_ms': round(1e3 * median(loop_times)[0], 2),
          'overhead': round(statistics.median(loop_times[:, 0] / bare_times[:, 0]) - 1, 4),
          'host_us': round(1e6 * median(loop_times)[1]), 'bare_host_us': round(1e6 * median(bare_times)[1]),
          'cpu_us': round(1e6 * median(loop_times - bare_times)[2])}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=8)
  args = parser.parse_args()
  runtime.keep_freed_memory()  # as llm_jax.main does
  results = [measure(*case, args.rounds) for case in CASES]
  for result in results:
    print(json.dumps(result))
  print(json.dumps({'benchmark': 'loop', 'device': jax.devices()[0].device_kind, 'cases': results}))


if __name__ == '__main__':
  main()
