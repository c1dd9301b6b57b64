"""The mesh, logical axes, and the one table that maps axes to the mesh. One device is a mesh too."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.base.batch import Batch
from llm_jax.base.devices import platform
from llm_jax.base.errors import ConfigError
from llm_jax.base.networks import over_networks
from llm_jax.base.target import current_target

MESH_AXES = ('stage', 'data', 'fsdp', 'context', 'tensor')  # the last one has the nearest devices
BATCH_AXES = ('data', 'stage', 'fsdp')
SHARD_AXES = (*BATCH_AXES, 'context')  # each device along them has its own tokens
CONTEXT_ATTENTION = ('all_gather', 'ring')
OFFLOADS = ('none', 'optimizer', 'all')

Rules = dict[str, str | tuple[str, ...] | None]
# Logical axis -> mesh axes, unless config.mesh.rules changes them. Activations have their own axes `act_...`, so that
# FSDP shards `embed` of weights but not of activations.
RULES: Rules = {
    'act_batch': BATCH_AXES,
    'act_shards': SHARD_AXES,  # shards of a batch's rows and of their length, in one dimension
    'act_length': 'context',
    # The length of the residual stream between layers (sequence parallel, arXiv 2205.05198).
    'act_stream': ('context', 'tensor'),
    'act_lookup': ('data', 'stage'),  # the rows of a batch while they are looked up in a table; see layers/embed.py
    'act_lookup_length': 'tensor',  # and their length
    'act_lookup_embed': 'fsdp',  # and what has been looked up, when parts of rows have been exchanged
    'act_embed': None,
    'act_heads': 'tensor',
    'act_kv_heads': 'tensor',
    'act_mlp': 'tensor',
    'act_vocab': 'tensor',
    'head_dim': None,
    'layers': 'stage',
    'experts': None,  # replicated: there is no mesh axis for experts
    'norm': None,
    'vocab': 'tensor',
    'positions': None,
    'embed': ('fsdp', 'context'),
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
  stage: int = 1  # groups of devices with different layers, through which microbatches pass; see layers/pipeline.py
  repeats: int = 1  # groups of layers of a stage; with more, stages idle for less and exchange weights once a step
  context: int = 1  # devices that split the length of rows, and the weights
  context_attention: str = 'all_gather'  # how queries meet all keys: all_gather, or ring, which holds a share at a time
  rules: tuple[str, ...] = ()  # changes of base.sharding.RULES: 'mlp=fsdp', 'embed=data+fsdp' or 'act_stream=none'
  offload: str = 'none'  # kept in the host's memory between steps: none, optimizer (its state) or all (weights too)
  dcn_data: int = 1  # the factor of `data` that goes over the network between slices or hosts; see base/networks.py
  dcn_fsdp: int = 1  # the factor of `fsdp` that does; where both are 1, `data` goes over slices if it can, else `fsdp`

  @property
  def sizes(self) -> tuple[int, ...]:
    return tuple(getattr(self, name) for name in MESH_AXES)

  def __post_init__(self) -> None:
    sizes = self.sizes
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
      raise ValueError(f'{", ".join(MESH_AXES)} must be positive, with at most one -1 for "the rest"; got '
                       f'{", ".join(map(str, sizes))}')
    if self.context < 1:  # rows are split over it before the devices are known
      raise ValueError(f'context must be a number of devices; got {self.context}')
    if self.context_attention not in CONTEXT_ATTENTION:
      raise ValueError(f'context_attention must be one of {", ".join(CONTEXT_ATTENTION)}; got '
                       f'{self.context_attention!r}')
    if min(self.dcn_data, self.dcn_fsdp) < 1:
      raise ValueError(f'dcn_data and dcn_fsdp must be at least 1; got {self.dcn_data} and {self.dcn_fsdp}')
    few, many = sorted((self.repeats, self.stage))
    if self.repeats < 1 or (self.repeats > 1 and (self.stage < 2 or many % few)):  # otherwise all weights are gathered
      raise ValueError('repeats must be 1, or a divisor or multiple of stage, which must be at least 2; got '
                       f'{self.repeats} and {self.stage}')
    if self.offload not in OFFLOADS:
      raise ValueError(f'offload must be one of {", ".join(OFFLOADS)}; got {self.offload!r}')
    parse_rules(self.rules)


def parse_rules(changes: tuple[str, ...]) -> Rules:
  """RULES with these changes. Raises ValueError for names that do not exist."""
  rules = dict(RULES)
  for change in changes:
    axis, _, value = change.partition('=')
    names = () if value == 'none' else tuple(value.split('+'))
    if axis not in RULES or not set(names) <= set(MESH_AXES):
      raise ValueError(f"rules must be like 'mlp=tensor', 'embed=data+fsdp' or 'act_stream=none', with one of the axes "
                       f'{", ".join(RULES)} and mesh axes of {", ".join(MESH_AXES)}; got {change!r}')
    if axis in ('act_batch', 'act_shards'):
      raise ValueError(f'rules cannot change {axis}: rows are always sharded over {" and ".join(BATCH_AXES)}')
    rules[axis] = None if not names else names[0] if len(names) == 1 else names
  return rules


_in_use = contextvars.ContextVar[tuple[Rules, MeshConfig]]('in_use', default=(RULES, MeshConfig()))


@contextlib.contextmanager
def use_mesh(mesh: Mesh, config: MeshConfig) -> Iterator[None]:
  """Programs that are traced inside are sharded over the mesh by the config's rules."""
  token = _in_use.set((parse_rules(config.rules), config))
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _in_use.reset(token)


