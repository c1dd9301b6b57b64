"""The orders of rows inside and outside attention, on devices that share the length of rows; see layers/context.py.

Called inside jax.shard_map. Dims: B batch, t tokens of a device, M pairs of blocks, J blocks, C or S tokens of a block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.base.devices import platform

AXIS = 'context'


def exchanged(x_Bt: jax.Array) -> jax.Array:
  """A device's part of rows [B, t, ...] in zig-zag order: chunks r and 2n-1-r instead of 2i and 2i+1."""
  first, second = jnp.split(x_Bt, 2, axis=1)
  second = jax.lax.ppermute(second, AXIS, _mirror())
  ahead = _is_first_lower()
  return jnp.concatenate([jnp.where(ahead, first, second), jnp.where(ahead, second, first)], axis=1)


def exchanged_back(x_Bt: jax.Array) -> jax.Array:
  """The inverse of `exchanged`."""
  low, high = jnp.split(x_Bt, 2, axis=1)
  ahead = _is_first_lower()
  second = jax.lax.ppermute(jnp.where(ahead, high, low), AXIS, _mirror())
  return jnp.concatenate([jnp.where(ahead, low, high), second], axis=1)


def after(before: jax.Array, x: Any) -> Any:
  """x, but on CPUs not until `before` has been computed.

  There a collective blocks a thread until all devices have come to it. Devices that come to two of them in different
  orders can wait for each other forever (jaxlib 0.10 and 0.11).
  """
  if platform() != 'cpu':
    return x
  zero = 0 * jax.lax.stop_gradient(before).reshape(-1)[0].astype(jnp.float32)  # not folded, as it could be nan
  return x + zero.astype(x.dtype)


def _mirror() -> list[tuple[int, int]]:
  n = jax.lax.axis_size(AXIS)
  return [(i, n - 1 - i) for i in range(n)]


def _is_first_lower() -> jax.Array:
  """Whether chunk 2i of this device comes before the one it gets, 2n-1-2i."""
  return 2 * jax.lax.axis_index(AXIS) < jax.lax.axis_size(AXIS)


def chunk_rank(device: jax.Array) -> jax.Array:
  """r: a device holds chunks r and 2n-1-r."""
  n = jax.lax.axis_size(AXIS)
  return jnp.minimum(2 * device, 2 * n - 1 - 2 * device)


def gathered_rows(tree: Any) -> Any:
  """The whole rows [B, T, ...], in their order, of parts that have not been exchanged."""
  return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True), tree)


def in_blocks(x_Bt: jax.Array, size: int) -> jax.Array:
  """[J, B, S, ...]: blocks of `size` tokens, in order."""
  return jnp.moveaxis(x_Bt.reshape(x_Bt.shape[0], -1, size, *x_Bt.shape[2:]), 1, 0)


def paired(x_Bt: jax.Array, size: int) -> jax.Array:
  """[M, 2, B, C, ...]: block m of the lower chunk with block M-1-m of the higher, so that pairs have equal work."""
  low, high = jnp.split(in_blocks(x_Bt, size), 2)
  return jnp.stack([low, high[::-1]], axis=1)


def unpaired(x_M2BC: jax.Array) -> jax.Array:
  """The inverse of `paired`."""
  blocks_JBC = jnp.concatenate([x_M2BC[:, 0], x_M2BC[::-1, 1]])
  x_BJC = jnp.moveaxis(blocks_JBC, 0, 1)
  return x_BJC.reshape(x_BJC.shape[0], -1, *x_BJC.shape[3:])
