"""Causal attention over rows whose length is sharded over the mesh axis `context`.

Outside attention all rows are in their order: device i of n holds chunks 2i and 2i+1 of 2n. Inside, it exchanges its
second chunk with device n-1-i, so that it holds chunks r and 2n-1-r (zig-zag order) and all devices have equal work
under a causal mask. Keys and values reach the queries in one of two ways: all are gathered, or they are passed around
a ring, a device's share at a time, while the share before is attended to (Ring Attention, arXiv 2310.01889).
Dims: as in layers/tiles.py, and T the length of a row, t of a device's part.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llm_jax.base.sharding import (
  auto_axes,
  batch_axes,
  current_mesh_config,
  fitting_axes,
  num_batch_shards,
  num_length_shards,
  num_shards,
)
from llm_jax.layers.kernels import attend_to_slots, splash_attend, splash_kernel
from llm_jax.layers.tiles import (
  Keys,
  Queries,
  Results,
  Route,
  Scoring,
  Sums,
  add_tiles,
  finish,
  no_sums,
  tile_gradients,
)
from llm_jax.layers.zigzag import (
  AXIS,
  after,
  chunk_rank,
  exchanged,
  exchanged_back,
  gathered_rows,
  in_blocks,
  paired,
  unpaired,
)

TILE = 512  # the most queries, and keys, of a tile
# Of kernels.ATTENTION; for others, of plug-ins, each device computes whole rows, of gathered queries and keys.
SPLIT = ('splash', 'cudnn', 'xla', 'blocked')


class Rows(NamedTuple):
  """What masks the rows of a device, beside causality: [B, t] or None."""

  segment_ids: Any
  prefix: Any


def context_attention(name: str, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int,
                      segment_ids_BT: jax.Array | None, prefix_BT: jax.Array | None, *,
                      sinks_N: jax.Array | None = None, soft_cap: float | None = None) -> jax.Array:
  """Attention y [B, T, N, H] by the implementation `name`, one of SPLIT, masked as in `causal_attention`.

  The arrays are sharded over `context` along T. Layers with a window gather keys instead of passing them around a ring,
  of which they need little.
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  rows = batch_axes(mesh) if q_BTNH.shape[0] % num_batch_shards(mesh) == 0 else None
  heads = fitting_axes('act_kv_heads', k_BTKH.shape[2], mesh)
  by_head, by_row = P(rows, AXIS, heads), P(rows, AXIS)
  kernel, kernel_spec = None, None
  if name == 'splash':
    num_heads = q_BTNH.shape[2] // num_shards(heads, mesh)
    kernel = splash_kernel(q_BTNH.shape[1], num_heads, window, soft_cap, orders=zigzag_orders(q_BTNH.shape[1]))
    # Of a mesh with this axis alone: sizes of shards are not known where other axes are manual.
    of_axis = jax.sharding.AbstractMesh((mesh.shape[AXIS],), (AXIS,))
    kernel_spec = kernel.manual_sharding_spec(jax.sharding.NamedSharding(of_axis, P(None, AXIS)))
  by = 'all_gather' if window else current_mesh_config().context_attention
  ways: dict[str, Callable[..., jax.Array]] = {
      'splash': with_splash, 'blocked': partial(with_tiles, Scoring(window, soft_cap or 0.0), by)}
  attend = ways.get(name, partial(with_mask, name, window, soft_cap))
  return jax.shard_map(attend, in_specs=(*(by_head,) * 3, Rows(by_row, by_row), P(heads), kernel_spec),
                       out_specs=by_head, check_vma=False,
                       axis_names=auto_axes(mesh))(
      q_BTNH, k_BTKH, v_BTKH, Rows(segment_ids_BT, prefix_BT), sinks_N, kernel)


def zigzag_orders(length: int) -> list[np.ndarray]:
  """The positions in a row of the tokens that each device has inside attention, int32 [t]."""
  num_shards = num_length_shards(length)
  chunks = np.arange(length, dtype=np.int32).reshape(2 * num_shards, -1)
  return [np.concatenate([chunks[c] for c in sorted((2 * i, 2 * num_shards - 1 - 2 * i))]) for i in range(num_shards)]


def with_splash(q_BtNH, k_BtKH, v_BtKH, rows: Rows, sinks_N, kernel: Any) -> jax.Array:
  """Attention by the Pallas kernel for TPUs, to gathered keys."""
  segments = None if rows.segment_ids is None else exchanged(rows.segment_ids)
  k_BTKH, v_BTKH = gathered_rows((k_BtKH, v_BtKH))
  return exchanged_back(splash_attend(kernel, exchanged(q_BtNH), k_BTKH, v_BTKH, segments,
                                      gathered_rows(rows.segment_ids)))