def current_rules() -> Rules:
  """Logical axis -> mesh axes, as the config in use has them."""
  return _in_use.get()[0]


def current_mesh_config() -> MeshConfig:
  """config.mesh of the config in use."""
  return _in_use.get()[1]


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh over all devices of the current target. Raises ConfigError where the sizes do not fit the device count."""
  devices = list(current_target().devices) if devices is None else devices
  sizes = list(config.sizes)
  known = math.prod(s for s in sizes if s != -1)
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(1, len(devices) // known)
  if math.prod(sizes) != len(devices):
    raise ConfigError(
        f'config.mesh: {" x ".join(MESH_AXES)} = {" x ".join(map(str, config.sizes))} does not cover the '
        f'{len(devices)} device(s) here; set sizes whose product is {len(devices)} (-1 takes the rest)')
  # Auto: the compiler propagates shardings. jax.make_mesh would default to explicit ones.
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  named = dict(zip(MESH_AXES, sizes, strict=True))
  ordered = over_networks(named, {'data': config.dcn_data, 'fsdp': config.dcn_fsdp}, devices)
  if ordered is not None:
    return Mesh(ordered, MESH_AXES, axis_types=auto)
  return jax.make_mesh(sizes, MESH_AXES, devices=devices, axis_types=auto)


def describe_mesh(mesh: Any) -> str:
  """The axes of a mesh with several devices: 'data 2 x fsdp 4'."""
  return ' x '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1) or 'of one device'


def logical_to_spec(axes: tuple[str | None, ...]) -> P:
  """The PartitionSpec of an array with these logical axes.

  Raises ValueError for unknown names and collisions, and ConfigError for collisions by config.mesh.rules.
  """
  spec, rules = [], current_rules()
  for axis in axes:
    if axis is not None and axis not in rules:
      raise ValueError(f'logical axis {axis!r} has no rule; known: {", ".join(rules)}')
    spec.append(None if axis is None else rules[axis])
  used = [m for entry in spec if entry is not None for m in ((entry,) if isinstance(entry, str) else entry)]
  if len(used) != len(set(used)):
    problem = f'logical axes {axes} map two dimensions to one mesh axis: {spec}'
    if rules != RULES:
      raise ConfigError(f'config.mesh.rules: {problem}; change another rule too')
    raise ValueError(problem)
  return P(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains an activation's sharding; no effect outside `jax.set_mesh`. Dimensions that do not divide stay whole."""
  mesh, spec = jax.sharding.get_abstract_mesh(), logical_to_spec(axes)
  if mesh.empty:
    return x
  fitting = [_fitting(_within(entry, mesh), size, mesh) for size, entry in zip(x.shape, spec, strict=True)]
  return jax.lax.with_sharding_constraint(x, P(*fitting))


