"""Time of a training step against its counted FLOPs, over width, depth, context, batch and vocabulary.

  python -m benchmarks.scaling --out=benchmarks/results/scaling.png

One axis at a time; times are medians of steps of all sizes in turn. `growth` is the ratio of times to the smallest size
divided by the ratio of FLOPs: 1 is proportional; below 1 the larger size uses the machine better.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llm_jax.base import runtime

BASE = {'width': 128, 'depth': 4, 'context': 128, 'batch': 8, 'vocabulary': 1024}
AXES = {'width': (64, 128, 256, 512), 'depth': (2, 4, 16), 'context': (64, 128, 512), 'batch': (4, 8, 32),
        'vocabulary': (256, 1024, 8192)}
HEAD_DIM = 32


def prepare(cfg, batch: int, seq_len: int) -> tuple[Callable[[], float], Any, float]:
  """(seconds of one step, the compiled step, its counted FLOPs) of a decoder with clipping and AdamW."""
  import jax  # after the settings are made
  import numpy as np

  from llm_jax.base.batch import Batch
  from llm_jax.models.decoder import Decoder
  from llm_jax.optim.chain import OptimConfig, make_optimizer
  from llm_jax.training.state import init_state, train_step

  model = Decoder(cfg)
  tx = make_optimizer(OptimConfig(), 10_000)
  tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=(batch, seq_len + 1), dtype=np.int32)
  data = Batch(**jax.device_put({'tokens': tokens[:, :-1], 'targets': tokens[:, 1:],
                                 'loss_mask': np.ones((batch, seq_len), np.float32)}))
  # Filled with constants, as compiling the initialization would take longer than the measurement.
  state = jax.eval_shape(partial(init_state, model=model, tx=tx), jax.random.key(0), data)
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype)), state).replace(
      params=jax.tree.map(lambda s: jax.device_put(rng.normal(0, 0.02, s.shape).astype(s.dtype)), state.params))
  step = jax.jit(partial(train_step, model=model, tx=tx, seed=0), donate_argnums=0)
  compiled = step.lower(state, data).compile()

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = compiled(state, data)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start

  run()
  return run, compiled, cfg.flops_per_token(seq_len) * batch * seq_len


def medians(runs: dict, rounds: int) -> dict:
  """The median time of each; measured in turn, so that disturbances affect all of them."""
  seconds: dict = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      seconds[name].append(run())
  return {name: statistics.median(times) for name, times in seconds.items()}


def plot(rows: list[dict], path: Path) -> None:
  import matplotlib
  matplotlib.use('agg')
  import matplotlib.pyplot as plt
  figure, axis = plt.subplots(figsize=(7, 5))
  for name in AXES:
    own = [row for row in rows if row['axis'] == name]
    axis.plot([row['gflop'] for row in own], [row['step_ms'] for row in own], 'o-', label=name)
  base = next(row for row in rows if row['value'] == BASE[row['axis']])
  ends = [min(row['gflop'] for row in rows), max(row['gflop'] for row in rows)]
  axis.plot(ends, [base['step_ms'] * x / base['gflop'] for x in ends], 'k:', label='proportional')
  axis.set(xscale='log', yscale='log', xlabel='counted GFLOP of a step', ylabel='milliseconds of a step')
  axis.xaxis.set_minor_formatter('')
  axis.yaxis.set_minor_formatter('')
  axis.grid(alpha=0.3)
  axis.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120, bbox_inches='tight')


def main():
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--rounds', type=int, default=5)
  flags.add_argument('--out', type=Path, help='a PNG (needs matplotlib)')
  args = flags.parse_args()
  runtime.prepare()
  import jax

  from llm_jax.base.devices import has_fast_bf16
  from llm_jax.models.decoder_config import DecoderConfig

  dtype: Any = 'bfloat16' if has_fast_bf16() else 'float32'
  sizes = {tuple({**BASE, axis: value}.items()) for axis, values in AXES.items() for value in values}
  runs, flops = {}, {}
  for size in sorted(sizes):
    s = dict(size)
    cfg = DecoderConfig(vocab_size=s['vocabulary'], max_len=s['context'], num_layers=s['depth'], embed_dim=s['width'],
                        num_heads=s['width'] // HEAD_DIM, dtype=dtype)
    runs[size], _, flops[size] = prepare(cfg, s['batch'], s['context'])
  seconds = medians(runs, args.rounds)
  rows = []
  print(f'{"axis":12}{"value":>8}{"GFLOP":>10}{"ms":>10}{"GFLOP/s":>10}{"growth":>9}')
  for axis, values in AXES.items():
    first = tuple({**BASE, axis: values[0]}.items())
    for value in values:
      size = tuple({**BASE, axis: value}.items())
      rows.append({'axis': axis, 'value': value, 'gflop': round(flops[size] / 1e9, 3),
                   'step_ms': round(1e3 * seconds[size], 2),
                   'gflops_per_second': round(flops[size] / seconds[size] / 1e9, 1),
                   'growth': round(seconds[size] / seconds[first] / (flops[size] / flops[first]), 3)})
      print('{axis:12}{value:>8}{gflop:>10}{step_ms:>10}{gflops_per_second:>10}{growth:>9}'.format(**rows[-1]))
  if args.out:
    plot(rows, args.out)
  print(json.dumps({'device': jax.devices()[0].device_kind, 'dtype': dtype, 'base': BASE, 'rows': rows}))


if __name__ == '__main__':
  main()
