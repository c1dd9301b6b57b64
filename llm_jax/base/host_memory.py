"""Arrays in the pinned memory of the host: kept there between steps, and fetched to the devices inside a program.

Where nothing is kept there, all functions return what they are given.
"""

from __future__ import annotations

from typing import Any

import jax

HOST = 'pinned_host'


def is_held(x: Any) -> bool:
  """Whether an array, also a traced one, is in the host's memory."""
  return jax.typeof(x).memory_space == jax.memory.Space.Host


def into_host(tree: Any) -> Any:
  """The tree, of ShapeDtypeStructs or of traced arrays, in the host's memory; scalars stay on the devices."""
  def move(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      kept = x.sharding.with_memory_kind(HOST) if x.ndim else x.sharding
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=kept)
    # Traced for GPUs that are not here, whose shardings cannot name a memory, or already there.
    return jax.device_put(x, jax.memory.Space.Host) if x.ndim and not is_held(x) else x

  return jax.tree.map(move, tree)


def fetched(tree: Any) -> Any:
  """In a program: the tree on the devices."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_held(x) else x, tree)


def put_back(tree: Any, like: Any) -> Any:
  """In a program: the tree in the host's memory where `like` is."""
  return jax.tree.map(lambda x, old: jax.device_put(x, jax.memory.Space.Host) if is_held(old) else x, tree, like)


def on_devices(tree: Any) -> Any:
  """Outside of a program: copies on the devices of what is in the host's memory."""
  return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind('device')) if is_held(x) else x, tree)
