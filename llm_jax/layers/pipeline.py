"""Layers split over the mesh axis `stage`, through which the rows of a batch pass as microbatches (arXiv 1811.06965).

At each tick a stage runs a group of consecutive layers on one microbatch and sends the result to the next stage. With
config.mesh.repeats R, each stage has R groups, every S-th of the model (arXiv 2104.04473), and S microbatches at a time
go around R times, which leaves stages idle for less. The backward pass is the derivative of the loop over ticks, which
passes through the stages in reverse.

Outside the layers, `stage` is one more axis over which rows are split. A microbatch starts on the device that holds its
rows and moves to the first stage while those before it enter; its result moves back in the same way.

Dims: S stages, R repeats, L layers of a group, M microbatches of a device's own rows (S * M pass through), B rows of a
microbatch.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import batch_axes, current_mesh_config, num_batch_shards

# (layers by kind, x, other arrays of the same rows, number of the microbatch or None, select) -> (x, sown).
# select(layer) has the arrays of a layer at this tick. It is called inside what is recomputed, or else the weights of
# each tick would be kept.
Run = Callable[[Any, jax.Array, Any, jax.Array | None, Callable[[Any], Any]], tuple[jax.Array, Any]]

_num_microbatches: contextvars.ContextVar[int] = contextvars.ContextVar('num_microbatches', default=1)


def num_stages(mesh: Any) -> int:
  """The size of the mesh axis `stage`; 1 without a mesh."""
  return 1 if mesh.empty else mesh.shape.get('stage', 1)


def num_ticks(stages: int, repeats: int, number: int) -> int:
  """The ticks of a pass with `number` microbatches of each device's rows; the last stages - 1 fill and empty stages."""
  return stages * number * repeats + stages - 1


def describe_pipeline(stages: int, repeats: int, number: int) -> str:
  """What passes through the stages, and for how long they are idle; '' for one stage."""
  if stages == 1:
    return ''
  idle = (stages - 1) / num_ticks(stages, repeats, number)
  return (f'pipeline: {stages * number} microbatches through {stages} stages'
          + (f', {repeats} times' if repeats > 1 else '') + f', which are idle for {idle:.1%} of their time')


@contextlib.contextmanager
def microbatches(number: int) -> Iterator[int]:
  """A step that is traced inside has its batch in `number` microbatches on each device.

  Yields how many of them the step runs one after the other: all, or 1 if they pass through stages together.
  """
  staged = num_stages(jax.sharding.get_abstract_mesh()) > 1
  token = _num_microbatches.set(number if staged else 1)
  try:
    yield 1 if staged else number
  finally:
    _num_microbatches.reset(token)


