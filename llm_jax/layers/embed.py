"""Embed, the table of embeddings. Dims: B batch, T length, V vocab, D embed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec as P

from llm_jax.base.sharding import auto_axes, constrain, fitting_axes, shared_inside
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
    x_BTD = look_up(self.w, tokens_BT, self.axes, self.dtype)
    x_BTD = constrain(x_BTD, 'act_lookup', 'act_lookup_length', self.axes[1])
    x_BTD = constrain(x_BTD, 'act_lookup', 'act_stream', 'act_lookup_embed')
    return constrain(x_BTD, 'act_batch', 'act_stream', 'act_embed')


def look_up(w_VD: jax.Array, tokens_BT: jax.Array, axes: tuple[str, str], dtype: Dtype) -> jax.Array:
  """The rows of w, which has these logical axes; the nearest row for tokens out of range.

  Inside jax.shard_map, where the compiler aborts if it has to split this lookup (jaxlib 0.10 and 0.11), devices that
  share the vocabulary look up the tokens of their rows, and the sum of their results has all.
  """
  vocab, mesh = shared_inside(axes[0], w_VD.shape[0]), jax.sharding.get_abstract_mesh()
  if vocab is None:
    return jnp.take(w_VD, tokens_BT, axis=0, mode='clip').astype(dtype)

  def local(w_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    places_BT = tokens_BT - jax.lax.axis_index(vocab) * w_VD.shape[0]
    held_BT = (places_BT >= 0) & (places_BT < w_VD.shape[0])
    x_BTD = jnp.take(w_VD, places_BT, axis=0, mode='clip').astype(dtype)
    return jnp.where(held_BT[..., None], x_BTD, 0)[None]

  rows, columns = fitting_axes('act_lookup', tokens_BT.shape[0], mesh), fitting_axes(axes[1], w_VD.shape[1], mesh)
  x_SBTD = jax.shard_map(local, in_specs=(P(vocab, columns), P(rows)), out_specs=P(vocab, rows, None, columns),
                         check_vma=False, axis_names=auto_axes(mesh))(
      w_VD, jnp.clip(tokens_BT, 0, w_VD.shape[0] - 1))
  return jax.lax.reduce(x_SBTD, jnp.zeros((), dtype), jax.lax.add, (0,))  # jnp.sum would send float32
