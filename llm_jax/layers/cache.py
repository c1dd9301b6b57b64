"""Attention over a cache of keys and values.

Dims: B batch, T query length, S slots of the cache, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.base.sharding import constrain
from llm_jax.layers.kernels import attend_to_slots, look_back

KVCache = dict[str, jax.Array]  # k, v: [B, K, S, H]; slot s holds the token at position s


def cached_attention(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *, positions_BT: jax.Array,
                     window: int = 0, prefix_BS: jax.Array | None = None, **scores: Any) -> jax.Array:
  """Causal attention over a cache: a query at position p attends to slots up to p. Later slots may hold anything."""
  mask_BTS = look_back(positions_BT, k_BKSH.shape[2], window)
  if prefix_BS is not None:
    mask_BTS |= prefix_BS[:, None, :]
  return attend_to_slots(q_BTNH, k_BKSH, v_BKSH, mask_BTS, **scores)


def write_slots(cache_BKSH: jax.Array, x_BTKH: jax.Array, begin_B: jax.Array) -> jax.Array:
  """The cache with slots begin, begin + 1, ... of each row replaced."""
  written_BKSH = jax.vmap(lambda cache_KSH, x_TKH, begin: jax.lax.dynamic_update_slice(
      cache_KSH, jnp.swapaxes(x_TKH, 0, 1), (0, begin, 0)))(cache_BKSH, x_BTKH.astype(cache_BKSH.dtype), begin_B)
  return constrain(written_BKSH, 'act_batch', 'act_kv_heads', None, None)
