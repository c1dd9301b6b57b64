"""TrainState, its birth, and one step of training and evaluation: pure functions, compiled elsewhere."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.base.batch import Batch, Metrics, Params
from llm_jax.base.sharding import check_divisible, constrain, logical_to_spec
from llm_jax.layers.clock import clock_at
from llm_jax.layers.linear import info_of
from llm_jax.losses.objective import Objective
from llm_jax.optim.chain import Optimizer

NEXT_TOKEN = Objective()


@flax.struct.dataclass
class TrainState:
  """Everything that changes during training, and nothing else. Arrays only."""

  step: jax.Array  # int32: completed updates
  params: Params
  opt_state: optax.OptState


def init_state(key: jax.Array, example: Batch, *, model: Any, tx: optax.GradientTransformation) -> TrainState:
  """A fresh state. Pure; `example` lends its shapes only."""
  params = nn.unbox(model.init(key, example)['params'])
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def param_shardings(example: Batch, mesh: Mesh, *, model: Any) -> tuple[Params, Params]:
  """(abstract parameters, their NamedShardings by logical axes).

  Raises ConfigError where a dimension does not divide over its mesh axis.
  """
  boxed = jax.eval_shape(model.init, jax.random.key(0), example)['params']
  abstract = nn.unbox(boxed)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, logical_to_spec(spec)), nn.get_partition_spec(boxed),
                           is_leaf=lambda s: isinstance(s, P))
  check_divisible(abstract, shardings)
  return abstract, shardings


def param_info(example: Batch, *, model: Any) -> Params:
  """A tree of ParamInfo: logical axes, shape and roles of every parameter."""
  boxed = jax.eval_shape(model.init, jax.random.key(0), example)['params']
  return jax.tree.map(info_of, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def state_shardings(example: Batch, mesh: Mesh, *, model: Any, tx: Optimizer) -> Any:
  """A TrainState of NamedShardings: optimizer state lies like its parameter, the rest whole on each device."""
  abstract, params = param_shardings(example, mesh, model=model)
  by_path = {path: (leaf.shape, sharding) for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(params), strict=True)}
  replicated: Any = NamedSharding(mesh, P())

  def sharding_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    # A moment is found below the path of its parameter, whatever wraps it. (optax.tree_map_params cannot look into
    # transformations that were told each parameter's role.)
    names = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    shape, sharding = by_path.get(tuple(names)[::-1], (None, replicated))
    if shape == leaf.shape[1:]:  # several of them, as a moving average keeps
      return NamedSharding(mesh, P(None, *sharding.spec))
    return sharding if shape == leaf.shape else replicated

  opt_state = jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(tx.init, abstract))
  return TrainState(replicated, params, opt_state)


def abstract_state(example: Batch, shardings: TrainState, *, model: Any, tx: Optimizer) -> TrainState:
  """The state as ShapeDtypeStructs that lie as `shardings` says."""
  state = jax.eval_shape(lambda key: init_state(key, example, model=model, tx=tx), jax.random.key(0))
  return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings)


def train_step(state: TrainState, batch: Batch, *, model: Any, tx: Optimizer, seed: int, num_microbatches: int = 1,
               objective: Objective = NEXT_TOKEN, frozen: Params = None) -> tuple[TrainState, Metrics]:
  """One optimizer update. The same state, batch and seed give the same result.

  It descends on the objective, plus what modules sow into `losses`, whatever the number of microbatches; one that is
  not row_wise needs the whole batch. `frozen` are the parameters of its teacher. The metric `loss` is what the
  losses log as theirs (-log p(target) of the next token), `extra_loss` all the rest. What modules sow into `metrics` is
  averaged and logged. An objective, or a gradient's square, that is not finite leaves params and opt_state as they
  were, and counts in the metric `skipped`.
  """
  share, counts = 1 / num_microbatches, objective.counts(batch)
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def objective_of(module: Any, microbatch: Batch) -> tuple[jax.Array, Metrics]:
    return objective.train(module, microbatch, counts, frozen, share)

  def loss_fn(params: Params, microbatch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
    with clock_at(state.step):
      (value, metrics), sown = model.apply({'params': params}, microbatch, rngs={'dropout': key},
                                           mutable=['losses', 'metrics'], method=objective_of)
    each = share / objective.num_readouts
    sown_loss = each * sum(map(jnp.sum, jax.tree.leaves(sown.get('losses', {}))), jnp.zeros(()))
    logged: Metrics = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown.get('metrics', {})):
      for name, value_of in _by_layer(path, leaf):
        logged[name] = logged.get(name, 0.0) + each * value_of
    return value + sown_loss, metrics | {'extra_loss': metrics['extra_loss'] + sown_loss} | logged

  grads, metrics = accumulate(jax.grad(loss_fn, has_aux=True), state.params, batch, key, num_microbatches)
  # Decided before the update, which then writes in place: every link in optim.TRANSFORMS keeps finite what is finite
  # in the square.
  squares = optax.tree.norm(grads, squared=True)
  finite = jnp.isfinite(metrics['loss'] + metrics['extra_loss']) & jnp.isfinite(squares)

  def update(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
    updates, opt_state = tx.update(grads, opt_state, params, value=metrics['loss'], grad=grads)
    return optax.apply_updates(params, updates), opt_state

  params, opt_state = jax.lax.cond(finite, update, lambda *state: state, state.params, state.opt_state)
  metrics |= tx.report(opt_state) | {
      'grad_norm': jnp.sqrt(squares), 'learning_rate': tx.schedule(state.step),
      'num_tokens': objective.num_tokens(batch), 'skipped': 1 - finite.astype(jnp.int32)}
  return TrainState(state.step + 1, params, opt_state), metrics


def accumulate(grad_fn: Any, params: Params, batch: Batch, key: jax.Array,
               num_microbatches: int) -> tuple[Params, Metrics]:
  """Sums grad_fn(params, microbatch, key) over the microbatches, one after the other in memory."""
  if num_microbatches == 1:
    return grad_fn(params, batch, key)

  def split(x: jax.Array) -> jax.Array:
    # Microbatch i takes rows i, i + m, ...: every device keeps its own rows, none cross the mesh.
    x = jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)
    return constrain(x, None, 'act_batch', *(None,) * (x.ndim - 2))

  def body(total, xs):
    return jax.tree.map(jnp.add, total, grad_fn(params, *xs)), None

  keys = jax.random.split(key, num_microbatches)
  xs = (jax.tree.map(split, batch), keys)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                       jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], xs)))
  return jax.lax.scan(body, zeros, xs)[0]


def eval_step(params: Params, batch: Batch, *, model: Any, token_bytes: jax.Array,
              objective: Objective = NEXT_TOKEN) -> Metrics:
  """Sums over a batch, 'NAME/...' of each loss, so that any split of a data set adds up to the same."""
  return model.apply({'params': params}, batch,
                     method=lambda module, batch: objective.score(module, batch, token_bytes))


def _by_layer(path: Any, leaf: jax.Array) -> list[tuple[str, jax.Array]]:
  """(name, scalar) of what a module sowed: NAME/00, NAME/01 of what has one value a layer."""
  name = '/'.join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
  return [(f'{name}/{i:02}', x) for i, x in enumerate(leaf)] if leaf.ndim == 1 else [(name, jnp.mean(leaf))]
