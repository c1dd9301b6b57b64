"""FLOPs of a training step, for MFU."""

from __future__ import annotations

import math
from typing import Any

import jax

from llm_jax.base.batch import Batch, Params
from llm_jax.config import Config
from llm_jax.models.protocol import LanguageModel


def flops_per_token(config: Config, model: LanguageModel, params: Params, batch: Batch) -> float:
  """Matrix FLOPs per token of a training step, by the model's formula, else three times those of a forward pass."""
  own = config.model.flops_per_token(config.data.seq_len)
  return 3 * count_matmuls(model, params, batch) / batch.tokens.size if own is None else own


def count_matmuls(model: LanguageModel, params: Params, batch: Batch) -> float:
  """FLOPs of all matrix products of a forward pass over an abstract batch: 2 for each multiply-add."""
  return count_in(jax.make_jaxpr(model.apply)({'params': params}, batch).jaxpr)


def count_in(jaxpr: Any) -> float:
  """FLOPs of the matrix products in a jaxpr; those inside a scan count once per iteration."""
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('dot_general', 'conv_general_dilated'):
      total += product_flops(eqn)
      continue
    inner = [count_in(getattr(part, 'jaxpr', part)) for value in eqn.params.values()
             for part in (value if isinstance(value, (tuple, list)) else (value,)) if hasattr(part, 'eqns')
             or hasattr(part, 'jaxpr')]
    if inner:
      branches = max(inner) if eqn.primitive.name == 'cond' else sum(inner)
      total += branches * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
  return total


def product_flops(eqn: Any) -> float:
  """FLOPs of one dot_general or convolution."""
  out = math.prod(eqn.outvars[0].aval.shape)
  if eqn.primitive.name == 'conv_general_dilated':
    kernel, spec = eqn.invars[1].aval.shape, eqn.params['dimension_numbers'].rhs_spec
    return 2.0 * out * math.prod(kernel) / kernel[spec[0]]
  (contracted, _), _ = eqn.params['dimension_numbers']
  return 2.0 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
