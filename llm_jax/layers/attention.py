"""Causal self-attention with grouped heads, sliding windows, segments and a cache.

Dims: B batch, T query length, S key length, D embed, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.sharding import constrain
from llm_jax.layers.cache import KVCache, cached_attention, write_slots
from llm_jax.layers.context import SPLIT, context_attention
from llm_jax.layers.kernels import ATTENTION, attention_case, choose_attention
from llm_jax.layers.linear import Einsum, weight
from llm_jax.layers.rope import Rope, apply_rope


class AttentionMask(NamedTuple):
  """The parts of the attention mask beside causality and window. S: the slots of the cache; without a cache S = T."""

  segment_ids_BT: jax.Array | None = None  # tokens attend within their segment; None: one segment
  prefix_BS: jax.Array | None = None  # bool: keys that their whole segment attends to, earlier tokens too; None: none


class Layer(NamedTuple):
  """What differs between the layers of a stack; static."""

  window: int = 0  # tokens that a token attends to, itself included; 0: all
  rope: Rope | None = None  # None: queries and keys are not rotated


def causal_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, window: int = 0,
                     segment_ids_BT: jax.Array | None = None, prefix_BT: jax.Array | None = None,
                     implementation: str = 'auto', **scores: Any) -> jax.Array:
  """Attention of each token to itself, the `window - 1` tokens before it (0: all) and the prefix of its segment.

  Computed by one of kernels.ATTENTION; `scores` are its options soft_cap and sinks_N. Raises ConfigError if that one
  does not support the inputs.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  case = attention_case(str(q_BTNH.dtype), H, T, segments=segment_ids_BT is not None, prefix=prefix_BT is not None,
                        scores=tuple(scores))
  name = choose_attention(implementation, case)
  if case.context > 1 and name in SPLIT:
    return context_attention(name, q_BTNH, k_BTKH, v_BTKH, window if window < T else 0, segment_ids_BT, prefix_BT,
                             **scores)
  return ATTENTION[name](q_BTNH, k_BTKH, v_BTKH, window if window < T else 0, segment_ids_BT, prefix_BT, **scores)


class MultiHead(nn.Module):
  """The base class of attention layers: projections to queries, keys and values of heads, and back to the input."""

  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  einsum: Callable[..., Einsum]  # the model's Einsum, with dtype and init filled in
  out_init: Initializer
  dtype: Dtype
  qk_norm: Callable[..., nn.Module] | None = None  # of queries and keys
  norm_heads: bool = False  # whether qk_norm is over all heads at once
  qkv_bias: bool = False
  out_bias: bool = False
  query_scale: float | None = None  # of scores; None: head_dim ** -0.5
  soft_cap: float = 0.0  # cap * tanh(scores / cap); 0: off
  sinks: bool = False  # a learned logit for each head, to which its queries may attend instead of tokens
  implementation: str = 'auto'  # one of kernels.ATTENTION

  def project(self, name: str, x_BTD: jax.Array, positions_BT: jax.Array | None = None,
              rope: Rope | None = None) -> jax.Array:
    """The projection 'q', 'k' or 'v' [B, T, heads, H], in `dtype`; rotated to the positions if `rope` is given."""
    num_heads, axis = (self.num_heads, 'heads') if name == 'q' else (self.num_kv_heads, 'kv_heads')
    einsum = self.einsum(shape=(self.embed_dim, num_heads, self.head_dim), axes=('embed', axis, 'head_dim'),
                         bias_dims=2 * self.qkv_bias, name=name)
    y_BTNH = constrain(einsum('BTD,DNH->BTNH', x_BTD), 'act_batch', 'act_length', f'act_{axis}', None)
    if self.qk_norm is not None and name != 'v':
      normed = (*y_BTNH.shape[:2], -1) if self.norm_heads else y_BTNH.shape
      y_BTNH = self.qk_norm(axis=axis if self.norm_heads else 'head_dim', name=f'{name}_norm')(
          y_BTNH.reshape(normed)).reshape(y_BTNH.shape)
    if rope is not None and positions_BT is not None:
      y_BTNH = apply_rope(y_BTNH, positions_BT, rope)
    if self.query_scale is not None and name == 'q':
      y_BTNH *= self.query_scale * self.head_dim ** 0.5  # as attention divides by the root
    return checkpoint_name(y_BTNH.astype(self.dtype), 'matmul')

  def score_options(self) -> dict[str, Any]:
    """The options of attention that are not at their defaults."""
    sinks_N = weight(self, 'sinks', nn.initializers.zeros, (self.num_heads,), ('heads',)) if self.sinks else None
    return {name: x for name, x in (('soft_cap', self.soft_cap or None), ('sinks_N', sinks_N)) if x is not None}

  def output(self, y_BTNH: jax.Array) -> jax.Array:
    out = self.einsum(shape=(self.num_heads, self.head_dim, self.embed_dim), axes=('heads', 'head_dim', 'embed'),
                      bias_dims=int(self.out_bias), initializer=self.out_init, name='o')
    return out('BTNH,NHD->BTD', y_BTNH)


class Attention(MultiHead):
  """Self-attention; with a cache, keys and values are first written to its slots, from positions_BT[:, 0] on."""

  @nn.compact
  def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, mask: AttentionMask,
               cache: KVCache | None, layer: Layer) -> tuple[jax.Array, KVCache | None]:
    q_BTNH, k_BTKH = (self.project(name, x_BTD, positions_BT, layer.rope) for name in 'qk')
    v_BTKH, scores = self.project('v', x_BTD), self.score_options()
    if cache is None:
      # Initialization runs on one token, which a kernel may not support.
      implementation = 'xla' if self.is_initializing() else self.implementation
      y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, window=layer.window, segment_ids_BT=mask.segment_ids_BT,
                                prefix_BT=mask.prefix_BS, implementation=implementation, **scores)
    else:
      cache = {name: write_slots(cache[name], x, positions_BT[:, 0]) for name, x in (('k', k_BTKH), ('v', v_BTKH))}
      y_BTNH = cached_attention(q_BTNH, cache['k'], cache['v'], positions_BT=positions_BT,
                                window=layer.window, prefix_BS=mask.prefix_BS, **scores)
    return self.output(y_BTNH), cache
