"""Attention by a list of (queries, keys) tiles, with online softmax: the arithmetic that layers/context.py schedules.

The queries of a device are M pairs of blocks. A pair visits one tile after another, each one block of its queries and
one block of keys; a tile is all of scores that is in memory at a time (FlashAttention, arXiv 2205.14135). Which tiles a
pair visits may depend on the device, but their number does not, so that devices finish together.
Dims: M pairs of blocks, 2 blocks of a pair, J blocks of keys, B batch, K kv heads, G = N/K, C length of a block, S = C,
H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.layers.blocked import HIDDEN


class Queries(NamedTuple):
  """Blocks of scaled queries, and what masks them."""

  q_M2BKGCH: jax.Array
  starts_M2: jax.Array  # int32: the position in its row of a block's first token
  segments_M2BC: jax.Array | None


class Keys(NamedTuple):
  """Blocks of keys and values, and what masks them."""

  k_JBKSH: jax.Array
  v_JBKSH: jax.Array
  starts_J: jax.Array
  segments_JBS: jax.Array | None


class Sums(NamedTuple):
  """The online softmax of each query: its largest score, and sums over keys of weights and of weighted values."""

  top: jax.Array  # float32 [M, 2, B, K, G, C]
  z: jax.Array
  y: jax.Array  # float32 [M, 2, B, K, G, C, H]


class Results(NamedTuple):
  """What the gradients of scores need to know of each query: log Z, the gradient of y, and its product with y."""

  log_z: jax.Array  # float32 [M, 2, B, K, G, C]
  dy: jax.Array  # [M, 2, B, K, G, C, H]
  own: jax.Array  # float32 [M, 2, B, K, G, C]


class Scoring(NamedTuple):
  """The options of scores; static."""

  window: int = 0  # see attention.Layer
  soft_cap: float = 0.0  # see kernels.attend_to_slots


class Route(NamedTuple):
  """The tiles that a pair of blocks visits."""

  visit: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # (m, s) -> (block of pair m, block of keys)
  num_tiles: Callable[[jax.Array], Any]  # of pair m; an int where it is the same for all


def no_sums(queries: Queries, sinks_KG: jax.Array | None) -> Sums:
  """The sums before the first tile; a sink is a key without a value."""
  shape = queries.q_M2BKGCH.shape
  if sinks_KG is None:
    top, z = jnp.full(shape[:-1], HIDDEN, jnp.float32), jnp.zeros(shape[:-1], jnp.float32)
  else:
    top = jnp.broadcast_to(sinks_KG.astype(jnp.float32)[None, None, None, :, :, None], shape[:-1])
    z = jnp.ones(shape[:-1], jnp.float32)
  return Sums(top, z, jnp.zeros(shape, jnp.float32))


def add_tiles(sums: Sums, queries: Queries, keys: Keys, route: Route, scoring: Scoring) -> Sums:
  """The sums with more tiles of each pair."""
  def pair(m: jax.Array, own: Queries, of_pair: Sums) -> Sums:
    def tile(s: jax.Array, of_pair: Sums) -> Sums:
      i, j = route.visit(m, s)
      query, key, old = _at(own, i), _at(keys, j), _at(of_pair, i)
      scores_BKGCS = _scores(query, key, scoring)
      top = jnp.maximum(old.top, scores_BKGCS.max(-1))
      e_BKGCS, shrink = jnp.exp(scores_BKGCS - top[..., None]), jnp.exp(old.top - top)
      y = _dot('BKGCS,BKSH->BKGCH', e_BKGCS.astype(key.v_JBKSH.dtype), key.v_JBKSH)
      new = Sums(top, old.z * shrink + e_BKGCS.sum(-1), old.y * shrink[..., None] + y)
      return jax.tree.map(lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, i, 0), of_pair, new)

    return jax.lax.fori_loop(0, route.num_tiles(m), tile, of_pair)

  return jax.lax.map(lambda xs: pair(*xs), (jnp.arange(sums.z.shape[0]), queries, sums))


def finish(sums: Sums) -> tuple[jax.Array, jax.Array]:
  """(attention y, logarithm of each query's normaliser), float32."""
  return sums.y / sums.z[..., None], sums.top + jnp.log(sums.z)


def tile_gradients(queries: Queries, keys: Keys, results: Results, route: Route,
                   scoring: Scoring) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sums over tiles of the gradients of scaled queries, keys and values, float32."""
  def pair(carry: tuple, xs: tuple) -> tuple[tuple, jax.Array]:
    m, own_queries, own_results = xs

    def tile(s: jax.Array, carry: tuple) -> tuple:
      dq_2, dk_J, dv_J = carry
      i, j = route.visit(m, s)
      query, key, result = _at(own_queries, i), _at(keys, j), _at(own_results, i)
      dtype = query.q_M2BKGCH.dtype
      scores_BKGCS = _scores(query, key, scoring)
      p_BKGCS = jnp.exp(scores_BKGCS - result.log_z[..., None])
      dp_BKGCS = _dot('BKGCH,BKSH->BKGCS', result.dy, key.v_JBKSH)
      ds_BKGCS = p_BKGCS * (dp_BKGCS - result.own[..., None])
      if scoring.soft_cap:
        ds_BKGCS *= jnp.where(scores_BKGCS > HIDDEN / 2, 1 - (scores_BKGCS / scoring.soft_cap) ** 2, 0)
      ds_BKGCS = ds_BKGCS.astype(dtype)
      dq = _dot('BKGCS,BKSH->BKGCH', ds_BKGCS, key.k_JBKSH)
      dk = _dot('BKGCS,BKGCH->BKSH', ds_BKGCS, query.q_M2BKGCH)
      dv = _dot('BKGCS,BKGCH->BKSH', p_BKGCS.astype(dtype), result.dy)
      return _add_at(dq_2, i, dq), _add_at(dk_J, j, dk), _add_at(dv_J, j, dv)

    dq_2 = jnp.zeros(own_queries.q_M2BKGCH.shape, jnp.float32)
    dq_2, *carry = jax.lax.fori_loop(0, route.num_tiles(m), tile, (dq_2, *carry))
    return tuple(carry), dq_2

  zeros = jnp.zeros(keys.k_JBKSH.shape, jnp.float32)
  xs = jnp.arange(results.own.shape[0]), queries, results
  (dk_JBKSH, dv_JBKSH), dq_M2BKGCH = jax.lax.scan(pair, (zeros, zeros), xs)
  return dq_M2BKGCH, dk_JBKSH, dv_JBKSH


def _scores(query: Queries, key: Keys, scoring: Scoring) -> jax.Array:
  """Scores of a tile, float32 [B, K, G, C, S]; those of masked keys are HIDDEN."""
  q_BKGCH, start, segments_BC = query
  k_BKSH, _, key_start, key_segments_BS = key
  distance_CS = (start + jnp.arange(q_BKGCH.shape[3]))[:, None] - (key_start + jnp.arange(k_BKSH.shape[2]))[None]
  seen_BCS = (distance_CS >= 0)[None]
  if scoring.window:
    seen_BCS &= (distance_CS < scoring.window)[None]
  if segments_BC is not None and key_segments_BS is not None:
    seen_BCS = seen_BCS & (segments_BC[:, :, None] == key_segments_BS[:, None, :])
  scores_BKGCS = _dot('BKGCH,BKSH->BKGCS', q_BKGCH, k_BKSH)
  if scoring.soft_cap:
    scores_BKGCS = scoring.soft_cap * jnp.tanh(scores_BKGCS / scoring.soft_cap)
  return jnp.where(seen_BCS[:, None, None], scores_BKGCS, HIDDEN)


def _dot(eqn: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(eqn, x, y, preferred_element_type=jnp.float32)


def _at(tree, i):
  """Element i of the first dimension of each array."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def _add_at(x: jax.Array, i: jax.Array, more: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, _at(x, i) + more, i, 0)
