"""Where parameters and optimizer state are placed on the mesh, by the parameters' logical axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.base.batch import Batch, Params
from llm_jax.base.errors import ConfigError
from llm_jax.base.host_memory import into_host
from llm_jax.base.sharding import check_divisible, logical_to_spec
from llm_jax.base.trees import split
from llm_jax.layers.boxes import info_of
from llm_jax.models.protocol import LanguageModel
from llm_jax.training.state import TrainState


def boxed_params(example: Batch, *, model: LanguageModel) -> Params:
  """The abstract parameters in Flax's boxes, which hold logical axes and roles. Traces the model."""
  return jax.eval_shape(lambda example: model.init(jax.random.key(0), example), example)['params']


def abstract_params(boxed: Params, mesh: Mesh) -> Params:
  """The parameters as ShapeDtypeStructs with shardings by logical axes.

  A parameter without logical axes is sharded over fsdp along its largest divisible dimension. Raises ConfigError if a
  dimension with a logical axis does not divide over its mesh axes, or if the mesh has stages and the model no layers.
  """
  abstract = nn.unbox(boxed)

  def sharding(leaf: jax.ShapeDtypeStruct, spec: P) -> NamedSharding:
    known = len(spec) == leaf.ndim
    return NamedSharding(mesh, logical_to_spec(tuple(spec)) if known else largest_over_fsdp(leaf, mesh))

  shardings = jax.tree.map(sharding, abstract, nn.get_partition_spec(boxed))
  check_divisible(abstract, shardings)
  if mesh.shape['stage'] > 1 and not any(s.spec and s.spec[0] == 'stage' for s in jax.tree.leaves(shardings)):
    raise ConfigError("config.mesh.stage: the model's parameters have no layers that stages can share (axis `layers`); "
                      'set 1')
  return placed(abstract, shardings)


def largest_over_fsdp(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> P:
  """The spec of an array without logical axes: its largest divisible dimension over fsdp."""
  sizes = [size if size % mesh.shape['fsdp'] == 0 else 0 for size in leaf.shape]
  if mesh.shape['fsdp'] == 1 or leaf.ndim < 2 or not max(sizes):
    return P()
  return P(*('fsdp' if i == sizes.index(max(sizes)) else None for i in range(leaf.ndim)))


def param_info(boxed: Params) -> Params:
  """A tree of ParamInfo: logical axes, shape and roles of every parameter."""
  return jax.tree.map(info_of, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def abstract_state(boxed: Params, mesh: Mesh, *, tx: optax.GradientTransformation,
                   is_trainable: Callable[[tuple], bool] = lambda path: True) -> TrainState:
  """The state as ShapeDtypeStructs: optimizer state is sharded like its parameter, everything else is replicated."""
  trainable, frozen = split(abstract_params(boxed, mesh), is_trainable)
  by_path = {path: (leaf.shape, leaf.sharding) for path, leaf in jax.tree_util.tree_leaves_with_path(trainable)}
  replicated: Any = NamedSharding(mesh, P())

  def sharding_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    # The path of a moment ends with the path of its parameter, whatever wraps it. (optax.tree_map_params does not work
    # for transformations that hold trees of per-parameter settings.)
    names = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    shape, sharding = by_path.get(tuple(names)[::-1], (None, replicated))
    if shape == leaf.shape[1:]:  # a stack of past gradients, as a moving average keeps
      return NamedSharding(mesh, P(None, *sharding.spec))
    return sharding if shape == leaf.shape else replicated

  opt_state = jax.eval_shape(tx.init, split(nn.unbox(boxed), is_trainable)[0])
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  return TrainState(step, trainable, frozen, placed(  # type: ignore[arg-type]
      opt_state, jax.tree_util.tree_map_with_path(sharding_of, opt_state)))


def offloaded(state: TrainState, what: str) -> TrainState:
  """The state, abstract or traced, with what config.mesh.offload names in the host's memory; scalars stay."""
  opt_state = state.opt_state if what == 'none' else into_host(state.opt_state)
  trainable, frozen = (into_host(tree) if what == 'all' else tree for tree in (state.trainable, state.frozen))
  return TrainState(state.step, trainable, frozen, opt_state)


def placed(abstract: Any, shardings: Any) -> Any:
  """A tree of ShapeDtypeStructs with these shardings."""
  return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings)


def shardings_of(abstract: Any) -> Any:
  """The NamedShardings of a tree of ShapeDtypeStructs."""
  return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's shards of ShapeDtypeStructs with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
