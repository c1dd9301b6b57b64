"""How long a checkpoint blocks training.

  python -m benchmarks.checkpoint [--saves=5]

Runs the real loop without validation. `gap_steps` is the longest time between two steps around a save, minus the
usual time, in steps (median and worst save): how long the loop is blocked. `cost_steps` is the sum of the additional
time of all steps from one save to the next: on a CPU, writing competes with the steps.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from llm_jax.base import runtime
from llm_jax.base.builder import build
from llm_jax.config import Config, base
from llm_jax.training import log as metrics
from llm_jax.training import loop, session
from llm_jax.training.custom import Custom

EVERY = 20  # steps


def make_config(folder: Path, saves: int) -> Config:
  np.random.default_rng(0).integers(0, 8192, 1_000_000, dtype=np.uint16).tofile(folder / 'tokens.bin')
  config = base()
  config.num_steps = EVERY * (saves + 1) + 1
  config.batch_tokens = config.tokens_per_device = 1024
  config.model.num_layers = config.model.scan_unroll = 4
  config.model.embed_dim = 256
  config.model.num_heads = 4
  config.model.vocab_size = 8192
  config.model.dtype = 'float32'
  config.data.path = str(folder / 'tokens.bin')
  config.data.tokenizer = 'none'
  config.data.split = 'tail'
  config.data.seq_len = 64
  config.data.mask_documents = False
  config.data.cache_dir = str(folder / 'cache')
  config.checkpoint.every = EVERY
  config.eval.every = 10 ** 9
  config.eval.max_tokens = 64
  return build(Config, config.to_dict())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--saves', type=int, default=5)
  args = parser.parse_args()
  runtime.keep_freed_memory()  # as llm_jax.main does
  finished: list[float] = []

  def unpack_metrics(packed):
    values = metrics.unpack_metrics(packed)  # waits for the step
    finished.append(time.perf_counter())
    return values

  with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
    config = make_config(Path(name), args.saves)
    with mock.patch.object(session, 'unpack_metrics', unpack_metrics):
      collections.deque(loop.train(config, Path(name) / 'run', Custom()), maxlen=0)
    last = Path(name) / 'run' / 'checkpoints' / str(config.num_steps)
    size = sum(path.stat().st_size for path in last.rglob('*') if path.is_file())
  gaps = np.diff(finished)  # gaps[i]: from the end of step i + 1 to that of step i + 2
  windows = gaps[EVERY - 1:EVERY - 1 + EVERY * args.saves].reshape(args.saves, EVERY)  # each begins with a save
  usual = float(np.median(windows[:, EVERY // 2:]))
  longest = windows[:, :3].max(axis=1) / usual - 1
  cost = (windows - usual).sum(axis=1) / usual
  print(json.dumps({
      'benchmark': 'checkpoint', 'device': jax.devices()[0].device_kind, 'cores': os.cpu_count(),
      'megabytes': round(size / 1e6, 1), 'step_ms': round(1e3 * usual, 1),
      'gap_steps': round(float(np.median(longest)), 2), 'gap_steps_worst': round(float(longest.max()), 2),
      'cost_steps': round(float(np.median(cost)), 2)}))


if __name__ == '__main__':
  main()
