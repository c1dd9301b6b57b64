"""Memory, recomputed FLOPs and time of each remat policy, for a small decoder.

  python -m benchmarks.remat

Temporary memory and FLOPs are the compiler's figures for the whole step; its FLOPs count a loop's body once, so they
only rank the policies. Times are medians of steps in turn. On a CPU there is no other memory for `offload`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks.scaling import medians, prepare
from llm_jax.base import runtime


def main():
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--embed_dim', type=int, default=256)
  flags.add_argument('--num_layers', type=int, default=8)
  flags.add_argument('--seq_len', type=int, default=256)
  flags.add_argument('--batch', type=int, default=8)
  flags.add_argument('--scan_unroll', type=int, default=1)
  flags.add_argument('--dtype', choices=['auto', 'float32', 'bfloat16'], default='auto', help='of matrix operands')
  flags.add_argument('--rounds', type=int, default=5)
  args = flags.parse_args()
  runtime.prepare()
  import jax

  from llm_jax.base.devices import has_fast_bf16
  from llm_jax.layers.stack import REMAT
  from llm_jax.models.decoder_config import DecoderConfig

  dtype: Any = ('bfloat16' if has_fast_bf16() else 'float32') if args.dtype == 'auto' else args.dtype
  runs, rows = {}, {}
  for name in REMAT:
    cfg = DecoderConfig(vocab_size=256, max_len=args.seq_len, num_layers=args.num_layers, embed_dim=args.embed_dim,
                        num_heads=max(1, args.embed_dim // 64), scan_unroll=args.scan_unroll, dtype=dtype, remat=name)
    runs[name], compiled, _ = prepare(cfg, args.batch, args.seq_len)
    memory = compiled.memory_analysis()
    rows[name] = {'temp_mb': round(memory.temp_size_in_bytes / 1e6, 1),
                  'host_mb': round(memory.host_temp_size_in_bytes / 1e6, 1),
                  'gflop': round(compiled.cost_analysis()['flops'] / 1e9, 3)}
  seconds = medians(runs, args.rounds)
  print(f'{"remat":16}{"temp MB":>10}{"host MB":>10}{"GFLOP":>10}{"time/none":>11}')
  for name, row in rows.items():
    row |= {'step_ms': round(1e3 * seconds[name], 1), 'time_ratio': round(seconds[name] / seconds['none'], 3)}
    print(f'{name:16}' + '{temp_mb:>10}{host_mb:>10}{gflop:>10}{time_ratio:>11}'.format(**row))
  print(json.dumps({'device': jax.devices()[0].device_kind, **vars(args), 'dtype': dtype, 'policies': rows}))


if __name__ == '__main__':
  main()
