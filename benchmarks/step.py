"""Time of one whole training step (forward, backward, clipping, AdamW) on random tokens.

  python -m benchmarks.step --preset=char_small

The last line is JSON: median and best tokens/s, milliseconds, model FLOP/s (causal attention at half its cost).
Needs jax, flax and optax alone. benchmarks/torch_step.py is the same in PyTorch; benchmarks/table.py runs both in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.common import GEMM_SIZE, PRESETS, Preset, parser, run, segments
from llm_jax.base import runtime


class Step(NamedTuple):
  """A compiled step with its state."""

  call: Callable[[], float]  # runs one step and returns its loss
  num_params: int  # without position embeddings
  bytes_needed: int  # arguments, results and temporaries, by the compiler
  compile_s: float


def build(preset: Preset, batch: int, documents: int = 0, num_microbatches: int = 1, **model: Any) -> Step:
  """Compiles the step of a decoder of this shape; `model` has further fields of its config."""
  import jax
  import numpy as np

  from llm_jax.base.batch import Batch
  from llm_jax.base.builder import Sections
  from llm_jax.base.sharding import MeshConfig, batch_sharding, make_mesh
  from llm_jax.models.decoder import Decoder
  from llm_jax.models.decoder_config import DecoderConfig
  from llm_jax.optim.chain import OptimConfig, make_optimizer
  from llm_jax.optim.optimizers import AdamW
  from llm_jax.optim.schedules import Constant
  from llm_jax.training.memory import needed
  from llm_jax.training.shardings import abstract_state, boxed_params, shardings_of
  from llm_jax.training.state import init_state, train_step

  decoder = Decoder(DecoderConfig(
      vocab_size=preset.vocab_size, max_len=preset.seq_len, num_layers=preset.num_layers, embed_dim=preset.embed_dim,
      num_heads=preset.num_heads, **model))
  sections = Sections({'constant': Constant(100), 'adamw': AdamW(b2=0.99)})
  tx = make_optimizer(OptimConfig(learning_rate=1e-3, schedule='constant', sections=sections), 10_000)
  mesh = make_mesh(MeshConfig())
  ids = np.asarray(segments(batch, preset.seq_len, documents), np.int32)
  index = np.arange(preset.seq_len)
  starts = np.maximum.accumulate(np.where(np.diff(ids, prepend=0) > 0, index, 0), axis=1)
  packing = {'segment_ids': ids, 'positions': (index - starts).astype(np.int32)} if documents else {}

  def put(rows: np.ndarray) -> Batch:
    return Batch(**jax.device_put({'tokens': rows[:, :-1], 'targets': rows[:, 1:], **packing,
                                   'loss_mask': np.ones((batch, preset.seq_len), np.float32)}, batch_sharding(mesh)))

  rows = np.random.default_rng(0).integers(preset.vocab_size, size=(8, batch, preset.seq_len + 1), dtype=np.int32)
  batches, count = [put(r) for r in rows], 0
  with jax.set_mesh(mesh):
    shardings = shardings_of(abstract_state(boxed_params(batches[0], model=decoder), mesh, tx=tx))
    state = jax.jit(partial(init_state, model=decoder, tx=tx), out_shardings=shardings)(jax.random.key(0), batches[0])
    step = jax.jit(partial(train_step, model=decoder, tx=tx, seed=0, num_microbatches=num_microbatches),
                   in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, shardings.step),
                   donate_argnums=0)
    start = time.perf_counter()
    train = step.lower(state, batches[0]).compile()
    compile_s = time.perf_counter() - start

  def call() -> float:
    nonlocal state, count
    state, metrics = train(state, batches[count % 8])
    count += 1
    jax.block_until_ready(state)
    return float(metrics['loss'])

  num_params = sum(w.size for w in jax.tree.leaves(state.params)) - preset.seq_len * preset.embed_dim
  return Step(call, num_params, needed(train), compile_s)


def main() -> None:
  flags = parser(__doc__)
  flags.add_argument('--dtype', choices=['auto', 'f32', 'bf16'], default='auto', help='of matrix operands')
  flags.add_argument('--attention', default='auto')
  flags.add_argument('--remat', default='none')
  flags.add_argument('--scan_unroll', type=int, default=0, help='0: all layers')
  flags.add_argument('--num_microbatches', type=int, default=1)
  flags.add_argument('--tuning', choices=['on', 'off'], default='on', help='off: default allocator and XLA flags')
  args = flags.parse_args()
  if args.tuning == 'on':
    runtime.prepare()

  import jax  # after the settings are made
  import jax.numpy as jnp

  from llm_jax.base.devices import has_fast_bf16, peak_flops

  preset = PRESETS[args.preset]
  dtype = {'f32': 'float32', 'bf16': 'bfloat16', 'auto': 'bfloat16' if has_fast_bf16() else 'float32'}[args.dtype]
  step = build(preset, args.batch or preset.batch, args.documents, args.num_microbatches, dtype=dtype,
               attention=args.attention, remat=args.remat, scan_unroll=args.scan_unroll or preset.num_layers)
  square = jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype)
  product = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))
  peak = peak_flops(jax.devices())
  run(args, {'framework': f'llm_jax, jax {jax.__version__}', 'device': jax.devices()[0].device_kind, 'compile': True,
             'dtype': 'bf16' if dtype == 'bfloat16' else 'f32', 'compile_s': round(step.compile_s, 1),
             'gb_needed': round(step.bytes_needed / 1e9, 2), **({'peak_flops': peak} if peak else {})},
      step.num_params, step.call, lambda: jax.block_until_ready(product(square, square)))


if __name__ == '__main__':
  main()
