"""Causal attention in plain JAX, block by block, with its own backward pass (FlashAttention, arXiv 2205.14135).

A Python loop over blocks of queries computes only the keys that causality and window leave, which halves the work, and
no array is larger than the scores of one block. The forward pass saves q, k, v, y and the logarithm of each query's
normaliser, from which the backward pass recomputes the attention weights; for short rows the weights are saved too.
Dims: B batch, T length, C queries in a block, S their keys, N heads, K kv heads, G = N/K, R = G C, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

KEPT_BYTES = 1024  # weights are saved up to this size per query: then loading is faster than recomputing
SHORT = 256  # the longest T with short blocks
BLOCKS = {True: 64, False: 128}  # queries per block, for short and longer T; the fastest measured
HIDDEN = -1e30  # added to masked scores
MAX_BLOCKS = 16  # each block is compiled separately, so a longer T has longer blocks


def blocked(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segment_ids_BT: jax.Array | None,
            prefix_BT: jax.Array | None, *, soft_cap: float = 0.0, sinks_N: jax.Array | None = None) -> jax.Array:
  """Attention y [B, T, N, H], masked as in `causal_attention`; for the options see kernels.attend_to_slots."""
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  # Scales q instead of the scores, which are larger. Exact if H is a power of 4; otherwise one more rounding.
  scaled_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
  q_BKGTH = scaled_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  k_BKTH, v_BKTH = (x.transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKH))
  q_BKGTH, k_BKTH, v_BKTH = map(_laid_out, (q_BKGTH, k_BKTH, v_BKTH))
  sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
  y_BKGTH = _attend(window, soft_cap, q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, prefix_BT, sinks_KG)
  return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _laid_out(x: jax.Array) -> jax.Array:
  """Copies x, and its gradient, into row-major layout.

  XLA:CPU has no fast bfloat16 product of an array that is transposed only in its layout. Merging the last two
  dimensions forces the transpose, and the barrier keeps XLA from optimizing that away.
  """
  return jax.lax.optimization_barrier(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window, soft_cap, q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, prefix_BT, sinks_KG):
  return _forward(window, soft_cap, q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, prefix_BT, sinks_KG)[0]


def _forward(window, soft_cap, q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, prefix_BT, sinks_KG):
  ys, log_zs, kept = [], [], []
  for queries, keys in _blocks(q_BKGTH.shape[3], window, prefix_BT):
    s_BKRS = _scores(q_BKGTH, k_BKTH, queries, keys, window, soft_cap, segment_ids_BT, prefix_BT)
    max_BKR1 = s_BKRS.max(-1, keepdims=True)
    if sinks_KG is not None:
      max_BKR1 = jnp.maximum(max_BKR1, _per_query(sinks_KG, queries))
    e_BKRS = jnp.exp(s_BKRS - max_BKR1)
    z_BKR1 = e_BKRS.sum(-1, keepdims=True)
    if sinks_KG is not None:
      z_BKR1 += jnp.exp(_per_query(sinks_KG, queries) - max_BKR1)
    if _keeps(q_BKGTH, soft_cap):
      kept.append((e_BKRS / z_BKR1).astype(v_BKTH.dtype))
      y_BKRH = _dot('BKRS,BKSH->BKRH', kept[-1], v_BKTH[:, :, keys])
    else:  # normalised after the product: y is smaller than the weights
      y_BKRH = _dot('BKRS,BKSH->BKRH', e_BKRS.astype(v_BKTH.dtype), v_BKTH[:, :, keys]) / z_BKR1
    ys.append(_unmerge(y_BKRH, q_BKGTH))
    log_zs.append(_unmerge(max_BKR1 + jnp.log(z_BKR1), q_BKGTH))
  # All residuals are named together: a remat policy that saved only y would recompute the others.
  y_BKGTH = jnp.concatenate(ys, 3).astype(q_BKGTH.dtype)
  y_BKGTH, log_z_BKGT1, kept = checkpoint_name((y_BKGTH, jnp.concatenate(log_zs, 3), kept), 'attention')
  return y_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, prefix_BT, sinks_KG, y_BKGTH, log_z_BKGT1, kept)


def _backward(window, soft_cap, residuals, dy_BKGTH):
  q_BKGTH, k_BKTH, v_BKTH, segment_ids_BT, prefix_BT, sinks_KG, y_BKGTH, log_z_BKGT1, kept = residuals
  dtype = q_BKGTH.dtype
  # The softmax's own term, sum over s of p dp, equals dy . y and needs no weights.
  own_BKGT1 = (dy_BKGTH.astype(jnp.float32) * y_BKGTH.astype(jnp.float32)).sum(-1, keepdims=True)
  dqs, dks, dvs = [], [], []
  for i, (queries, keys) in enumerate(_blocks(q_BKGTH.shape[3], window, prefix_BT)):
    if kept:
      p_BKRS = kept[i]
    else:
      s_BKRS = _scores(q_BKGTH, k_BKTH, queries, keys, window, soft_cap, segment_ids_BT, prefix_BT)
      p_BKRS = jnp.exp(s_BKRS - _merge(log_z_BKGT1, queries))
    dy_BKRH = _merge(dy_BKGTH, queries)
    dp_BKRS = _dot('BKRH,BKSH->BKRS', dy_BKRH, v_BKTH[:, :, keys])
    ds_BKRS = p_BKRS * (dp_BKRS - _merge(own_BKGT1, queries))
    if soft_cap:
      ds_BKRS *= jnp.where(s_BKRS > HIDDEN / 2, 1 - (s_BKRS / soft_cap) ** 2, 0)
    ds_BKRS = ds_BKRS.astype(dtype)
    dqs.append(_unmerge(_dot('BKRS,BKSH->BKRH', ds_BKRS, k_BKTH[:, :, keys]), q_BKGTH))
    dks.append((keys, _dot_rows(ds_BKRS, _merge(q_BKGTH, queries))))
    dvs.append((keys, _dot_rows(p_BKRS.astype(dtype), dy_BKRH)))
  dsinks_KG = None
  if sinks_KG is not None:
    weights_BKGT1 = jnp.exp(sinks_KG[None, :, :, None, None] - log_z_BKGT1)
    dsinks_KG = -jnp.sum(weights_BKGT1 * own_BKGT1, axis=(0, 3, 4))
  return jnp.concatenate(dqs, 3).astype(dtype), _sum(dks, k_BKTH), _sum(dvs, v_BKTH), None, None, dsinks_KG


_attend.defvjp(_forward, _backward)


def _keeps(q_BKGTH: jax.Array, soft_cap: float) -> bool:
  return not soft_cap and q_BKGTH.shape[3] * q_BKGTH.dtype.itemsize <= KEPT_BYTES


def _blocks(T: int, window: int, prefix_BT: jax.Array | None) -> Iterator[tuple[slice, slice]]:
  """(queries, keys that any of them attends to) of each block."""
  size = max(BLOCKS[T <= SHORT], -(-T // MAX_BLOCKS))
  for start in range(0, T, size):
    stop = min(start + size, T)
    first = max(0, start - window + 1) if window else 0
    yield slice(start, stop), slice(0, T) if prefix_BT is not None else slice(first, stop)


def _per_query(sinks_KG: jax.Array, queries: slice) -> jax.Array:
  """The sinks of a block's queries [1, K, R, 1]."""
  return jnp.repeat(sinks_KG, queries.stop - queries.start, axis=1)[None, :, :, None]


