"""Embed, the table of embeddings. Dims: B batch, T length, V vocab, D embed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from llm_jax.base.sharding import constrain
from llm_jax.layers.linear import copy_of, weight


class Embed(nn.Module):
  """A table w [V, D] whose rows are looked up."""

  num_embeddings: int
  embed_dim: int
  initializer: Initializer
  axes: tuple[str, str] = ('vocab', 'embed')
  dtype: Dtype = jnp.float32  # of the rows

  def setup(self) -> None:
    self.w = weight(self, 'w', self.initializer, (self.num_embeddings, self.embed_dim), self.axes,
                    ('row', 'out'))

  @property
  def matrix(self) -> jax.Array:
    """w, or its copy in a lower precision."""
    return copy_of(self, self.w)

  def encode(self, tokens_BT: jax.Array) -> jax.Array:
    """The rows of tokens [B, T, D].

    A device looks up its columns of the table for the tokens of all devices that share the table with it, and then
    exchanges columns for parts of rows, and for rows: neither the table nor the batch is gathered, forward or backward.
    """
    tokens_BT = constrain(tokens_BT, 'act_lookup', None)
    x_BTD = jnp.take(self.w, tokens_BT, axis=0, mode='clip').astype(self.dtype)
    x_BTD = constrain(x_BTD, 'act_lookup', 'act_lookup_length', self.axes[1])
    x_BTD = constrain(x_BTD, 'act_lookup', 'act_stream', 'act_lookup_embed')
    return constrain(x_BTD, 'act_batch', 'act_stream', 'act_embed')
