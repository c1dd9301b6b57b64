"""Makes goldens.json: logits, gradients and greedy tokens of tiny models by transformers and PyTorch.

  python tests/hf/goldens.py  # in an environment with torch and transformers
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name('goldens.json')
SEEDS = range(1)


def golden(folder, tokens):
  import torch
  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager').eval()
  ids = torch.tensor(tokens)
  logits = model(ids).logits
  loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
  loss.backward()
  norms = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
  return {'logits': np.round(logits[:, -1].detach().numpy().astype(float), 6).tolist(), 'loss': float(loss.detach()),
          'gradient_norms': {name: round(norm, 6) for name, norm in norms.items()}}


def main():
  sys.path.insert(0, str(Path(__file__).parent))
  from cases import FAMILIES, random_config
  from weights import write_folder

  from llm_jax.base.sharding import MeshConfig, make_mesh
  mesh, found = make_mesh(MeshConfig()), []
  for model_type in FAMILIES:
    for seed in SEEDS:
      values = random_config(model_type, random.Random(f'{model_type} {seed}'))
      with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), values, mesh, seed)
        tokens = np.random.default_rng(seed).integers(0, 67, (2, 16))
        found.append({'config': values, 'seed': seed, 'tokens': tokens.tolist()} | golden(folder, tokens))
  FILE.write_text('\n'.join(['[', ',\n'.join(json.dumps(entry) for entry in found), ']']) + '\n')
  print(f'{FILE}: {FILE.stat().st_size:,} bytes')


if __name__ == '__main__':
  main()