def fitting_axes(axis: str, size: int, mesh: Any) -> Any:
  """The mesh axes of a logical axis, or None if a dimension of this size does not divide over them."""
  return _fitting(_within(current_rules()[axis], mesh), size, mesh)


def shared_inside(axis: str, size: int) -> Any:
  """The mesh axes over which devices share a dimension of a logical axis inside jax.shard_map; None: none."""
  mesh = jax.sharding.get_abstract_mesh()
  entry = fitting_axes(axis, size, mesh) if not mesh.empty and mesh.manual_axes else None
  return entry if num_shards(entry, mesh) > 1 else None


def auto_axes(mesh: Any) -> frozenset[str]:
  """The axes of a mesh that the compiler handles."""
  return frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)


def _within(entry: Any, mesh: Any) -> Any:
  """The axes of an entry that the compiler handles; others, inside jax.shard_map, have been split already."""
  in_order = (entry,) if isinstance(entry, str) else entry or ()
  names = tuple(name for name in in_order if name not in mesh.manual_axes)
  return None if not names else names[0] if len(names) == 1 else names


def batch_axes(mesh: Any) -> tuple[str, ...]:
  """The axes over which the compiler shards the rows of a batch, here."""
  return tuple(name for name in BATCH_AXES if name not in getattr(mesh, 'manual_axes', ()))


def _fitting(entry: Any, size: int, mesh: Any) -> Any:
  return entry if size % num_shards(entry, mesh) == 0 else None


_in_shards: contextvars.ContextVar[bool] = contextvars.ContextVar('in_shards', default=False)


@contextlib.contextmanager
def weights_in_shards() -> Iterator[None]:
  """What is traced inside gathers no weights: of few tokens, products and their sums are smaller than weights."""
  token = _in_shards.set(True)
  try:
    yield
  finally:
    _in_shards.reset(token)


def beside_weights(x: jax.Array, *axes: str | None) -> jax.Array:
  """x, sharded like the weights that it is multiplied with if those stay in shards: devices add parts of the sum."""
  return constrain(x, *axes) if _in_shards.get() else x


def gathered(w: jax.Array, axes: tuple[str, ...], backward: bool = False) -> jax.Array:
  """A weight with these logical axes, whole where it is sharded only to save memory; no effect outside a mesh.

  A gather runs while the product before it is computed. On TPUs, weights that a layer needs before its first product
  stay sharded: the compiler passes their shards around a ring while it multiplies. They are those of keys and values,
  and in the backward pass the last matrix of the feed-forward layer. With a tensor axis these rings send more than
  they hide (compiled for 16 v5e chips, docs/scaling.md).
  """
  if _in_shards.get():
    return w
  rules = current_rules()
  first = 'kv_heads' in axes or (backward and axes[0] == 'mlp')
  if first and platform() == 'tpu' and jax.sharding.get_abstract_mesh().shape.get('tensor', 1) == 1:
    return w
  return constrain(w, *(None if _names(rules[axis]) <= set(SHARD_AXES) else axis for axis in axes))


def num_shards(entry: str | tuple[str, ...] | None, mesh: Any) -> int:
  """The number of devices along the mesh axes of an entry of a PartitionSpec."""
  return math.prod(mesh.shape[name] for name in _names(entry))


def _names(entry: str | tuple[str, ...] | None) -> set[str]:
  return set() if entry is None else {entry} if isinstance(entry, str) else set(entry)


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
  """Rows are sharded over data, stage and fsdp; other dimensions are whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def num_batch_shards(mesh: Any) -> int:
  """The number of shards of a batch's rows."""
  return num_shards(batch_axes(mesh), mesh)


def num_length_shards(length: int) -> int:
  """The number of shards of rows of this length over the mesh axis `context`; 1 if no multiple of twice that."""
  mesh: Any = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape.get('context', 1)
  return parts if length % (2 * parts) == 0 else 1


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
