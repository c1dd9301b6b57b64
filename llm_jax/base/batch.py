"""Batch, and the types of trees that every module shares."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Params = Any  # nested dict[str, jax.Array]
Cache = Any  # a model's own pytree; opaque above models/
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Batch:
  """The data of one step: B rows of T tokens. Absent features are None, which costs nothing: None has no leaves."""

  tokens: jax.Array  # int32 [B, T]: the input
  targets: jax.Array  # int32 [B, T]: the token to predict at each position, already shifted
  loss_mask: jax.Array  # float32 [B, T]: 0 where the target does not count in the loss
  positions: jax.Array | None = None  # int32 [B, T]: restart at 0 in each document; None: 0..T-1
  segment_ids: jax.Array | None = None  # int32 [B, T]: attention stays inside a segment; None: one segment
  prefix_mask: jax.Array | None = None  # int32 [B, T]: 1 on a prefix, which may be attended to in both directions
  encoder_tokens: jax.Array | None = None  # int32 [B, S]
  encoder_segment_ids: jax.Array | None = None  # int32 [B, S]
  labels: jax.Array | None = None  # [B] or [B, C], for heads that do not predict tokens

  @property
  def num_tokens(self) -> jax.Array:
    """The number of input tokens, without padding where segment_ids mark it."""
    return jnp.sum(jnp.ones_like(self.tokens) if self.segment_ids is None else self.segment_ids > 0)


def as_batch(features: dict[str, Any]) -> Batch:
  return Batch(**features)