def in_stages(run: Run, layers: list[Any], x: jax.Array, rest: Any) -> tuple[jax.Array, Any]:
  """run(layers, x, rest, None, identity), where the mesh has stages by a pipeline.

  `layers` has a tree for each kind, whose layers alternate. Its leaves and those of what is sown are [layers, ...],
  those of x and `rest` [rows, ...]. Values sown are averaged over microbatches. Rows that do not divide over the
  devices are not split. Raises ConfigError if stages would not have equal layers.
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  S, R, num_rows = num_stages(mesh), current_mesh_config().repeats, x.shape[0]
  if S == 1 or num_rows % num_batch_shards(mesh):
    return run(layers, x, rest, None, lambda layer: layer)
  period, of_kind = len(layers), jax.tree.leaves(layers)[0].shape[0]
  if of_kind % (S * R):
    kinds = f' of {period} kinds in turn' if period > 1 else ''
    groups = f'{S} stages' + (f' x {R} repeats' if R > 1 else '')
    raise ConfigError(f'config.mesh.stage: {period * of_kind} layers{kinds} do not divide over {groups}; set a '
                      f'config.model.num_layers that is a multiple of {S * R * period}')
  M = math.gcd(_num_microbatches.get(), num_rows // num_batch_shards(mesh))
  pipeline = jax.shard_map(partial(_of_stage, run, S), in_specs=(P(None, 'stage'), P('stage'), P('stage')),
                           out_specs=(P('stage'), P(None, 'stage')), axis_names={'stage'}, check_vma=False)
  out_SMB, sown = pipeline(jax.tree.map(partial(_grouped, R), layers),
                           *jax.tree.map(partial(_cut, mesh, M), (x, rest)))
  return _join(mesh, out_SMB), jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sown)


def _grouped(R: int, a: jax.Array) -> jax.Array:
  """Layers in R groups; constrained, so that neither weights nor gradients are gathered to change their places."""
  if R > 1:
    a = jax.lax.with_sharding_constraint(a, P('stage', *(P.UNCONSTRAINED,) * (a.ndim - 1)))
  return a.reshape(R, -1, *a.shape[1:])


def _cut(mesh: Any, M: int, x: jax.Array) -> jax.Array:
  """Rows as microbatches [S, M, B, ...]; no row moves to another device."""
  axes = batch_axes(mesh)
  parts = x.reshape(*(mesh.shape[name] for name in axes), M, -1, *x.shape[1:])
  parts = jnp.moveaxis(parts, (axes.index('stage'), len(axes)), (0, 1))
  return _placed(mesh, parts.reshape(mesh.shape['stage'], M, -1, *x.shape[1:]))


def _join(mesh: Any, x: jax.Array) -> jax.Array:
  """The inverse of _cut."""
  axes, sizes = batch_axes(mesh), [mesh.shape[name] for name in batch_axes(mesh) if name != 'stage']
  parts = _placed(mesh, x).reshape(*x.shape[:2], *sizes, -1, *x.shape[3:])
  parts = jnp.moveaxis(parts, (0, 1), (axes.index('stage'), len(axes)))
  rows = parts.reshape(-1, *x.shape[3:])
  return jax.lax.with_sharding_constraint(rows, P(axes, *(P.UNCONSTRAINED,) * (rows.ndim - 1)))


def _placed(mesh: Any, x: jax.Array) -> jax.Array:
  rows = tuple(name for name in batch_axes(mesh) if name != 'stage')
  return jax.lax.with_sharding_constraint(x, P('stage', None, rows or None, *(P.UNCONSTRAINED,) * (x.ndim - 3)))


def _of_stage(run: Run, S: int, layers: Any, x_1MB: jax.Array, rest_1MB: Any) -> tuple[jax.Array, Any]:
  """What one stage does: (the results of its own rows [1, M, B, ...], what its layers sow [R, L, ...])."""
  stage, M, R = jax.lax.axis_index('stage'), x_1MB.shape[1], jax.tree.leaves(layers)[0].shape[0]
  inputs = jax.tree.map(lambda a: a[0], (x_1MB, rest_1MB))
  layers = jax.tree.map(lambda a: a[0] if R == 1 else jnp.moveaxis(a, 0, 1), layers)
  send = partial(jax.lax.ppermute, axis_name='stage')
  onward, back = [(i, (i + 1) % S) for i in range(S)], [(i, (i - 1) % S) for i in range(S)]

  def tick(carry: Any, t: jax.Array) -> tuple[Any, Any]:
    inputs, outputs, at_work = carry
    repeat, number = _place(t - stage, S, R)

    def enter(inputs: Any) -> tuple[Any, Any]:
      place = _place(t, S, R)[1] % M
      own = jax.tree.map(lambda a: _at(a, place), inputs)
      return jax.tree.map(lambda a, own: _put(a, send(own, perm=back), place), inputs, own), own

    # A place of `outputs` is complete after S results; those that the first ticks write in it leave it before.
    def leave(outputs: jax.Array) -> jax.Array:
      place = _place(t - (S - 1), S, R)[1] % M
      return _put(outputs, jnp.where(stage == S - 1, y, send(_at(outputs, place), perm=back)), place)

    inputs, entering = _only(R, _place(t, S, R)[0] == 0, enter, lambda inputs: (inputs, at_work), inputs)
    x, rest = jax.tree.map(partial(jnp.where, (stage == 0) & (repeat == 0)), entering, at_work)
    y, sown = run(layers, x, rest, number, partial(jax.tree.map, lambda a: a if R == 1 else _at(a, repeat)))
    outputs = _only(R, _place(t - (S - 1), S, R)[0] == R - 1, leave, lambda outputs: outputs, outputs)
    return (inputs, outputs, jax.tree.map(partial(send, perm=onward), (y, rest))), sown

  # Until its first microbatch arrives, a stage runs on rows of its own, whose results and gradients are not used.
  start = inputs, jnp.zeros_like(inputs[0]), jax.tree.map(lambda a: a[0], inputs)
  (_, outputs, _), sown = jax.lax.scan(tick, start, jnp.arange(num_ticks(S, R, M)))
  numbers = jnp.arange(S * M)
  ticks_RM = stage + jnp.arange(R)[:, None] * S + (numbers // S * S * R + numbers % S)[None]
  return outputs[None], jax.tree.map(lambda a: a[ticks_RM].mean(axis=1), sown)


def _place(t: jax.Array, S: int, R: int) -> tuple[jax.Array, jax.Array]:
  """(repeat, microbatch) at work t ticks after the first one came."""
  turn = t % (S * R)
  return turn // S, t // (S * R) * S + turn % S


def _only(R: int, condition: jax.Array, f: Callable[[Any], Any], otherwise: Callable[[Any], Any], x: Any) -> Any:
  """f(x) under the condition, the same for all stages, which always holds if there is one repeat."""
  return f(x) if R == 1 else jax.lax.cond(condition, f, otherwise, x)


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: jax.Array, y: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
