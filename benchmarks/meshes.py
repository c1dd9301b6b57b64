"""Every mesh of eight devices: losses beside those of one device, and bytes between TPU chips beside the ideal.

  pip install 'llm_jax[plan-tpu]'
  python -m benchmarks.meshes                                # 35 meshes, those with a context axis also with a ring
  python -m benchmarks.meshes --only=fsdp8 --only=stage2-fsdp4 --collectives

A row has the largest difference of the losses of four steps on eight virtual CPU devices to those of one, in float32,
and MB that a chip sends in a step compiled for --on, which is not run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from functools import partial
from typing import Any

import numpy as np

from llm_jax.base.builder import build as strict_build
from llm_jax.base.sharding import MESH_AXES, MeshConfig, batch_sharding, local_rows, make_mesh, put_batch, use_mesh
from llm_jax.extras.plan.targets import VIRTUAL, missing_compiler, open_target, parse_place, prepare

DEVICES = 8
MICROBATCHES = 2
ROWS = MICROBATCHES * DEVICES
LENGTH, VOCAB = 32, 64  # of the rows on CPU
TINY = {'vocab_size': VOCAB, 'max_len': LENGTH, 'num_layers': 8, 'embed_dim': 32, 'num_heads': 16, 'num_kv_heads': 8,
        'head_dim': 8, 'mlp_dim': 64, 'mlp': 'swiglu', 'norm': 'rms_norm', 'positions': 'rope', 'dtype': 'float32'}
# Compiled: eight layers, so that there can be eight stages. 16 rows of 2,048 tokens, two on each chip.
SHAPE = {'positions': 'rope', 'norm': 'rms_norm', 'mlp': 'swiglu', 'tie_embeddings': False, 'remat': 'full',
         'vocab_size': 4096, 'num_layers': 8, 'embed_dim': 512, 'num_heads': 16, 'num_kv_heads': 8, 'head_dim': 64,
         'mlp_dim': 1536}
COMPILED_LENGTH = 2048


def cases() -> dict[str, dict[str, Any]]:
  """Fields of config.mesh by name."""
  found = {}
  for sizes in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES)):
    if math.prod(sizes) == DEVICES:
      fields = dict(zip(MESH_AXES, sizes, strict=True))
      name = '-'.join(f'{axis}{size}' for axis, size in fields.items() if size > 1)
      found[name] = fields
      if fields['context'] > 1:
        found[f'{name}-ring'] = fields | {'context_attention': 'ring'}
  return found


def features(n: int) -> dict[str, np.ndarray]:
  """Rows of packed documents, with padding at the end of some."""
  rng = np.random.default_rng(n)
  tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1), np.int32)
  segments = np.cumsum(rng.random((ROWS, LENGTH)) < 0.1, axis=1, dtype=np.int32) + 1
  segments[: ROWS // 2, -3:] = 0
  begins = np.diff(segments, axis=1, prepend=-1) != 0
  starts = np.maximum.accumulate(np.where(begins, np.arange(LENGTH), 0), axis=1)
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_mask': (segments > 0).astype(np.float32),
          'positions': (np.arange(LENGTH) - starts).astype(np.int32), 'segment_ids': segments}


def losses(fields: dict[str, Any], start: Any = None, num_steps: int = 4) -> tuple[list[float], Any]:
  """(losses, first state) of a small decoder on a mesh of virtual CPU devices; `start` is its first state, if given."""
  import jax
  import optax

  from llm_jax.models.decoder import Decoder
  from llm_jax.models.decoder_config import DecoderConfig
  from llm_jax.training.shardings import abstract_state, boxed_params, shardings_of
  from llm_jax.training.state import init_state, train_step
  config = MeshConfig(**fields)
  mesh = make_mesh(config, jax.devices()[:math.prod(config.sizes)])
  model, tx = Decoder(DecoderConfig(**TINY)), optax.adam(1e-2)
  with use_mesh(mesh, config):
    rows = local_rows(mesh, ROWS)
    batches = [put_batch(features(n), rows, ROWS, mesh) for n in range(num_steps)]
    abstract = abstract_state(boxed_params(batches[0], model=model), mesh, tx=tx, is_trainable=lambda path: True)
    shardings, found = shardings_of(abstract), []
    if start is None:
      start = jax.device_get(jax.jit(partial(init_state, model=model, tx=tx))(jax.random.key(0), batches[0]))
    step = jax.jit(partial(train_step, model=model, tx=tx, seed=0, num_microbatches=MICROBATCHES),
                   in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, shardings.step))
    state = jax.device_put(start, shardings)
    for batch in batches:
      state, metrics = step(state, batch)
      found.append(float(metrics['loss']))
  return found, start


def compiled(fields: dict[str, Any], place: Any, target: Any, level: str) -> dict[str, Any]:
  """What a chip sends in a step compiled for the target, and the ideal, in MB."""
  import jax

  from benchmarks.ideal import ideal
  from llm_jax.config import Config
  from llm_jax.extras.plan.building import build, compile_step
  from llm_jax.extras.plan.collectives import read_collectives
  from llm_jax.extras.plan.work import collective_rows
  shards = DEVICES // fields['tensor']  # of tokens
  config = strict_build(Config, {
      'model': SHAPE, 'mesh': fields, 'data': {'seq_len': COMPILED_LENGTH}, 'batch_tokens': ROWS * COMPILED_LENGTH,
      'tokens_per_device': ROWS * COMPILED_LENGTH // shards // MICROBATCHES})
  built = build(config, target, read_data=False)
  jax.config.update('jax_optimization_level', level)
  result = compile_step(built, MICROBATCHES)
  jax.config.update('jax_optimization_level', 'UNKNOWN')
  found = collective_rows(read_collectives(result.text, dict(built.mesh.shape)), place)
  parts = {name: size / 1e6 for name, size in ideal(built, MICROBATCHES).items() if size}
  return {'sent_mb': sum(row['wire_bytes'] for row in found) / 1e6, 'ideal_mb': sum(parts.values()), 'parts_mb': parts,
          'compile_s': result.lower_seconds + result.compile_seconds, 'collectives': found}


def show(row: dict[str, Any]) -> None:
  """Prints the parts of the ideal, and what is sent by kind, axes and dtype."""
  print('    ideal: ' + ', '.join(f'{name} {size:.1f}' for name, size in row['parts_mb'].items()))
  for one in row['collectives']:
    if one['wire_bytes'] > 1e5:
      print(f'    {one["wire_bytes"] / 1e6:9.1f} MB {one["kind"]:18} {"+".join(one["axes"]):15} {one["dtype"]:5}'
            f'{one["executions"]:5} times', flush=True)


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--on', default='v5e:2x4', help='eight devices to compile for (default: v5e:2x4)')
  flags.add_argument('--only', action='append', help='a mesh, such as stage2-fsdp4; may be repeated (default: all)')
  flags.add_argument('--skip', choices=('losses', 'bytes'), help='what is not measured (default: nothing)')
  flags.add_argument('--collectives', action='store_true', help='print what is sent by kind, axes and dtype')
  flags.add_argument('--level', default='UNKNOWN', help='jax_optimization_level for --on; O0 compiles in a quarter of '
                     'the time, and sends some activations over tensor in float32 (default: the own level of JAX)')
  args = flags.parse_args()
  place = parse_place(args.on)
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --{VIRTUAL}={DEVICES}'
  prepare(place, os.environ)
  if args.skip != 'bytes' and (missing := missing_compiler(place)):
    flags.error(missing)
  target = open_target(place) if args.skip != 'bytes' else None
  wanted, start = losses({'data': 1}) if args.skip != 'losses' else ([], None)
  print(f'{"mesh":30} {"losses":>8} {"sent MB":>8} {"ideal":>8} {"ratio":>6} {"compile":>9}')
  every, rows = cases(), {}
  for name in args.only or every:
    row: dict[str, Any] = {'loss': 0.0, 'sent_mb': 0.0, 'ideal_mb': 1.0, 'compile_s': 0.0}
    if args.skip != 'losses':
      row['loss'] = float(np.abs(np.subtract(losses(every[name], start)[0], wanted)).max())
    if args.skip != 'bytes':
      row |= compiled(every[name], place, target, args.level)
    rows[name] = row
    print(f'{name:30} {row["loss"]:8.1e} {row["sent_mb"]:8.0f} {row["ideal_mb"]:8.0f} '
          f'{row["sent_mb"] / row["ideal_mb"]:6.2f} {row["compile_s"]:7.0f} s', flush=True)
    if args.collectives and args.skip != 'bytes':
      show(row)
  print(json.dumps({'on': args.on, 'rows': rows}))


if __name__ == '__main__':
  main()