def _scores(q_BKGTH, k_BKTH, queries: slice, keys: slice, window: int, soft_cap: float, segment_ids_BT,
            prefix_BT) -> jax.Array:
  """Scores, float32 [B, K, R, S]; those of masked keys are far below all others, but finite."""
  distance_CS = np.arange(queries.start, queries.stop)[:, None] - np.arange(keys.start, keys.stop)[None]
  seen_BCS = ((distance_CS >= 0) & ((distance_CS < window) if window else True))[None]
  if prefix_BT is not None:
    seen_BCS = seen_BCS | prefix_BT[:, None, keys]
  if segment_ids_BT is not None:
    seen_BCS = seen_BCS & (segment_ids_BT[:, queries, None] == segment_ids_BT[:, None, keys])
  hidden_B1RS = jnp.tile(jnp.where(seen_BCS, 0, HIDDEN)[:, None], (1, 1, q_BKGTH.shape[2], 1))
  s_BKRS = _dot('BKRH,BKSH->BKRS', _merge(q_BKGTH, queries), k_BKTH[:, :, keys])
  return (soft_cap * jnp.tanh(s_BKRS / soft_cap) if soft_cap else s_BKRS) + hidden_B1RS


def _dot(eqn: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(eqn, x, y, preferred_element_type=jnp.float32)


def _dot_rows(x_BKRS: jax.Array, y_BKRH: jax.Array) -> jax.Array:
  """The product summed over R, float32 [B, K, S, H]."""
  if x_BKRS.dtype == jnp.bfloat16 and not x_BKRS.shape[2] % 2:
    # XLA:CPU has bfloat16 kernels for a sum over two dimensions; they are five times as fast as its path for one.
    x_BKiRS, y_BKiRH = (a.reshape(*a.shape[:2], 2, -1, a.shape[3]) for a in (x_BKRS, y_BKRH))
    return _dot('BKiRS,BKiRH->BKSH', x_BKiRS, y_BKiRH)
  # With H before S, XLA:CPU transposes the queries and not the weights, which are larger.
  return _dot('BKRH,BKRS->BKHS', y_BKRH, x_BKRS).swapaxes(2, 3)


def _merge(x_BKGTH: jax.Array, queries: slice) -> jax.Array:
  """A block as [B, K, R, H]: merges a group's heads with the queries, as products are fastest with one dimension."""
  x_BKGCH = x_BKGTH[..., queries, :]
  return x_BKGCH.reshape(*x_BKGCH.shape[:2], -1, x_BKGCH.shape[-1])


def _unmerge(x_BKRH: jax.Array, like_BKGTH: jax.Array) -> jax.Array:
  return x_BKRH.reshape(*like_BKGTH.shape[:3], -1, x_BKRH.shape[-1])


def _sum(parts: list[tuple[slice, jax.Array]], like_BKTH: jax.Array) -> jax.Array:
  """The sum over blocks, added in float32, in the shape and dtype of `like_BKTH`; zero for keys in no block."""
  T = like_BKTH.shape[2]
  padded = [jnp.pad(part_BKSH, [(0, 0)] * 2 + [(keys.start, T - keys.stop), (0, 0)]) for keys, part_BKSH in parts]
  return sum(padded[1:], padded[0]).astype(like_BKTH.dtype)
