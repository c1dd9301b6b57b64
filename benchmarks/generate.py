"""Tokens generated per second, beside Hugging Face transformers, at the shape of GPT-2 small with random weights.

  python -m benchmarks.generate --torch=/path/to/an/environment/with/torch/and/transformers/bin/python

Each side is a process that sleeps while the other one runs: A B A B ..., after a warm-up round. Both decode greedily
with a cache, from prompts of --prompt_len random tokens. `prefill_ms` is the time to the first token;
`tokens_per_second` counts the tokens of all rows after it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

VOCAB, LAYERS, HEADS, WIDTH, MAX_LEN = 50257, 12, 12, 768, 1024  # GPT-2 small


def ours(args: argparse.Namespace) -> Iterator[tuple[float, float]]:
  """(seconds to the first token, seconds for the others) of each call."""
  from llm_jax.base import runtime
  runtime.prepare()
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import numpy as np

  from llm_jax.base.batch import Batch
  from llm_jax.infer.sampling import decode_variables, generate
  from llm_jax.models.decoder import Decoder
  from llm_jax.models.decoder_config import DecoderConfig
  model = Decoder(DecoderConfig(vocab_size=VOCAB, max_len=MAX_LEN, num_layers=LAYERS, num_heads=HEADS, embed_dim=WIDTH,
                                dtype=args.dtype, use_bias=True))
  zeros = jnp.zeros((1, 8), jnp.int32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), Batch(zeros, zeros, zeros))['params'])
  variables = jax.block_until_ready(decode_variables(model, params))
  prompts = np.random.default_rng(0).integers(0, VOCAB, (args.batch, args.prompt_len)).tolist()
  while True:
    start = time.perf_counter()
    columns = generate(model, params, prompts, max_len=MAX_LEN, num_tokens=args.tokens, temperature=0.0,
                       variables=variables)
    next(columns)
    first = time.perf_counter()
    for _ in columns:
      pass
    yield first - start, time.perf_counter() - first


def transformers(args: argparse.Namespace) -> Iterator[tuple[float, float]]:
  """The same with GPT2LMHeadModel.generate."""
  import numpy as np
  import torch
  from transformers import GPT2Config, GPT2LMHeadModel
  model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=MAX_LEN, n_embd=WIDTH, n_layer=LAYERS,
                                     n_head=HEADS)).eval().to(args.device, getattr(torch, args.dtype))
  prompts = torch.tensor(np.random.default_rng(0).integers(0, VOCAB, (args.batch, args.prompt_len)), device=args.device)

  def seconds(num_tokens: int) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
      model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=num_tokens,
                     min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start

  while True:
    first = seconds(1)
    yield first, seconds(args.tokens) - first


SIDES = {'llm_jax': ours, 'transformers': transformers}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--torch', help='a Python with torch and transformers; default: only llm_jax')
  parser.add_argument('--batch', type=int, default=1, help='rows (default: 1)')
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--device', default='cpu', help='of transformers (default: cpu)')
  parser.add_argument('--prompt_len', type=int, default=32, help='tokens of a prompt (default: 32)')
  parser.add_argument('--tokens', type=int, default=64, help='tokens to generate for each row (default: 64)')
  parser.add_argument('--rounds', type=int, default=4)
  parser.add_argument('--serve', choices=SIDES, help='internal: time one call for each line on stdin')
  args = parser.parse_args()
  if args.serve:
    calls = SIDES[args.serve](args)
    for _ in sys.stdin:
      print(json.dumps(next(calls)), flush=True)
    return
  flags = [f'--{name}={getattr(args, name)}' for name in ('batch', 'prompt_len', 'tokens', 'dtype', 'device')]
  pythons = {'llm_jax': sys.executable} | ({'transformers': args.torch} if args.torch else {})
  processes = {
      name: subprocess.Popen([python, '-m', 'benchmarks.generate', f'--serve={name}', *flags], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name, python in pythons.items()}
  times = {name: [] for name in processes}
  for number in range(args.rounds + 1):
    for name, process in processes.items():
      process.stdin.write('\n')
      process.stdin.flush()
      found = json.loads(process.stdout.readline())
      if number:  # the first round compiles
        times[name].append(found)
  for process in processes.values():
    process.stdin.close()
    process.wait()
  results = {}
  for name, pairs in times.items():
    first, rest = (statistics.median(column) for column in zip(*pairs, strict=True))
    results[name] = {'prefill_ms': round(1e3 * first, 1),
                     'tokens_per_second': round(args.batch * (args.tokens - 1) / rest, 1)}
    print(f'{name:13} first token {results[name]["prefill_ms"]:8.1f} ms, then '
          f'{results[name]["tokens_per_second"]:8.1f} tokens/s')
  if len(times) == 2:
    pairs = list(zip(times['llm_jax'], times['transformers'], strict=True))
    for i, what in enumerate(('prefill', 'decode')):
      results[f'{what}_ratio'] = round(statistics.median(theirs[i] / own[i] for own, theirs in pairs), 2)
    print(f'llm_jax is {results["prefill_ratio"]} times as fast in prefill, {results["decode_ratio"]} in decode')
  shape = {name: getattr(args, name) for name in ('batch', 'dtype', 'prompt_len', 'tokens')}
  print(json.dumps(shape | results))


if __name__ == '__main__':
  main()
