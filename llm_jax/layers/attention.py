"""Causal self-attention with grouped heads, sliding windows, segments and a cache.

Dims: B batch, T query length, S key length, D embed, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.sharding import constrain
from llm_jax.layers.kernels import ATTENTION, AttentionCase, choose_attention, local_device, look_back
from llm_jax.layers.linear import Einsum
from llm_jax.layers.norm import RMSNorm
from llm_jax.layers.rope import apply_rope

KVCache = dict[str, jax.Array]  # k, v: [B, K, S, H]; slot s holds the token at position s


class AttentionMask(NamedTuple):
  """The parts of the attention mask beside causality and window. S: the slots of the cache; without a cache S = T."""

  segment_ids_BT: jax.Array | None = None  # tokens attend within their segment; None: one segment
  prefix_BS: jax.Array | None = None  # bool: keys that their whole segment attends to, earlier tokens too; None: none


def causal_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, window: int = 0,
                     segment_ids_BT: jax.Array | None = None, prefix_BT: jax.Array | None = None,
                     implementation: str = 'auto') -> jax.Array:
  """Attention of each token to itself, the `window - 1` tokens before it (0: all) and the prefix of its segment.

  Computed by one of kernels.ATTENTION. Raises ConfigError if that one does not support the inputs.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  case = AttentionCase(*local_device(), str(q_BTNH.dtype), H, T, segment_ids_BT is not None, prefix_BT is not None)
  attend = ATTENTION[choose_attention(implementation, case)]
  return attend(q_BTNH, k_BTKH, v_BTKH, window if window < T else 0, segment_ids_BT, prefix_BT)


def cached_attention(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *, positions_BT: jax.Array,
                     window: int = 0, prefix_BS: jax.Array | None = None) -> jax.Array:
  """The same over a cache: a query at position p attends to slots up to p. Later slots may hold anything."""
  mask_BTS = look_back(positions_BT, k_BKSH.shape[2], window)
  if prefix_BS is not None:
    mask_BTS |= prefix_BS[:, None, :]
  return attend_to_slots(q_BTNH, k_BKSH, v_BKSH, mask_BTS)


def attend_to_slots(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """Attention to the slots of a cache where `mask_BTS` is True; the result has the dtype of the queries.

  With the heads before the slots no product needs a transposed copy of the cache.
  """
  B, T, N, H = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(B, T, k_BKSH.shape[1], -1, H)
  if local_device()[0] == 'cpu':  # whose kernels of batched products lack bfloat16
    q_BTKGH, k_BKSH, v_BKSH = (x.astype(jnp.float32) for x in (q_BTKGH, k_BKSH, v_BKSH))
  scores_BKGTS = jnp.einsum('BTKGH,BKSH->BKGTS', q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) / H ** 0.5
  probs_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf), axis=-1).astype(v_BKSH.dtype)
  y_BTKGH = jnp.einsum('BKGTS,BKSH->BTKGH', probs_BKGTS, v_BKSH, preferred_element_type=jnp.float32)
  return y_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def write_slots(cache_BKSH: jax.Array, x_BTKH: jax.Array, begin_B: jax.Array) -> jax.Array:
  """The cache with slots begin, begin + 1, ... of each row replaced."""
  return jax.vmap(lambda cache_KSH, x_TKH, begin: jax.lax.dynamic_update_slice(
      cache_KSH, jnp.swapaxes(x_TKH, 0, 1), (0, begin, 0)))(cache_BKSH, x_BTKH.astype(cache_BKSH.dtype), begin_B)


class MultiHead(nn.Module):
  """The base class of attention layers: projections to queries, keys and values of heads, and back to the input."""

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
  implementation: str = 'auto'  # one of kernels.ATTENTION

  def project(self, name: str, x_BTD: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
    """The projection 'q', 'k' or 'v' [B, T, heads, H], in `dtype`; rotated by RoPE if positions are given."""
    num_heads, axis = (self.num_heads, 'heads') if name == 'q' else (self.num_kv_heads, 'kv_heads')
    einsum = self.einsum(shape=(self.embed_dim, num_heads, self.head_dim), axes=('embed', axis, 'head_dim'),
                         bias_dims=2 * self.use_bias, name=name)
    y_BTNH = constrain(einsum('BTD,DNH->BTNH', x_BTD), 'act_batch', 'act_length', f'act_{axis}', None)
    if self.qk_norm and name != 'v':
      y_BTNH = RMSNorm(axis='head_dim', name=f'{name}_norm')(y_BTNH)
    if positions_BT is not None:
      y_BTNH = self.rotate(y_BTNH, positions_BT)
    return checkpoint_name(y_BTNH.astype(self.dtype), 'matmul')

  def rotate(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Queries or keys with rotary position embedding, if `rope_base` is set."""
    return apply_rope(x_BTNH, positions_BT, self.rope_base) if self.rope_base else x_BTNH

  def output(self, y_BTNH: jax.Array) -> jax.Array:
    out = self.einsum(shape=(self.num_heads, self.head_dim, self.embed_dim), axes=('heads', 'head_dim', 'embed'),
                      bias_dims=int(self.use_bias), initializer=self.out_init, name='o')
    return out('BTNH,NHD->BTD', y_BTNH)


class Attention(MultiHead):
  """Self-attention; with a cache, keys and values are first written to its slots, from positions_BT[:, 0] on."""

  @nn.compact
  def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, mask: AttentionMask,
               cache: KVCache | None, window: int) -> tuple[jax.Array, KVCache | None]:
    q_BTNH, k_BTKH = (self.project(name, x_BTD, positions_BT) for name in 'qk')
    v_BTKH = self.project('v', x_BTD)
    if cache is None:
      # Initialization runs on one token, which a kernel may not support.
      implementation = 'xla' if self.is_initializing() else self.implementation
      y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, window=window, segment_ids_BT=mask.segment_ids_BT,
                                prefix_BT=mask.prefix_BS, implementation=implementation)
    else:
      cache = {name: write_slots(cache[name], x, positions_BT[:, 0]) for name, x in (('k', k_BTKH), ('v', v_BTKH))}
      y_BTNH = cached_attention(q_BTNH, cache['k'], cache['v'], positions_BT=positions_BT, window=window,
                                prefix_BS=mask.prefix_BS)
    return self.output(y_BTNH), cache
