"""Sums of gradients and metrics over microbatches, one after the other, and over shards of a batch, side by side."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.base.batch import Batch, Metrics, Params
from llm_jax.base.devices import platform
from llm_jax.base.sharding import constrain
from llm_jax.losses.next_token import NextToken
from llm_jax.losses.objective import Objective
from llm_jax.models.blocks import activation_dtype
from llm_jax.models.decoder import Decoder
from llm_jax.models.decoder_config import StackConfig
from llm_jax.models.protocol import LanguageModel


def data_shards(model: LanguageModel, objective: Objective) -> int:
  """The number of shards of a batch, over the mesh axis `data`, whose gradients are summed once, at the end of a step.

  The compiler would sum each gradient where it arises: in each microbatch, and twice that of a tied embedding. 1 for
  objectives that compare rows, and for models with random numbers, which must not depend on the mesh. With a tensor
  axis also for all but the Decoder with the loss of next tokens: the compiler aborts where it splits a gather inside
  jax.shard_map (jaxlib 0.10 and 0.11, spmd_partitioner_util.cc). Losses that modules sow are averaged over shards, as
  they are over microbatches.
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  cfg = getattr(model, 'cfg', None)
  plain = isinstance(cfg, StackConfig) and not cfg.is_random and objective.row_wise
  if not plain or mesh.empty:
    return 1
  gathers = type(model) is not Decoder or any(type(term) is not NextToken for _, term in objective.terms)
  return 1 if gathers and mesh.shape['tensor'] > 1 else mesh.shape['data']


def sum_over_data(of_shard: tuple[Params, Metrics], model: LanguageModel) -> tuple[Params, Metrics]:
  """The sums of (gradients, metrics) of all shards; gradients are sent in config.model.gradient_dtype."""
  grads, metrics = of_shard
  dtype = activation_dtype(model.cfg, 'gradient_dtype')
  sent = jax.tree.map(lambda g: g.astype(dtype), grads)
  if platform() == 'cpu':  # whose compiler aborts on a sum in bfloat16 (jaxlib 0.10 to 0.11)
    sent = jax.tree.map(lambda g: g.astype(jnp.float32), sent)
  sums = jax.lax.psum(sent, 'data')
  return jax.tree.map(lambda total, g: total.astype(g.dtype), sums, grads), jax.lax.psum(metrics, 'data')


def accumulate(grad_fn: Any, params: Params, batch: Batch, key: jax.Array,
               num_microbatches: int) -> tuple[Params, Metrics]:
  """Sums grad_fn(params, microbatch, key) over microbatches, with one of them in memory at a time."""
  if num_microbatches == 1:
    return grad_fn(params, batch, key)

  def split(x: jax.Array) -> jax.Array:
    # Microbatch i takes rows i, i + m, ..., so that no row moves to another device.
    x = jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)
    return constrain(x, None, 'act_batch', *(None,) * (x.ndim - 2))

  def body(total: Any, xs: Any) -> tuple[Any, Any]:
    return jax.tree.map(jnp.add, total, grad_fn(params, *xs)), None

  keys = jax.random.split(key, num_microbatches)
  xs = (jax.tree.map(split, batch), keys)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                       jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], xs)))
  return jax.lax.scan(body, zeros, xs)[0]