def with_mask(name, window, soft_cap, q_BtNH, k_BtKH, v_BtKH, rows: Rows, sinks_N, _) -> jax.Array:
  """Attention by xla or cudnn to gathered keys, which masks them: 1.5 times the work that causality needs.

  A lower chunk is in the first half of its row, so it needs only the first half of the keys.
  """
  moved_BtNH = exchanged(q_BtNH)
  kv_BT2KH = gathered_rows(after(moved_BtNH, jnp.concatenate([k_BtKH, v_BtKH], axis=2)))
  k_BTKH, v_BTKH = jnp.split(kv_BT2KH, 2, axis=2)
  rows = jax.tree.map(lambda x_Bt: after(kv_BT2KH, x_Bt.astype(jnp.int32)), rows)
  of_keys = gathered_rows(rows)
  chunk, T = q_BtNH.shape[1] // 2, k_BTKH.shape[1]
  rank = chunk_rank(jax.lax.axis_index(AXIS))

  def attend(q_BCNH: jax.Array, segments_BC: jax.Array | None, start: jax.Array, num_keys: int) -> jax.Array:
    distance_CS = (start + jnp.arange(chunk))[:, None] - jnp.arange(num_keys)[None]
    seen_BCS = ((distance_CS >= 0) & ((distance_CS < window) if window else True))[None]
    if rows.prefix is not None:
      seen_BCS = seen_BCS | (of_keys.prefix[:, None, :num_keys] > 0)
    if segments_BC is not None:
      seen_BCS = seen_BCS & (segments_BC[:, :, None] == of_keys.segment_ids[:, None, :num_keys])
    k_BSKH, v_BSKH = k_BTKH[:, :num_keys], v_BTKH[:, :num_keys]
    if soft_cap is not None or sinks_N is not None:
      return attend_to_slots(q_BCNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), seen_BCS, soft_cap=soft_cap,
                             sinks_N=sinks_N)
    return jax.nn.dot_product_attention(q_BCNH, k_BSKH, v_BSKH, mask=seen_BCS[:, None], implementation=name)

  q_low, q_high = jnp.split(moved_BtNH, 2, axis=1)
  segments: list[Any] = [None, None]
  if rows.segment_ids is not None:
    segments = jnp.split(exchanged(after(of_keys.segment_ids, rows.segment_ids)), 2, axis=1)
  low = attend(q_low, segments[0], rank * chunk, T if rows.prefix is not None else T // 2)
  return exchanged_back(jnp.concatenate([low, attend(q_high, segments[1], T - (rank + 1) * chunk, T)], axis=1))


def with_tiles(scoring: Scoring, by: str, q_BtNH, k_BtKH, v_BtKH, rows: Rows, sinks_N, _) -> jax.Array:
  """Attention in plain JAX, a tile of scores at a time."""
  B, t, N, H = q_BtNH.shape
  K = k_BtKH.shape[2]
  size = next(size for size in range(min(TILE, t // 2), 0, -1) if t // 2 % size == 0)
  scaled_BtNH = (q_BtNH.astype(jnp.float32) * H**-0.5).astype(q_BtNH.dtype)
  kv_Bt2KH = jnp.concatenate([k_BtKH, v_BtKH], axis=2)
  if by == 'ring':
    moved = exchanged(jnp.concatenate([scaled_BtNH, kv_Bt2KH], axis=2))
    moved_BtNH, kv_Bt2KH = moved[:, :, :N], moved[:, :, N:]
  else:
    moved_BtNH = exchanged(scaled_BtNH)
  q_M2BKGCH = paired(moved_BtNH, size).reshape(-1, 2, B, size, K, N // K, H).transpose(0, 1, 2, 4, 5, 3, 6)
  segments_M2BC, segments_JBS = None, None
  if rows.segment_ids is not None:
    segments_Bt = exchanged(after(moved_BtNH, rows.segment_ids))
    segments_M2BC = paired(segments_Bt, size)
    segments_JBS = in_blocks(segments_Bt if by == 'ring' else rows.segment_ids, size)
  kv_J2BKSH = in_blocks(kv_Bt2KH, size).reshape(-1, B, size, 2, K, H).transpose(0, 3, 1, 4, 2, 5)
  sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
  y_M2BKGCH = _attend(scoring, by, q_M2BKGCH, kv_J2BKSH, segments_M2BC, segments_JBS, sinks_KG)
  y_M2BCNH = y_M2BKGCH.transpose(0, 1, 2, 5, 3, 4, 6).reshape(-1, 2, B, size, N, H)
  return exchanged_back(unpaired(y_M2BCNH).astype(q_BtNH.dtype))


# The schedules ----------------------------------------------------------------------------------------------------

def starts_of(rank: jax.Array, num_pairs: int, size: int) -> jax.Array:
  """Positions [M, 2] of the first tokens of the blocks of pairs, on a device with this chunk_rank."""
  last = 2 * jax.lax.axis_size(AXIS) * num_pairs - 1
  low_M = rank * num_pairs + jnp.arange(num_pairs)
  return size * jnp.stack([low_M, last - low_M], axis=1)


def visit_all(rank: jax.Array, num_pairs: int, num_blocks: int, reach: int | None = None) -> Route:
  """The route of queries to the keys before them, in a row of `num_blocks` blocks.

  A block visits its own block of keys and then those before it, at most `reach` if windows end there. Without windows
  the two blocks of a pair visit num_blocks + 1 together, whatever the device.
  """
  def num_low(m: jax.Array) -> jax.Array:
    return jnp.minimum(rank * num_pairs + m + 1, num_blocks if reach is None else reach)

  def visit(m: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    low = rank * num_pairs + m
    is_high = (s >= num_low(m)).astype(jnp.int32)
    return is_high, jnp.where(is_high, num_blocks - 1 - low - (s - num_low(m)), low - s)

  def num_tiles(m: jax.Array) -> jax.Array | int:
    return num_blocks + 1 if reach is None else num_low(m) + jnp.minimum(num_blocks - rank * num_pairs - m, reach)

  return Route(visit, num_tiles)


def visit_share(rank: jax.Array, other: jax.Array, num_pairs: int) -> Route:
  """The route of queries to the keys of another device: 2 M tiles of each pair.

  The higher chunk of queries needs the lower chunk of keys. Of a device with a lower rank the lower chunk of queries
  needs it too, of one with a higher rank the higher chunk of queries needs the higher chunk of keys.
  """
  before = (other < rank).astype(jnp.int32)

  def visit(m: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    late = (s >= num_pairs).astype(jnp.int32)
    return 1 - late * before, s - late * before * num_pairs

  return Route(visit, lambda m: 2 * num_pairs)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scoring, by, q, kv, segments_q, segments_k, sinks_KG):
  return _forward(scoring, by, q, kv, segments_q, segments_k, sinks_KG)[0]


def _forward(scoring, by, q, kv, segments_q, segments_k, sinks_KG):
  run = _ring if by == 'ring' else _gather
  queries = _queries(q, segments_q)
  y, log_z = finish(run(scoring, queries, (kv, segments_k), no_sums(queries, sinks_KG)))
  y, log_z = checkpoint_name((y.astype(q.dtype), log_z), 'attention')
  return y, (q, kv, segments_q, segments_k, sinks_KG, y, log_z)


def _backward(scoring, by, residuals, dy):
  q, kv, segments_q, segments_k, sinks_KG, y, log_z = residuals
  own = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)
  run = _ring_gradients if by == 'ring' else _gather_gradients
  dq, dkv = run(scoring, _queries(q, segments_q), (kv, segments_k), Results(log_z, dy.astype(q.dtype), own))
  dsinks_KG = None
  if sinks_KG is not None:
    weights = jnp.exp(sinks_KG[None, None, None, :, :, None] - log_z)
    dsinks_KG = -jnp.sum(weights * own, axis=(0, 1, 2, 5)).astype(sinks_KG.dtype)
  return dq.astype(q.dtype), dkv.astype(kv.dtype), None, None, dsinks_KG


_attend.defvjp(_forward, _backward)


def _queries(q_M2BKGCH: jax.Array, segments_M2BC: jax.Array | None) -> Queries:
  M, C = q_M2BKGCH.shape[0], q_M2BKGCH.shape[5]
  return Queries(q_M2BKGCH, starts_of(chunk_rank(jax.lax.axis_index(AXIS)), M, C), segments_M2BC)


def _gather_keys(shared: tuple, before: jax.Array) -> Keys:
  kv, segments = shared
  kv = jax.lax.all_gather(after(before, kv), AXIS, axis=0, tiled=True)
  if segments is not None:
    segments = jax.lax.all_gather(after(kv, segments), AXIS, axis=0, tiled=True)
  return Keys(kv[:, 0], kv[:, 1], kv.shape[4] * jnp.arange(len(kv)), segments)


def _gather_route(scoring: Scoring, queries: Queries, keys: Keys) -> Route:
  size = keys.k_JBKSH.shape[3]
  reach = None if not scoring.window else -(-(scoring.window - 1) // size) + 1
  rank = chunk_rank(jax.lax.axis_index(AXIS))
  return visit_all(rank, queries.starts_M2.shape[0], keys.starts_J.shape[0], reach)


def _gather(scoring: Scoring, queries: Queries, shared: tuple, sums: Sums) -> Sums:
  keys = _gather_keys(shared, queries.q_M2BKGCH)
  return add_tiles(sums, queries, keys, _gather_route(scoring, queries, keys), scoring)


def _gather_gradients(scoring: Scoring, queries: Queries, shared: tuple, results: Results) -> tuple:
  keys = _gather_keys(shared, results.dy)
  dq, *dkv = tile_gradients(queries, keys, results, _gather_route(scoring, queries, keys), scoring)
  dkv_J2BKSH = jnp.stack(dkv, axis=1).astype(shared[0].dtype)
  return dq, jax.lax.psum_scatter(dkv_J2BKSH, AXIS, scatter_dimension=0, tiled=True)


def _pass_on(x: jax.Array) -> jax.Array:
  """From each device to the next of the ring."""
  n = jax.lax.axis_size(AXIS)
  return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _pass_keys(shared: tuple) -> tuple:
  kv, segments = shared
  following = _pass_on(kv)
  return following, None if segments is None else _pass_on(after(following, segments))


def _keys_of(device: jax.Array, shared: tuple, num_pairs: int) -> Keys:
  """The keys of a device in zig-zag order: its lower chunk, then its higher one."""
  kv, segments = shared
  size = kv.shape[4]
  starts_M2 = starts_of(chunk_rank(device), num_pairs, size)
  return Keys(kv[:, 0], kv[:, 1], jnp.concatenate([starts_M2[:, 0], starts_M2[::-1, 1]]), segments)


def _ring_route(i: Any, num_pairs: int) -> tuple[jax.Array, Route]:
  """(the device whose keys are here after i steps, the route to them)."""
  device = jax.lax.axis_index(AXIS)
  other, rank = (device - i) % jax.lax.axis_size(AXIS), chunk_rank(device)
  return other, visit_share(rank, chunk_rank(other), num_pairs)


def _own_route(num_pairs: int) -> tuple[jax.Array, Route]:
  """As _ring_route, for a device's own keys, which are like a row of two chunks."""
  device = jax.lax.axis_index(AXIS)
  return device, visit_all(jnp.zeros_like(device), num_pairs, 2 * num_pairs)


def _ring(scoring: Scoring, queries: Queries, shared: tuple, sums: Sums) -> Sums:
  """The sums over all keys; the next keys are on their way while those at hand are attended to."""
  M, n = queries.starts_M2.shape[0], jax.lax.axis_size(AXIS)

  def attend(sums: Sums, at_hand: tuple, other: jax.Array, route: Route) -> Sums:
    return add_tiles(sums, queries, _keys_of(other, at_hand, M), route, scoring)

  def step(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
    sums, at_hand = carry
    following = _pass_keys(at_hand)
    return (attend(sums, at_hand, *_ring_route(i, M)), following), None

  following = _pass_keys(shared)
  first = attend(sums, shared, *_own_route(M))
  (sums, last), _ = jax.lax.scan(step, (first, following), jnp.arange(1, n - 1))
  return attend(sums, last, *_ring_route(n - 1, M))


def _ring_gradients(scoring: Scoring, queries: Queries, shared: tuple, results: Results) -> tuple:
  """(dq, dk, dv); the gradients of keys and values follow them around the ring, to the device that has them."""
  M, n = queries.starts_M2.shape[0], jax.lax.axis_size(AXIS)

  def attend(at_hand: tuple, other: jax.Array, route: Route) -> tuple:
    dq, *dkv = tile_gradients(queries, _keys_of(other, at_hand, M), results, route, scoring)
    return dq, jnp.stack(dkv, axis=1)

  def step(carry: tuple, i: jax.Array) -> tuple[tuple, None]:
    dq, dkv, at_hand = carry
    following = _pass_keys(at_hand)
    arriving = _pass_on(after(following[0], dkv))
    more, here = attend(at_hand, *_ring_route(i, M))
    return (dq + more, arriving + here, following), None

  following = _pass_keys((after(results.dy, shared[0]), shared[1]))
  first = attend(shared, *_own_route(M))
  (dq, dkv, last), _ = jax.lax.scan(step, (*first, following), jnp.arange(1, n - 1))
  more, here = attend(last, *_ring_route(n - 1, M))
  return dq + more, _pass_on(_pass_on(dkv) + here)

