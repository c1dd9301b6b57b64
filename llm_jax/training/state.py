"""TrainState, and the steps of training and evaluation: pure functions, compiled in program.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from llm_jax.base.batch import Batch, Metrics, Params
from llm_jax.base.host_memory import fetched
from llm_jax.base.trees import merge, split
from llm_jax.layers.clock import clock_at
from llm_jax.layers.pipeline import microbatches
from llm_jax.losses.objective import Objective
from llm_jax.models.protocol import LanguageModel
from llm_jax.optim.chain import as_optimizer
from llm_jax.optim.guard import guarded_update
from llm_jax.training.accumulate import accumulate, data_shards, sum_over_data

NEXT_TOKEN = Objective()


@flax.struct.dataclass
class TrainState:
  """Everything that changes during training, and the frozen parameters. Arrays only."""

  step: jax.Array  # int32: completed updates
  trainable: Params
  frozen: Params  # {} if all parameters are trained
  opt_state: optax.OptState  # of the trainable parameters

  @property
  def params(self) -> Params:
    return merge(self.trainable, self.frozen)


def init_state(key: jax.Array, example: Batch, *, model: LanguageModel, tx: optax.GradientTransformation,
               is_trainable: Callable[[tuple], bool] = lambda path: True) -> TrainState:
  """A fresh state. A pure function; only the shapes of `example` are used."""
  trainable, frozen = split(nn.unbox(model.init(key, example)['params']), is_trainable)
  return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))


def train_step(state: TrainState, batch: Batch, *, model: LanguageModel, tx: optax.GradientTransformation, seed: int,
               num_microbatches: int = 1, objective: Objective = NEXT_TOKEN,
               constants: Params = None) -> tuple[TrainState, Metrics]:
  """One optimizer update. The same state, batch and seed give the same result.

  It minimizes the objective plus the losses that modules sow into `losses`. The result does not depend on the number
  of microbatches, except that an objective that is not row_wise needs the whole batch. `constants` has the arrays of
  the objective's Constants. The metric `loss` is the sum of the terms' losses (-log p(target) for next_token),
  `extra_loss` the rest of the objective. Values sown into `metrics` are averaged and logged. If the objective or a
  gradient is not finite, only the step changes and the metric `skipped` is 1 (see optim/guard.py).
  """
  near = TrainState(state.step, fetched(state.trainable), fetched(state.frozen), state.opt_state)
  with microbatches(num_microbatches) as num_in_turn:
    grads, metrics = gradients(near, batch, model=model, seed=seed, num_microbatches=num_in_turn,
                               objective=objective, constants=constants)
  optimizer = as_optimizer(tx)
  trainable, opt_state, applied = guarded_update(optimizer, grads, state.opt_state, state.trainable,
                                                 loss=metrics['loss'], extra_loss=metrics['extra_loss'])
  metrics |= optimizer.report(opt_state) | optimizer.learning_rate(state.step) | applied | {
      'num_tokens': objective.num_tokens(batch)}
  return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics


def gradients(state: TrainState, batch: Batch, *, model: LanguageModel, seed: int, num_microbatches: int,
              objective: Objective, constants: Params) -> tuple[Params, Metrics]:
  """(gradients of the trainable parameters, metrics) of a step."""
  counts, num_shards = objective.counts(batch), data_shards(model, objective)
  share = 1 / num_microbatches / num_shards
  key = jax.random.fold_in(jax.random.key(seed), state.step)

  def objective_of(module: Any, microbatch: Batch) -> tuple[jax.Array, Metrics]:
    return objective.train(module, microbatch, counts, constants, share)

  def loss_fn(trainable: Params, microbatch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
    with clock_at(state.step):
      (value, metrics), sown = model.apply({'params': merge(trainable, state.frozen)}, microbatch,
                                           rngs={'dropout': key}, mutable=['losses', 'metrics'], method=objective_of)
    each = share / objective.num_readouts
    sown_loss = each * sum(map(jnp.sum, jax.tree.leaves(sown.get('losses', {}))), jnp.zeros(()))
    logged: Metrics = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(sown.get('metrics', {})):
      for name, value_of in _by_layer(path, leaf):
        logged[name] = logged.get(name, 0.0) + each * value_of
    return value + sown_loss, metrics | {'extra_loss': metrics['extra_loss'] + sown_loss} | logged

  def of_shard(trainable: Params, batch: Batch, key: jax.Array) -> tuple[Params, Metrics]:
    return accumulate(jax.grad(loss_fn, has_aux=True), trainable, batch, key, num_microbatches)

  if num_shards == 1:
    return of_shard(state.trainable, batch, key)
  return jax.shard_map(lambda *args: sum_over_data(of_shard(*args), model), in_specs=(P(), P('data'), P()),
                       out_specs=P(), axis_names={'data'}, check_vma=False)(state.trainable, batch, key)


def eval_step(params: Params, batch: Batch, *, model: LanguageModel, token_bytes: np.ndarray,
              objective: Objective = NEXT_TOKEN) -> Metrics:
  """Sums over a batch, NAME/... for each loss; they add up to the same total for any split of a data set."""
  return model.apply({'params': params}, batch,
                     method=lambda module, batch: objective.score(module, batch, jnp.asarray(token_bytes)))


def _by_layer(path: Any, leaf: jax.Array) -> list[tuple[str, jax.Array]]:
  """[(name, scalar)] of a sown value; NAME/00, NAME/01, ... if it has one value per layer."""
  name = '/'.join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
  return [(f'{name}/{i:02}', x) for i, x in enumerate(leaf)] if leaf.ndim == 1 else [(name, jnp.mean(leaf))]
