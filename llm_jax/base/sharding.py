"""The mesh, logical axes, and the one table that maps axes to the mesh. One device is a 1x1x1 mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.base.batch import Batch
from llm_jax.base.errors import ConfigError
from llm_jax.base.target import current_target

MESH_AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')

# Logical axis -> mesh axes. Activations have their own axes `act_...`, so that FSDP shards `embed` of weights but not
# of activations.
RULES: dict[str, str | tuple[str, ...] | None] = {
    'act_batch': BATCH_AXES,
    'act_length': None,
    'act_stream': 'tensor',  # the length of the residual stream between layers (sequence parallel, arXiv 2205.05198)
    'act_lookup': 'data',  # the rows of a batch while they are looked up in a table; see layers/embed.py
    'act_embed': None,
    'act_heads': 'tensor',
    'act_kv_heads': 'tensor',
    'act_mlp': 'tensor',
    'act_vocab': 'tensor',
    'head_dim': None,
    'layers': None,
    'experts': None,  # replicated: there is no mesh axis for experts
    'norm': None,
    'vocab': 'tensor',
    'positions': None,
    'embed': 'fsdp',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'gate': None,  # sharded over tensor, XLA 0.10 computed gate * unsharded array wrongly on a 2 x 2 x 2 mesh
    'gates': None,
    'patch': None,
    'byte_embed': None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1, for one axis at most, takes the remaining devices."""

  data: int = -1  # devices that split the batch and hold whole copies of the weights
  fsdp: int = 1  # devices that split the batch and the weights
  tensor: int = 1  # devices that split each matrix multiplication

  def __post_init__(self) -> None:
    sizes = dataclasses.astuple(self)
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
      raise ValueError(f'data, fsdp and tensor must be positive, with at most one -1 for "the rest"; got '
                       f'{", ".join(map(str, sizes))}')


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh over all devices of the current target. Raises ConfigError where the sizes do not fit the device count."""
  devices = list(current_target().devices) if devices is None else devices
  sizes = list(dataclasses.astuple(config))
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(1, len(devices) // known)
  if math.prod(sizes) != len(devices):
    raise ConfigError(
        f'config.mesh: data x fsdp x tensor = {" x ".join(map(str, dataclasses.astuple(config)))} does not cover the '
        f'{len(devices)} device(s) here; set sizes whose product is {len(devices)} (-1 takes the rest)')
  # Auto: the compiler propagates shardings. jax.make_mesh would default to explicit ones.
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  num_slices = len({getattr(device, 'slice_index', 0) or 0 for device in devices})
  if num_slices > 1:
    return Mesh(over_slices(sizes, num_slices, devices), MESH_AXES, axis_types=auto)
  return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=auto)


def over_slices(sizes: list[int], num_slices: int, devices: list[jax.Device]) -> np.ndarray:
  """The devices of several TPU slices: the axis data, or else fsdp, goes over the network between them.

  Raises ConfigError if neither divides.
  """
  split = next((i for i in (0, 1) if sizes[i] % num_slices == 0), None)
  if split is None:
    raise ConfigError(f'config.mesh: data {sizes[0]} or fsdp {sizes[1]} must be a multiple of the {num_slices} slices')
  between = [num_slices if i == split else 1 for i in range(len(sizes))]
  within = [size // count for size, count in zip(sizes, between, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(within, between, devices)


def logical_to_spec(axes: tuple[str | None, ...]) -> P:
  """The PartitionSpec of an array with these logical axes. Raises ValueError for unknown names and collisions."""
  spec = []
  for axis in axes:
    if axis is not None and axis not in RULES:
      raise ValueError(f'logical axis {axis!r} has no rule; known: {", ".join(RULES)}')
    spec.append(None if axis is None else RULES[axis])
  used = [m for entry in spec if entry is not None for m in ((entry,) if isinstance(entry, str) else entry)]
  if len(used) != len(set(used)):
    raise ValueError(f'logical axes {axes} map two dimensions to one mesh axis: {spec}')
  return P(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation's sharding; no effect outside `jax.set_mesh`. Dimensions that do not divide stay whole."""
  mesh, spec = jax.sharding.get_abstract_mesh(), logical_to_spec(axes)
  if mesh.empty:
    return x
  fitting = [entry if size % _num_shards(entry, mesh) == 0 else None for size, entry in zip(x.shape, spec, strict=True)]
  return jax.lax.with_sharding_constraint(x, P(*fitting))


def gathered(w: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """A weight with these logical axes, whole where it is sharded only to save memory; no effect outside a mesh."""
  return constrain(w, *(None if RULES[axis] == 'fsdp' else axis for axis in axes))


def _num_shards(entry: str | tuple[str, ...] | None, mesh: Any) -> int:
  names = () if entry is None else (entry,) if isinstance(entry, str) else entry
  return math.prod(mesh.shape[name] for name in names)


def check_divisible(abstract: Any, shardings: Any) -> None:
  """Raises ConfigError naming each array whose dimension does not divide over its mesh axes."""
  problems = []

  def check(path: Any, leaf: Any, sharding: NamedSharding) -> None:
    try:
      sharding.shard_shape(leaf.shape)
    except ValueError:
      name = '/'.join(str(getattr(k, 'key', k)) for k in path)
      problems.append(f'parameter {name} of shape {leaf.shape} does not divide over mesh axes {sharding.spec}')

  jax.tree_util.tree_map_with_path(check, abstract, shardings)
  if problems:
    raise ConfigError('config.mesh: ' + '\n  '.join(problems))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows are sharded over data and fsdp; other dimensions are whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
  """The number of shards of a batch's rows."""
  return _num_shards(BATCH_AXES, mesh)


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Indices of the rows of a global batch that this process's devices hold, ascending."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((num_rows,))
  return np.unique(np.concatenate([np.arange(num_rows)[index] for index in indices.values()]))


def put_batch(features: dict[str, np.ndarray], rows: np.ndarray, num_rows: int, mesh: Mesh) -> Batch:
  """A global Batch of `num_rows` rows from this process's features, whose row i is global row `rows[i]`."""
  sharding = batch_sharding(mesh)

  def put(x: np.ndarray) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
      return x[np.searchsorted(rows, np.arange(num_rows)[index[0]])][(slice(None), *index[1:])]
    return jax.make_array_from_callback((num_rows, *x.shape[1:]), sharding, shard)

  return Batch(**{name: put(x) for name, x in features.items()})
