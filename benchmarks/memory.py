"""Memory and time of the cross-entropy with readout and gradients: all logits at once against losses/readout.py.

  python -m benchmarks.memory

Memory is the compiler's figure for temporary arrays; the shapes in `plan` are compiled but not run. Time is measured
with the shapes in `run`, in turn, as the ratio of medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial

from llm_jax.base import runtime

# name: (B, T, D, V)
PLAN = {'gpt2': (32, 1024, 768, 50304), 'gpt_1b': (8, 2048, 2048, 50304), 'char_small': (16, 256, 384, 65)}
RUN = {'gpt2_cpu': (2, 512, 768, 50304)}


def main():
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--rounds', type=int, default=5)
  flags.add_argument('--chunk_mib', type=int, default=0, help='MiB of logits at a time; 0: the default of the package')
  args = flags.parse_args()
  runtime.prepare()

  import jax  # after the settings are made
  import jax.numpy as jnp
  import optax

  from llm_jax.base.devices import has_fast_bf16, platform
  from llm_jax.losses import readout as losses
  from llm_jax.models.blocks import project

  if args.chunk_mib:
    losses.CHUNK_BYTES[platform()] = args.chunk_mib * 2**20
  dtype = jnp.bfloat16 if has_fast_bf16() else jnp.float32

  def head(w):
    return partial(project, 'BTD,VD->BTV', dtype, 1.0, 0.0, w.shape[0])

  def plain(x, w, targets, weights):
    nll = optax.softmax_cross_entropy_with_integer_labels(head(w)(w, x), targets)
    return jnp.sum(nll * weights)

  def chunked(x, w, targets, weights):
    return losses.cross_entropy(losses.Readout(x, w, head(w), dtype), targets, weights)[0]

  def compiled(loss, B, T, D, V):
    shapes = [((B, T, D), jnp.float32), ((V, D), jnp.float32), ((B, T), jnp.int32), ((B, T), jnp.float32)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()

  def seconds(step, arrays):
    start = time.perf_counter()
    jax.block_until_ready(step(*arrays))
    return time.perf_counter() - start

  rows = []
  print(f'{"":12}{"logits":>10}{"plain":>10}{"chunked":>10}  MiB')
  for name, shape in {**PLAN, **RUN}.items():
    steps = [compiled(loss, *shape) for loss in (plain, chunked)]
    B, T, D, V = shape
    mib = [n / 2**20 for n in (4 * B * T * V, *(s.memory_analysis().temp_size_in_bytes for s in steps))]
    rows.append({'shape': name, **dict(zip(('logits_mib', 'plain_mib', 'chunked_mib'), map(round, mib), strict=True))})
    print(f'{name:12}' + ''.join(f'{m:10.0f}' for m in mib))
    if name in RUN:
      keys = jax.random.split(jax.random.key(0), 3)
      arrays = (jax.random.normal(keys[0], (B, T, D)), 0.02 * jax.random.normal(keys[1], (V, D)),
                jax.random.randint(keys[2], (B, T), 0, V), jnp.full((B, T), 1 / (B * T)))
      times = [[seconds(step, arrays) for step in steps] for _ in range(args.rounds + 1)][1:]
      plain_s, chunked_s = (statistics.median(column) for column in zip(*times, strict=True))
      rows[-1] |= {'plain_ms': round(1e3 * plain_s, 1), 'chunked_ms': round(1e3 * chunked_s, 1),
                   'time_ratio': round(chunked_s / plain_s, 3)}
      print(f'{name:12}{plain_s:10.3f} s plain, {chunked_s:.3f} s chunked: {chunked_s / plain_s:.3f} times')
  print(json.dumps({'device': jax.devices()[0].device_kind, 'chunk_mib': losses.CHUNK_BYTES[platform()] / 2**20,
                    'rows': rows}))


if __name__ == '__main__':
  main()
