"""Causal self-attention with grouped heads, sliding windows, segments and a cache.

Dims: B batch, T query length, S key length, D embed, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from llm_jax.layers.linear import Einsum
from llm_jax.layers.norm import RMSNorm
from llm_jax.layers.rope import apply_rope
from llm_jax.sharding import constrain

KVCache = dict[str, jax.Array]  # k, v: [B, S, K, H]; slot s holds the token at position s


def causal_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *,
                     window: int = 0, segment_ids_BT: jax.Array | None = None) -> jax.Array:
  """Each token sees itself and the `window - 1` before it (0: all before it) that share its segment."""
  mask_B1TT = None
  if segment_ids_BT is not None:
    mask_B1TT = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
  return jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TT, is_causal=True,
      local_window_size=(window - 1, 0) if window else None)


def cached_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *,
                     positions_BT: jax.Array, window: int = 0) -> jax.Array:
  """The same over a cache: the query at position p sees the slots p and before. Slots after p may hold anything."""
  distance_BTS = positions_BT[:, :, None] - jnp.arange(k_BSKH.shape[1])[None, None, :]
  mask_BTS = (distance_BTS >= 0) & ((distance_BTS < window) if window else True)
  return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])


class Attention(nn.Module):
  """Self-attention; with a cache it first writes its keys and values at `positions_BT`."""

  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  einsum: Callable[..., Einsum]  # the model's Einsum, with dtype and init filled in
  out_init: Initializer
  dtype: Dtype
  rope_base: float | None = None
  qk_norm: bool = False
  use_bias: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None,
               cache: KVCache | None, window: int) -> tuple[jax.Array, KVCache | None]:
    def project(name: str, num_heads: int, axis: str) -> jax.Array:
      einsum = self.einsum(shape=(self.embed_dim, num_heads, self.head_dim), axes=('embed', axis, 'head_dim'),
                           bias_dims=2 * self.use_bias, name=name)
      y_BTNH = constrain(einsum('BTD,DNH->BTNH', x_BTD), 'act_batch', 'act_length', f'act_{axis}', None)
      if self.qk_norm and name != 'v':
        y_BTNH = RMSNorm(axis='head_dim', name=f'{name}_norm')(y_BTNH)
      if self.rope_base and name != 'v':
        y_BTNH = apply_rope(y_BTNH, positions_BT, self.rope_base)
      return y_BTNH.astype(self.dtype)

    q_BTNH = project('q', self.num_heads, 'heads')
    k_BTKH = project('k', self.num_kv_heads, 'kv_heads')
    v_BTKH = project('v', self.num_kv_heads, 'kv_heads')
    if cache is None:
      y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, window=window, segment_ids_BT=segment_ids_BT)
    else:
      write = jax.vmap(lambda slots, positions, x: slots.at[positions].set(x))
      cache = {'k': write(cache['k'], positions_BT, k_BTKH), 'v': write(cache['v'], positions_BT, v_BTKH)}
      y_BTNH = cached_attention(q_BTNH, cache['k'], cache['v'], positions_BT=positions_BT, window=window)
    out = self.einsum(shape=(self.num_heads, self.head_dim, self.embed_dim), axes=('heads', 'head_dim', 'embed'),
                      bias_dims=int(self.use_bias), initializer=self.out_init, name='o')
    return out('BTNH,NHD->BTD', y_BTNH), cache
