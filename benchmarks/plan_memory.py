"""The memory that llm-jax plan predicts for a step against the peak that a process has while it runs the step, on CPUs.

  python -m benchmarks.plan_memory
  python -m benchmarks.plan_memory --only=base

Each config runs in a process of its own: it builds and compiles the step as plan does, fills state and batch, resets
the kernel's record of peak memory, and runs three steps, with the allocator as glibc has it. Arrays of all virtual
devices count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

BASE = {'model.num_layers': 4, 'model.embed_dim': 512, 'model.num_heads': 8, 'model.vocab_size': 8192,
        'model.scan_unroll': 1, 'model.dtype': 'float32', 'data.seq_len': 256, 'batch_tokens': 4096,
        'tokens_per_device': 4096}
# name: (devices, fields that differ)
CONFIGS = {
    'base': (1, {}),
    'bfloat16': (1, {'model.dtype': 'bfloat16'}),
    'save_attention': (1, {'model.remat': 'save_attention'}),
    'full': (1, {'model.remat': 'full', 'tokens_per_device': 8192, 'batch_tokens': 8192}),
    'microbatches': (1, {'tokens_per_device': 1024}),
    'unrolled': (1, {'model.scan_unroll': 4}),
    'swiglu': (1, {'model.mlp': 'swiglu', 'model.norm': 'rms_norm', 'model.positions': 'rope',
                   'model.num_kv_heads': 2, 'model.tie_embeddings': False}),
    'wide': (1, {'model.embed_dim': 1024, 'model.num_layers': 2}),
    'data': (4, {'batch_tokens': 8192, 'tokens_per_device': 2048}),
    'fsdp': (4, {'batch_tokens': 8192, 'tokens_per_device': 2048, 'mesh.data': 1, 'mesh.fsdp': 4}),
    # Not among those that the constants in extras/plan/building.py were fitted to.
    'vocabulary': (1, {'model.vocab_size': 32768, 'batch_tokens': 2048, 'tokens_per_device': 2048}),
    'narrow': (1, {'model.embed_dim': 256, 'model.num_layers': 8, 'model.remat': 'save_matmuls'}),
    'long': (1, {'data.seq_len': 1024, 'model.remat': 'full'}),
    'tensor': (4, {'mesh.data': 2, 'mesh.tensor': 2, 'tokens_per_device': 2048}),
}


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--only', choices=CONFIGS)
  flags.add_argument('--child', choices=CONFIGS, help=argparse.SUPPRESS)
  args = flags.parse_args()
  if args.child:
    print(json.dumps(measure(args.child)))
    return
  rows = []
  print(f'{"":16}{"predicted":>12}{"measured":>12}{"estimate":>12}  MB')
  for name in (args.only,) if args.only else CONFIGS:
    done = subprocess.run([sys.executable, '-m', 'benchmarks.plan_memory', f'--child={name}'], check=True,
                          stdout=subprocess.PIPE, text=True)
    rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(f'{name:16}' + ''.join(f'{rows[-1][key] / 1e6:12.1f}' for key in ('predicted', 'measured', 'estimate'))
          + f'  {rows[-1]["predicted"] / rows[-1]["measured"]:.3f}', flush=True)
  print(json.dumps(rows))


def measure(name: str) -> dict:
  """{'name', 'predicted', 'measured', 'estimate'}: bytes of all devices."""
  from llm_jax.extras.plan.targets import open_target, parse_place, prepare
  devices, fields = CONFIGS[name]
  place = parse_place(f'cpu:{devices}')
  prepare(place, os.environ)
  import jax
  import numpy as np

  from llm_jax import config_file
  from llm_jax.extras.plan.building import build, memory_of
  from llm_jax.training.estimate import estimate
  config = config_file.open_config(Path(__file__).parents[1] / 'configs/gpt_small.py').resolve(
      {**BASE, **fields}, cpu_only=False)
  built = build(config, open_target(place), read_data=False)
  _, number = built.config.split_batch(built.num_shards)
  compiled = built.lower(number).compile()
  predicted = memory_of(compiled, built, number)['peak'] * devices
  found = estimate(built.config, built.abstract, built.mesh, number, 'cpu')

  def fill(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.zeros(leaf.shape, leaf.dtype)[index] + (
        np.ones((), leaf.dtype) / 64).astype(leaf.dtype))

  from llm_jax.base.sharding import batch_sharding
  warm_up(jax)
  before = resident('VmRSS')
  state = jax.tree.map(lambda leaf: fill(leaf, leaf.sharding), built.abstract)
  batch = jax.tree.map(lambda leaf: fill(leaf, batch_sharding(built.mesh)), built.batch)
  state, metrics = compiled(state, batch, {})  # what NumPy holds cannot be donated
  jax.block_until_ready((state, metrics))
  trim()
  Path('/proc/self/clear_refs').write_text('5')  # VmHWM begins anew
  for _ in range(3):
    state, metrics = compiled(state, batch, {})
  jax.block_until_ready((state, metrics))
  return {'name': name, 'predicted': predicted, 'measured': resident('VmHWM') - before,
          'estimate': found.total * devices}


def warm_up(jax) -> None:
  """Runs a product, so that threads and their buffers exist, and returns what building has freed."""
  x = jax.numpy.ones((256, 256))
  (x @ x).block_until_ready()
  trim()


def trim() -> None:
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)


def resident(field: str) -> int:
  """Bytes of this process in memory, now (VmRSS) or at most (VmHWM)."""
  return int(re.search(rf'{field}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


if __name__ == '__main__':
  main()
