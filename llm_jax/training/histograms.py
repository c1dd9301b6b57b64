"""Histograms of weights, gradients and updates by layer, and the sizes of updates beside those of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.base.batch import Batch, Params
from llm_jax.base.host_memory import fetched
from llm_jax.base.loggers import Histogram
from llm_jax.base.params import ParamInfo
from llm_jax.base.sharding import batch_sharding
from llm_jax.base.trees import by_name
from llm_jax.optim.chain import Optimizer
from llm_jax.training.state import TrainState, train_step

NUM_BINS = 32
Statistics = dict[str, dict[str, tuple[jax.Array, ...]]]  # by path and kind: the fields of Histogram, one per layer


class Histograms:
  """A callback that logs histograms at each step that is a multiple of `every` (0: never). No state is changed.

  It computes gradient and update of the newest batch once more, at the weights of the newest step, by the train step
  itself. For this time it needs memory for two more copies of the trained parameters.
  """

  def __init__(self, every: int):
    self._every = every
    self._program: Any = None

  def __call__(self, event: Any) -> None:
    if not self._every or event.step % self._every:
      return
    session = event.session
    with session.console.progress('computing histograms'):
      if self._program is not session.program:  # the first time, or another stage
        self._program = session.program
        self._info = by_name(session.program.info)
        self._compute = compile_statistics(session.program, self._info)
      found = jax.device_get(self._compute(session.state, session.batch, session.program.constants))
    histograms, ratios = dict[str, Histogram](), dict[str, float]()
    for path, kinds in found.items():
      for layer, name in enumerate(layer_names(path, self._info[path])):
        of_layer = {kind: Histogram(*(x[layer] for x in fields)) for kind, fields in kinds.items()}
        histograms |= {f'{kind}/{name}': histogram for kind, histogram in of_layer.items()}
        if is_matrix(self._info[path]) and of_layer['weights'].squares:
          ratio = np.sqrt(of_layer['updates'].squares / of_layer['weights'].squares)
          ratios[f'update_ratio/{name}'] = float(ratio)
    session.writer.histograms(session.step, histograms)
    session.writer.scalars(session.step, ratios)


def compile_statistics(program: Any, info: dict[str, ParamInfo]) -> Any:
  """The jitted function (state, batch, constants) -> Statistics of the trained parameters."""
  step = partial(train_step, model=program.model, tx=noting(program.tx), seed=program.config.seed,
                 num_microbatches=program.num_microbatches, objective=program.objective)

  def compute(state: TrainState, batch: Batch, constants: Params) -> Statistics:
    state = fetched(state)
    zeros = jax.tree.map(jnp.zeros_like, state.trainable)
    noted, _ = step(dataclasses.replace(state, opt_state=(state.opt_state, zeros, zeros)), batch, constants=constants)
    trees = {'weights': state.trainable, 'gradients': noted.opt_state[1], 'updates': noted.opt_state[2]}
    named = {kind: by_name(tree) for kind, tree in trees.items()}
    return {path: {kind: statistics(leaves[path] if is_stack(info[path]) else leaves[path][None])
                   for kind, leaves in named.items()} for path in named['weights']}

  mesh = program.shardings.step.mesh
  return jax.jit(compute, in_shardings=(program.shardings, batch_sharding(mesh), None),
                 out_shardings=program.shardings.step)


def noting(tx: Optimizer) -> Optimizer:
  """The optimizer with the state (state, gradients, updates), in which it notes what it gets and returns."""
  def update(grads: Params, state: Any, params: Params, **extra: Any) -> tuple[Params, optax.OptState]:
    updates, _ = tx.update(grads, state[0], params, **extra)
    return updates, (state[0], *(jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), tree, params)
                                 for tree in (grads, updates)))

  return Optimizer(tx.init, update)


def statistics(x: jax.Array) -> tuple[jax.Array, ...]:
  """The fields of Histogram for each layer of x [L, ...]: low and high [L], counts [L, NUM_BINS], sums [L]."""
  axes, x = tuple(range(1, x.ndim)), x.astype(jnp.float32)
  low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
  # Counts of values up to each edge: sums, which need no communication but their own between devices.
  below = jax.lax.map(lambda share: jnp.sum(x <= low + share * (high - low), axes, dtype=jnp.int32),
                      jnp.arange(1, NUM_BINS) / NUM_BINS)
  ends = jnp.zeros_like(below[:1]), jnp.full_like(below[:1], x[0].size)
  counts = jnp.diff(jnp.concatenate([ends[0], below, ends[1]]), axis=0).T
  return low.reshape(-1), high.reshape(-1), counts, x.sum(axes), jnp.square(x).sum(axes)


def is_stack(info: ParamInfo) -> bool:
  """Whether the first dimension is that of layers."""
  return info.axes[:1] == ('layers',)


def is_matrix(info: ParamInfo) -> bool:
  return len(info.axes) - len(info.batch) > 1


def layer_names(path: str, info: ParamInfo) -> Iterator[str]:
  """'blocks/attn/q/w/00', ... for each layer of a stack, else the path."""
  return (f'{path}/{i:02}' for i in range(info.shape[0])) if is_stack(info) else iter([path])
