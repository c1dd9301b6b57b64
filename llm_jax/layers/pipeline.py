"""Layers split over the mesh axis `stage`, through which the rows of a batch pass as microbatches (arXiv 1811.06965).

Each stage holds consecutive layers. At each tick it runs them on one microbatch and sends the result to the next stage.
The backward pass is the derivative of the loop over ticks, which passes through the stages in reverse.

Outside the layers, `stage` is one more axis over which rows are split. A microbatch starts on the device that holds its
rows and moves to the first stage while those before it enter; its result moves back in the same way.

Dims: S stages, L layers of a stage, M microbatches of a device's own rows (S * M pass through), B rows of a microbatch.
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
from llm_jax.base.sharding import batch_axes, num_batch_shards

# (layers, x, other arrays of the same rows, number of the microbatch or None) -> (x, sown)
Run = Callable[[Any, jax.Array, Any, jax.Array | None], tuple[jax.Array, Any]]

_num_microbatches: contextvars.ContextVar[int] = contextvars.ContextVar('num_microbatches', default=1)


def num_stages(mesh: Any) -> int:
  """The size of the mesh axis `stage`; 1 without a mesh."""
  return 1 if mesh.empty else mesh.shape['stage']


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


def in_stages(run: Run, layers: Any, x: jax.Array, rest: Any, period: int = 1) -> tuple[jax.Array, Any]:
  """run(layers, x, rest, None), where the mesh has stages by a pipeline.

  Leaves of `layers` and of what is sown are [layers, ...], those of x and `rest` [rows, ...]. Values sown are averaged
  over microbatches. Rows that do not divide over the devices are not split. Raises ConfigError if stages would not have
  equal layers, which alternate with this period.
  """
  mesh: Any = jax.sharding.get_abstract_mesh()
  S, num_rows = num_stages(mesh), x.shape[0]
  if S == 1 or num_rows % num_batch_shards(mesh):
    return run(layers, x, rest, None)
  num_layers = jax.tree.leaves(layers)[0].shape[0]
  if num_layers % (S * period):
    kinds = f' of {period} kinds in turn' if period > 1 else ''
    raise ConfigError(f'config.mesh.stage: {num_layers} layers{kinds} do not divide over {S} stages; set a '
                      f'config.model.num_layers that is a multiple of {S * period}')
  M = math.gcd(_num_microbatches.get(), num_rows // num_batch_shards(mesh))
  pipeline = jax.shard_map(partial(_of_stage, run, S), in_specs=P('stage'), out_specs=P('stage'),
                           axis_names={'stage'}, check_vma=False)
  out_SMB, sown = pipeline(layers, *jax.tree.map(partial(_cut, mesh, M), (x, rest)))
  return _join(mesh, out_SMB), sown


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
  """What one stage does: (the results of its own rows [1, M, B, ...], what its layers sow [L, ...])."""
  stage, M = jax.lax.axis_index('stage'), x_1MB.shape[1]
  inputs = jax.tree.map(lambda a: a[0], (x_1MB, rest_1MB))
  send = partial(jax.lax.ppermute, axis_name='stage')
  onward, back = [(i, (i + 1) % S) for i in range(S)], [(i, (i - 1) % S) for i in range(S)]

  def tick(carry: Any, t: jax.Array) -> tuple[Any, Any]:
    inputs, outputs, at_work = carry
    entering = jax.tree.map(lambda a: _at(a, t % M), inputs)
    inputs = jax.tree.map(lambda a, own: _put(a, send(own, perm=back), t % M), inputs, entering)
    x, rest = jax.tree.map(partial(jnp.where, stage == 0), entering, at_work)
    y, sown = run(layers, x, rest, t - stage)
    # A place of `outputs` is complete after S results; those that the first ticks write in it leave it before.
    done = (t - (S - 1)) % M
    outputs = _put(outputs, jnp.where(stage == S - 1, y, send(_at(outputs, done), perm=back)), done)
    return (inputs, outputs, jax.tree.map(partial(send, perm=onward), (y, rest))), sown

  # Until its first microbatch arrives, a stage runs on rows of its own, whose results and gradients are not used.
  start = inputs, jnp.zeros_like(inputs[0]), jax.tree.map(lambda a: a[0], inputs)
  (_, outputs, _), sown = jax.lax.scan(tick, start, jnp.arange(S * M + S - 1))
  own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, stage, S * M).mean(axis=0), sown)
  return outputs[None], own


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: jax.Array, y: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, y, i, 0)
