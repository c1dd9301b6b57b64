"""Prints the largest differences of logits and gradients from transformers, by family; needs torch.

  python tests/hf/measure.py
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]


def main():
  import jax
  import numpy as np
  import torch
  from cases import FAMILIES, random_config
  from test_families import batch_of, read
  from transformers import AutoModelForCausalLM
  from weights import write_folder

  from llm_jax.base.sharding import MeshConfig, make_mesh
  from llm_jax.base.trees import by_name
  from llm_jax.hf.weights import tensors_of
  from llm_jax.losses.readout import cross_entropy

  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  for model_type in FAMILIES:
    worst = [0.0, 0.0]
    for seed in range(3):
      values = random_config(model_type, random.Random(f'measure {model_type} {seed}'))
      with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        write_folder(Path(folder), values, mesh, seed)
        tokens = np.random.default_rng(seed).integers(0, 67, (2, 16))
        model, family, params = read(Path(folder), mesh)
        batch = batch_of(tokens)

        def loss(params):
          readout = model.apply({'params': params}, batch, method='readout')  # noqa: B023
          mean = batch.loss_mask / batch.loss_mask.sum()  # noqa: B023
          return cross_entropy(readout, batch.targets, mean)[0], readout.logits()  # noqa: B023

        (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager').eval()
        ids = torch.tensor(tokens)
        others = theirs(ids).logits
        torch.nn.functional.cross_entropy(others[:, :-1].reshape(-1, 67), ids[:, 1:].reshape(-1)).backward()
        others = others.detach().numpy()
        worst[0] = max(worst[0], np.abs(np.asarray(logits) - others).max() / np.abs(others).max())
        cfg, wanted = model.cfg, {name: p.grad.numpy() for name, p in theirs.named_parameters()}
        whole = np.linalg.norm([np.linalg.norm(x) for x in wanted.values()])
        for name, _, make in tensors_of(by_name(grads), family.rules(cfg), cfg.num_layers, cfg.vocab_size, 'float32'):
          error = np.linalg.norm(make() - wanted[name]) / max(1e-4 * whole, np.linalg.norm(wanted[name]))
          worst[1] = max(worst[1], float(error))
    print(f'{model_type}: {worst[0]:.1e} {worst[1]:.1e}', flush=True)


if __name__ == '__main__':
  main()
