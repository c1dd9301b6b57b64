"""Time of one whole training step (forward, backward, clipping, AdamW) on random tokens.

  python benchmarks/step.py --config configs/gpt_small.py configs/shakespeare_char.py

Configs are timed in turn, round after round, so that what disturbs the machine disturbs them alike. One JSON line
each: median and best tokens/s, milliseconds, model FLOP/s (causal attention at half its cost), compile time.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from llm_jax.assemble import complete, example_batch
from llm_jax.config import load
from llm_jax.data import Data
from llm_jax.metrics import peak_flops
from llm_jax.models import make_model
from llm_jax.optim import make_optimizer
from llm_jax.sharding import batch_sharding, local_rows, make_mesh, num_batch_shards, put_batch
from llm_jax.step import init_state, state_shardings, train_step


def prepare(path: str, full_size: bool):
  """(seconds of one step, ...) as a function to call again and again, and what is known of it."""
  cpu_only = jax.default_backend() == 'cpu' and not full_size
  config = load(path).resolve({}, cpu_only=cpu_only)
  config = complete(config, Data({}, None, config.model.vocab_size or 66))
  mesh = make_mesh(config.mesh)
  held, num_microbatches = config.split_batch(num_batch_shards(mesh))
  model = make_model(config.model)
  tx, schedule = make_optimizer(config.optim, config.num_steps)
  rows, seq_len = config.rows_per_batch, config.data.seq_len
  tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=(rows, seq_len), dtype=np.int32)
  features = {'tokens': tokens, 'targets': tokens, 'loss_mask': np.ones((rows, seq_len), np.float32)}
  with jax.set_mesh(mesh):
    shardings = state_shardings(example_batch(config), mesh, model=model, tx=tx)
    state = jax.jit(partial(init_state, model=model, tx=tx), out_shardings=shardings)(
        jax.random.key(0), example_batch(config))
    batch = put_batch(features, local_rows(mesh, rows), rows, mesh)
    step = jax.jit(partial(train_step, model=model, tx=tx, schedule=schedule, seed=0,
                           num_microbatches=num_microbatches),
                   in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, shardings.step),
                   donate_argnums=0)

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    with jax.set_mesh(mesh):
      state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start

  flops = config.model.flops_per_token(seq_len) * config.batch_tokens
  about = {'config': Path(path).stem, 'device': jax.devices()[0].device_kind, 'num_devices': len(jax.devices()),
           'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)), 'batch_tokens': config.batch_tokens,
           'rows_held': held, 'dtype': config.model.dtype, 'first_step_s': round(run(), 2)}
  return run, about, flops, config.batch_tokens


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', nargs='+', default=['configs/gpt_small.py', 'configs/shakespeare_char.py'])
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--full_size', action='store_true', help='on a CPU too')
  args = parser.parse_args()
  prepared = [prepare(path, args.full_size) for path in args.config]
  seconds = [[] for _ in prepared]
  for _ in range(args.rounds):
    for (run, *_), times in zip(prepared, seconds, strict=True):
      times.append(run())
  peak = peak_flops(jax.devices())
  for (_, about, flops, tokens), times in zip(prepared, seconds, strict=True):
    median = statistics.median(times)
    print(json.dumps(about | {
        'step_ms': round(1e3 * median, 1), 'tokens_per_second': round(tokens / median),
        'best_tokens_per_second': round(tokens / min(times)), 'gflops_per_second': round(flops / median / 1e9, 1),
        **({'mfu': round(flops / median / peak, 4)} if peak else {})}))


if __name__ == '__main__':
  main()
