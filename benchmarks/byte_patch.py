"""One training step of configs/bytes_small.py on random bytes, compared with the same in PyTorch; timed in turn.

  python -m benchmarks.byte_patch --torch=/path/to/an/environment/with/torch/bin/python

Each variant is a process that sleeps while another one runs: A B C A B C ..., after a warm-up round. "As its authors"
uses the cumulative sum of the original, "masked" computes the same by masked products. Without --torch only our step is
timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from benchmarks.common import GEMM_SIZE, serve
from benchmarks.table import MALLOC, Worker

VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {  # of PyTorch: flags and environment
    'as its authors': ([], {}),
    'masked': (['--linear=masked'], {}),
    'masked + malloc': (['--linear=masked'], MALLOC),
    'masked, compiled + malloc': (['--linear=masked', '--compile'], MALLOC),
}


class Side(Worker):
  """A Worker for a program without presets."""

  def __init__(self, python: str, module: str, flags: list[str], env: dict[str, str]):
    self._process = subprocess.Popen([python, '-m', module, '--serve', *flags], text=True, stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, env=os.environ | env)
    self.about, self.seconds = self._read(), []


def serve_ours(path: str) -> None:
  from llm_jax.base import runtime
  runtime.prepare()
  import jax
  import jax.numpy as jnp

  from benchmarks.loop import bare_step
  from llm_jax.config_file import open_config
  from llm_jax.data.open import Data
  from llm_jax.data.pipeline import example_batch
  from llm_jax.data.tokenizers.tokenizer import ByteTokenizer
  from llm_jax.models.registry import make_model
  from llm_jax.training.resolve import resolve

  config = open_config(path).resolve({}, cpu_only=jax.default_backend() == 'cpu')
  config = resolve(config, Data({'train': {}}, None, len(ByteTokenizer().token_bytes)))
  shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0), example_batch(config.data))
  run = bare_step(config)
  square = jnp.ones((GEMM_SIZE, GEMM_SIZE))
  product = jax.jit(jnp.matmul)
  start = time.perf_counter()
  run(1)
  serve({'framework': f'llm_jax, jax {jax.__version__}', 'params': sum(x.size for x in jax.tree.leaves(shapes)),
         'first_step_s': round(time.perf_counter() - start, 2), 'tokens': config.batch_tokens},
        lambda: run(1), lambda: jax.block_until_ready(product(square, square)))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/bytes_small.py')
  parser.add_argument('--torch', help='a Python that has torch')
  parser.add_argument('--variants', nargs='+', choices=list(VARIANTS), default=list(VARIANTS)[:2], help='of PyTorch')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=10, help='seconds for each variant in a round')
  parser.add_argument('--serve', action='store_true', help='time steps on demand: see common.serve')
  args = parser.parse_args()
  if args.serve:
    serve_ours(args.config)
    return
  sides = {'llm_jax': Side(sys.executable, 'benchmarks.byte_patch', [f'--config={args.config}'], {})}
  if args.torch:
    sides |= {f'PyTorch, {name}': Side(args.torch, 'benchmarks.torch_byte_patch', *VARIANTS[name])
              for name in args.variants}
  for n in range(args.rounds + 1):
    print(f'round {n} of {args.rounds}:', flush=True)
    for name, side in sides.items():
      seconds = side.ask('step', args.seconds)
      side.seconds += seconds if n else []
      print(f'  {name} {1e3 * statistics.median(seconds):.1f} ms', flush=True)
  medians = {name: statistics.median(side.seconds) for name, side in sides.items()}
  print('\n| variant | parameters | ms a step | least | steps | bytes/s | speed of llm_jax over it |',
        '|---|---|---|---|---|---|---|', sep='\n')
  for name, side in sides.items():
    print(f'| {name} | {side.about["params"]:,} | {1e3 * medians[name]:.1f} | {1e3 * min(side.seconds):.1f} | '
          f'{len(side.seconds)} | {side.about["tokens"] / medians[name]:,.0f} | '
          f'{medians[name] / medians["llm_jax"]:.2f}x |')
    side.close()
  print(json.dumps({name: side.about | {'step_ms': round(1e3 * medians[name], 1)} for name, side in sides.items()}))


if __name__ == '__main__':
  main()
