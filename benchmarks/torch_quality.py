"""configs/shakespeare_char.py in PyTorch: the same model, data, batches, schedule and evaluations, in one file.

  /path/to/an/environment/with/torch/bin/python -m benchmarks.torch_quality --data=input.txt [--compile]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial

import torch
from torch import nn

from benchmarks.common import PRESETS
from benchmarks.torch_step import GPT

STEPS, EVERY, WARMUP, PEAK = 2000, 500, 100, 1e-3


def learning_rate(step: int) -> float:
  if step < WARMUP:
    return PEAK * (step + 1) / (WARMUP + 1)
  return PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', required=True)
  parser.add_argument('--compile', action='store_true')
  parser.add_argument('--dtype', choices=['f32', 'bf16'], default='f32')
  args = parser.parse_args()
  with open(args.data, encoding='utf-8') as f:
    text = f.read()
  letters = sorted(set(text))
  ids = torch.tensor([letters.index(c) for c in text])
  num_val = len(text) - int(len(text) * 0.9)
  train, val = ids[:-num_val], ids[-num_val:]
  preset = PRESETS['char_tiny']._replace(vocab_size=len(letters))
  torch.manual_seed(0)
  model = GPT(preset, gelu='none')
  decayed = [w for w in model.parameters() if w.ndim > 1]
  others = [w for w in model.parameters() if w.ndim == 1]
  optimizer = torch.optim.AdamW([{'params': decayed, 'weight_decay': 0.1}, {'params': others, 'weight_decay': 0.0}],
                                betas=(0.9, 0.99), fused=True)
  loss_fn = torch.compile(model) if args.compile else model
  T = preset.seq_len
  mixed = partial(torch.autocast, 'cpu', torch.bfloat16, enabled=args.dtype == 'bf16')

  @torch.no_grad()
  def validate() -> float:
    rows = val[:(len(val) - 1) // T * T].view(-1, T), val[1:(len(val) - 1) // T * T + 1].view(-1, T)
    with mixed():
      total = sum(model(x, y).item() * len(x) for x, y in zip(*(r.split(preset.batch) for r in rows), strict=True))
    return total / len(rows[0])

  start, val_loss = time.perf_counter(), math.nan
  for step in range(STEPS):
    for group in optimizer.param_groups:
      group['lr'] = learning_rate(step)
    starts = torch.randint(len(train) - T, (preset.batch,))
    x = torch.stack([train[i:i + T] for i in starts])
    y = torch.stack([train[i + 1:i + T + 1] for i in starts])
    with mixed():
      loss = loss_fn(x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if (step + 1) % EVERY == 0:
      val_loss = validate()
      print(f'step {step + 1}: val/loss {val_loss:.4f}, {time.perf_counter() - start:.1f} s', flush=True)
  print(json.dumps({'framework': f'torch {torch.__version__}', 'compile': args.compile, 'dtype': args.dtype,
                    'val/loss': round(val_loss, 4)}))


if __name__ == '__main__':
  main()
