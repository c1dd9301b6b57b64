"""Estimates the memory of a train step on one device, without a compiler: the state exactly, the rest roughly."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llm_jax.base.errors import ConfigError
from llm_jax.base.multihost import say
from llm_jax.base.process import gib
from llm_jax.base.sharding import num_batch_shards
from llm_jax.base.target import Target, current_target
from llm_jax.config import Config
from llm_jax.layers.pipeline import num_ticks
from llm_jax.losses.readout import chunk_bytes
from llm_jax.training.shardings import shard_bytes
from llm_jax.training.state import TrainState

WIDTH = {'float32': 4, 'bfloat16': 2}  # bytes


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes of one device while a step runs."""

  parameters: int
  optimizer: int
  gradients: int  # accumulated over microbatches too
  copies: int  # of weights, in the dtype of operands, and those that are gathered for a layer
  activations: int  # that the backward pass needs, and of the layer at work
  logits: int

  @property
  def state(self) -> int:
    return self.parameters + self.optimizer

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def estimate(config: Config, abstract: TrainState, mesh: Any, num_microbatches: int, platform: str) -> Estimate:
  """The memory of a step with this number of microbatches. The config is resolved."""
  sizes = dict(mesh.shape)
  parameters = shard_bytes(abstract.params)
  trainable = shard_bytes(abstract.trainable)
  tokens = config.batch_tokens // (num_batch_shards(mesh) * sizes['context'] * num_microbatches)
  times, held, stages, repeats = 1.0, 1, sizes['stage'], config.mesh.repeats
  if stages > 1:  # all microbatches are kept until the last one has passed, and a device's rows are read out at once
    times, held = num_ticks(stages, repeats, num_microbatches) / stages / repeats, num_microbatches
  model = config.model
  operand = WIDTH.get(getattr(model, 'dtype', ''), 4)
  copies = 0
  if operand < 4 or sizes['fsdp'] * sizes['context'] > 1:
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract.params)) // sizes['tensor']
    layer = (whole - table_bytes(abstract, sizes['tensor'])) // max(1, getattr(model, 'num_layers', 1))
    copies = (parameters + 2 * layer * (sizes['fsdp'] * sizes['context'] > 1)) * operand // 4
  vocab = getattr(model, 'V', model.vocab_size or 0)
  logits = 2 * min(4 * held * tokens * vocab // sizes['tensor'], chunk_bytes(platform))
  optimizer = shard_bytes(abstract.opt_state)
  if config.mesh.offload != 'none':  # fetched array by array, after the backward pass
    optimizer = 0
  if config.mesh.offload == 'all' and operand < 4:  # passes need the copies alone
    parameters = 0
  return Estimate(parameters, optimizer, trainable * (1 + (num_microbatches > 1 and stages == 1)), copies,
                  activation_bytes(model, tokens, sizes['tensor'], times), logits)


def table_bytes(abstract: TrainState, tensor: int) -> int:
  """float32 bytes of the largest array, the table of tokens, on a device."""
  return 4 * max(leaf.size for leaf in jax.tree.leaves(abstract.params)) // tensor


def activation_bytes(model: Any, tokens: int, tensor: int, times: float = 1) -> int:
  """Bytes that layers keep of `times` x `tokens` tokens for the backward pass, by the policy of remat.

  0 for unknown models. The layer at work has `tokens` tokens.
  """
  if not all(hasattr(model, name) for name in ('num_layers', 'embed_dim', 'F', 'H', 'K', 'num_heads', 'remat')):
    return 0
  operand, product, stream = (WIDTH.get(getattr(model, name, ''), 4) for name in (
      'dtype', 'product_dtype', 'stream_dtype'))
  D, heads, gated = model.embed_dim, model.num_heads * model.H, model.mlp in ('swiglu', 'geglu', 'relu2glu')
  kv, F = 2 * model.K * model.H, model.F * (1 + gated)
  attention = operand * heads // tensor
  matmuls = product * ((heads + kv + F) // tensor + 2 * D)
  # Norms' outputs, rotated queries and keys, and what the activation function needs.
  rest = operand * (2 * D + (heads + kv) // tensor) + product * model.F * (1 + gated) // tensor
  kept = {'none': stream * D + attention + matmuls + rest, 'save_matmuls': stream * D + attention + matmuls,
          'save_attention': stream * D + attention, 'full': stream * D // tensor, 'offload': 0}[model.remat]
  at_work = 2 * (stream * D + attention + matmuls + rest)
  return int(tokens * (times * model.num_layers * kept + at_work))


def warn_if_too_large(config: Config, abstract: TrainState, mesh: Any, num_microbatches: int) -> None:
  """Prints a warning where a step does probably not fit in an accelerator's memory. Raises ConfigError; see check_fits.

  Nothing on CPUs, whose memory other programs share and may give back.
  """
  target = current_target()
  if target.platform != 'cpu':
    found = estimate(config, abstract, mesh, num_microbatches, target.platform)
    if warning := check_fits(found, target):
      say(f'WARNING: {warning}')


def check_fits(found: Estimate, target: Target) -> str:
  """A warning if the step does probably not fit in the memory of the target's devices; '' if it does or is unknown.

  Raises ConfigError if the state alone does not fit.
  """
  memory = target.memory
  if memory is None:
    return ''
  share = f'of the {gib(memory)} of a device'
  if found.state + found.gradients > memory and target.platform != 'cpu':
    raise ConfigError(f'config.mesh: weights, optimizer state and gradients take {gib(found.state + found.gradients)} '
                      f'{share}; shard them over more devices (--config.mesh.fsdp=...), or use a smaller model')
  if found.total <= memory:
    return ''
  return (f'a step takes about {gib(found.total)} {share}, by estimate; if memory runs out, set '
          '--config.tokens_per_device=None, which finds what fits, or --config.model.remat=full')
