"""Writes folders of published models with random weights, without PyTorch."""

import dataclasses
import functools
import json

import numpy as np
from safetensors.numpy import save_file

from llm_jax.base.trees import by_name
from llm_jax.data.config import DataConfig
from llm_jax.data.pipeline import example_batch
from llm_jax.hf.family import read_model
from llm_jax.hf.rules import tensor_names
from llm_jax.models.registry import make_model
from llm_jax.training.shardings import abstract_params, boxed_params


@functools.cache  # tracing a model takes most of the time of the tests
def abstract_of(cfg, mesh):
  """(the model, computing in float32, the shapes of its parameters)."""
  model = make_model(dataclasses.replace(cfg, dtype='float32'))
  return model, abstract_params(boxed_params(example_batch(DataConfig(seq_len=16)), model=model), mesh)


def tensors(family, cfg, mesh, seed):
  """{name: random tensor} of a model, each from a generator of its own, so that only its name and shape matter."""
  _, abstract = abstract_of(cfg, mesh)
  rules = family.rules(cfg)
  stacked = {path for rule in rules if rule.stacked for path in rule.paths}
  sizes = {path: leaf.shape[1:] if path in stacked else leaf.shape for path, leaf in by_name(abstract).items()}
  found = {}
  for name, rule, _ in tensor_names(rules, cfg.num_layers):
    shape = rule.shape(sizes, cfg.vocab_size)
    rng = np.random.default_rng([seed, *name.encode()])
    scale, shift = (0.15, 1.0) if 'norm' in name or 'ln_' in name else (0.2, 0.0)
    found[name] = (shift * ('bias' not in name) + scale * rng.standard_normal(shape)).astype(np.float32)
  return found


def write_folder(folder, values, mesh, seed=0, **fields):
  """Writes the folder and returns (family, our config); `fields` of our config do not change what is written."""
  family, cfg = read_model(values, 'config.json')
  cfg = dataclasses.replace(cfg, **fields)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(values | {'architectures': [family.architecture]}))
  save_file(tensors(family, cfg, mesh, seed), folder / 'model.safetensors', metadata={'format': 'pt'})
  return family, cfg
