"""The callback replica_check: compares the copies of arrays on all devices, to find a device that corrupts data.

  --config.log.callbacks=replica_check --config.log.replica_check.every=100
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.errors import ConfigError, DivergedError
from llm_jax.base.registry import register


class ReplicaCheck:
  """Raises DivergedError, which names array and device, if copies of a parameter or of optimizer state differ.

  It runs at logged steps that are a multiple of `every`.
  """

  def __init__(self, every: int = 100):
    if every < 1:
      raise ConfigError(f'config.log.replica_check.every: must be at least 1; got {every}')
    self._every, self._passed = every, 0

  def __call__(self, event: Any) -> None:
    if event.step % self._every:
      return
    state = event.session.state
    if problems := differing_replicas({'params': state.params, 'opt_state': state.opt_state}):
      raise DivergedError(
          f'step {event.session.step}: copies of the same array differ between devices: {"; ".join(problems[:4])}'
          f'{f" and {len(problems) - 4} more arrays" if len(problems) > 4 else ""}. The hardware of the device that '
          f'differs is at fault: exclude it. The last check that passed was at step {self._passed}; move newer '
          'checkpoints away and repeat the command')
    self._passed = event.session.step


def differing_replicas(tree: Any) -> list[str]:
  """What differs between the copies that devices hold of the arrays of a tree, with the devices in the minority."""
  leaves = {jax.tree_util.keystr(path, simple=True, separator='/'): x
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if isinstance(x.sharding, NamedSharding) and x.size and x.sharding.mesh.size > 1
            and x.sharding.num_devices > len(set(map(str, x.sharding.devices_indices_map(x.shape).values())))}
  if not leaves:
    return []
  mesh = next(iter(leaves.values())).sharding.mesh
  on_devices = hashing(mesh, tuple(x.sharding.spec for x in leaves.values()))(list(leaves.values()))
  hashes = multihost_utils.process_allgather(on_devices, tiled=True)
  devices, problems = list(mesh.devices.flat), []
  for i, (name, x) in enumerate(leaves.items()):
    copies = collections.defaultdict[str, dict[Any, tuple[int, ...]]](dict)
    for device, index in x.sharding.devices_indices_map(x.shape).items():
      copies[str(index)][device] = tuple(hashes[devices.index(device), i].tolist())
    for found in copies.values():
      (usual, number), *others = collections.Counter(found.values()).most_common()
      if others:
        tied = number == others[0][1]
        wrong = [f'{device} of process {device.process_index}' for device, value in found.items()
                 if tied or value != usual]
        problems.append(f'{name} on {", ".join(wrong)}' + (' (as many copies have each value)' if tied else ''))
  return problems


@functools.cache
def hashing(mesh: jax.sharding.Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[[list[jax.Array]], jax.Array]:
  """The compiled function from arrays to uint32 [device, array, 2]: sum and xor of the bits that each device holds."""
  def hash_local(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([hash_of(x) for x in leaves])[None]

  return jax.jit(jax.shard_map(hash_local, mesh=mesh, in_specs=(list(specs),),
                               out_specs=PartitionSpec(mesh.axis_names), check_vma=False))


def hash_of(x: jax.Array) -> jax.Array:
  """uint32 [2]: sum, weighted by position so that swapped values differ, and xor of the bits of an array."""
  kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, kind).reshape(-1).astype(jnp.uint32)
  weights = jax.lax.iota(jnp.uint32, bits.size) * np.uint32(2) + np.uint32(1)
  xor = jax.lax.reduce(bits, np.uint32(0), jax.lax.bitwise_xor, (0,))
  return jnp.stack([jnp.sum(bits * weights, dtype=jnp.uint32), xor])


register(CALLBACKS, 'replica_check', ReplicaCheck)
