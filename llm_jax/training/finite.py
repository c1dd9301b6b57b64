"""Finds leaves that are not finite, or nearly so, so that such a state is neither saved nor restored."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.base.host_memory import fetched
from llm_jax.base.trees import leaf_name
from llm_jax.optim.guard import LARGEST


def non_finite(tree: Any) -> list[str]:
  """The paths of float arrays with NaN or a number above LARGEST; a scalar may be infinite, as a best value so far is.

  One program reads every array once, on the devices; for a single process on CPUs NumPy does, as compiling that program
  takes most of a second.
  """
  leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact)}
  if not leaves:
    return []
  platforms = {device.platform for leaf in leaves.values() for device in leaf.devices()}
  if jax.process_count() == 1 and platforms == {'cpu'}:
    return [name for name, leaf in leaves.items() if not all(
        _is_fine(np.asarray(shard.data)) for shard in leaf.addressable_shards if shard.replica_id == 0)]
  mesh = next((leaf.sharding.mesh for leaf in leaves.values() if isinstance(leaf.sharding, NamedSharding)), None)
  is_bad = np.asarray(_program(mesh)(tuple(leaves.values())))
  return [name for name, bad in zip(leaves, is_bad, strict=True) if bad]


def _is_fine(x: np.ndarray) -> bool:
  if not x.ndim:
    return not np.isnan(x)
  with np.errstate(invalid='ignore'):  # NaN passes through both
    return bool(x.max(initial=0) < LARGEST and x.min(initial=0) > -LARGEST)


@functools.cache
def _program(mesh: Any) -> Any:
  return jax.jit(_are_bad, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _are_bad(leaves: tuple[jax.Array, ...]) -> jax.Array:
  # The largest magnitude, which NaN passes through: on a CPU three times as fast as jnp.isfinite of every value.
  return jnp.stack([~(jnp.max(jnp.abs(x), initial=0) < LARGEST) if x.ndim else jnp.isnan(x)
                    for x in map(fetched, leaves)])
