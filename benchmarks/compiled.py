"""The step compiled for 16 TPU chips: memory, traffic and bytes between chips, beside MaxText's and beside the ideal.

  pip install 'llm_jax[plan-tpu]'
  python -m benchmarks.compiled                       # the four layouts in which MaxText 0.2.5 was compiled
  python -m benchmarks.compiled --shape=1b            # five layouts of a Llama shape with a billion parameters

Nothing is run: llm_jax/extras/plan compiles the step and reads its text. A layout takes one to five minutes. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from benchmarks.ideal import ideal
from llm_jax.base.builder import build as strict_build
from llm_jax.config import Config
from llm_jax.extras.plan.building import build, compile_step
from llm_jax.extras.plan.collectives import read_collectives
from llm_jax.extras.plan.targets import missing_compiler, open_target, parse_place, prepare
from llm_jax.extras.plan.traffic import hbm_bytes

LLAMA = {'positions': 'rope', 'norm': 'rms_norm', 'mlp': 'swiglu', 'tie_embeddings': False, 'remat': 'full',
         'num_kv_heads': 8, 'embed_dim': 2048}
SHAPES: dict[str, dict[str, Any]] = {
    '500m': LLAMA | {'vocab_size': 32_000, 'num_layers': 8, 'num_heads': 16, 'mlp_dim': 5632},
    '1b': LLAMA | {'vocab_size': 32_000, 'num_layers': 22, 'num_heads': 16, 'mlp_dim': 5632}}
# name: (data, fsdp, tensor; microbatches; fields of the model)
LAYOUTS: dict[str, dict[str, tuple[tuple[int, int, int], int, dict[str, Any]]]] = {
    '500m': {'fsdp 16': ((1, 16, 1), 1, {}), 'fsdp 16, save_matmuls': ((1, 16, 1), 1, {'remat': 'save_matmuls'}),
             'fsdp 8 x tensor 2': ((1, 8, 2), 1, {}), 'fsdp 16, 4 microbatches': ((1, 16, 1), 4, {})},
    '1b': {'data 16': ((16, 1, 1), 1, {}), 'fsdp 16': ((1, 16, 1), 1, {}), 'data 2 x fsdp 8': ((2, 8, 1), 1, {}),
           'data 2 x tensor 8': ((2, 1, 8), 1, {}), 'fsdp 8 x tensor 2': ((1, 8, 2), 1, {})}}
# MaxText 0.2.5 with jax 0.11.1 and libtpu 0.0.46, compiled for v5e:4x4 with the shape 500m, 64 rows of 2048 tokens, its
# splash attention and, for the second layout, its remat policy minimal_with_context: memory in GB; MB that a chip
# sends in a step; MB of these while nothing is computed.
MAXTEXT = {'fsdp 16': (2.83, 2661, 218), 'fsdp 16, save_matmuls': (6.00, 2732, 186),
           'fsdp 8 x tensor 2': (2.93, 4392, 2895), 'fsdp 16, 4 microbatches': (1.32, 10453, 681)}
ROWS, LENGTH = 64, 2048


def measure(shape: str, layout: str, place: Any, target: Any) -> dict[str, Any]:
  """The figures of one layout."""
  sizes, num_microbatches, fields = LAYOUTS[shape][layout]
  held = ROWS // (sizes[0] * sizes[1]) // num_microbatches * LENGTH
  config = strict_build(Config, {
      'model': SHAPES[shape] | fields, 'mesh': dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True)),
      'data': {'seq_len': LENGTH}, 'batch_tokens': ROWS * LENGTH, 'tokens_per_device': held})
  built = build(config, target, read_data=False)
  compiled = compile_step(built, num_microbatches)
  found = read_collectives(compiled.text, dict(built.mesh.shape))
  sent = sum(each.wire_bytes * each.executions for each in found)
  alone = sum(each.wire_bytes * each.executions for each in found if not each.overlapped)
  return {'memory_gb': compiled.memory['peak'] / 1e9, 'traffic_gb': hbm_bytes(compiled.text) / 1e9,
          'wire_mb': sent / 1e6, 'alone_mb': alone / 1e6, 'compile_s': compiled.compile_seconds,
          'ideal_mb': sum(ideal(built, num_microbatches).values()) / 1e6}


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--shape', choices=SHAPES, default='500m')
  flags.add_argument('--on', default='v5e:4x4')
  flags.add_argument('--only', action='append', help='a layout; may be repeated')
  args = flags.parse_args()
  place = parse_place(args.on)
  prepare(place, os.environ)
  if missing := missing_compiler(place):
    flags.error(missing)
  target, rows = open_target(place), {}
  print(f'{"layout":26} {"GB":>6} {"traffic":>8} {"sent MB":>8} {"ideal":>6} {"alone MB":>9} {"compile":>8}   '
        'MaxText: GB, sent, alone')
  for layout in args.only or LAYOUTS[args.shape]:
    row = rows[layout] = measure(args.shape, layout, place, target)
    other = MAXTEXT.get(layout) if args.shape == '500m' else None
    print(f'{layout:26} {row["memory_gb"]:6.2f} {row["traffic_gb"]:8.1f} {row["wire_mb"]:8.0f} '
          f'{row["wire_mb"] / row["ideal_mb"]:6.2f} {row["alone_mb"]:9.0f} {row["compile_s"]:6.0f} s   {other or ""}',
          flush=True)
  print(json.dumps({'on': args.on, 'shape': args.shape, 'rows': rows}))


if __name__ == '__main__':
  main()
