"""Program: everything needed to train a stage: data, model, objective, optimizer and compiled programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.base.batch import Batch, Params
from llm_jax.base.errors import ConfigError
from llm_jax.base.host_memory import fetched, on_devices
from llm_jax.base.multihost import in_turn
from llm_jax.base.sharding import batch_sharding, local_rows, num_batch_shards
from llm_jax.base.trees import merge
from llm_jax.config import Config
from llm_jax.data import pipeline
from llm_jax.data.config import DataConfig
from llm_jax.data.open import Data, open_data
from llm_jax.data.rows.tasks import Features
from llm_jax.data.sources.corpus import key_of
from llm_jax.infer.score import Evaluator, make_evaluator
from llm_jax.losses.config import make_objective
from llm_jax.losses.metrics import make_metrics
from llm_jax.losses.objective import Objective
from llm_jax.models.protocol import LanguageModel
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import Optimizer, as_optimizer, make_optimizer
from llm_jax.optim.groups import trainable_paths
from llm_jax.training.custom import Custom
from llm_jax.training.estimate import warn_if_too_large
from llm_jax.training.flops import flops_per_token
from llm_jax.training.log import PackedMetrics, pack_metrics
from llm_jax.training.memory import fit_memory
from llm_jax.training.resolve import (
  check_features,
  check_microbatches,
  check_results,
  resolve,
  with_constants,
  with_logits,
  without_masks,
)
from llm_jax.training.shardings import abstract_state, boxed_params, offloaded, param_info, shardings_of
from llm_jax.training.stages import Stage, fingerprint_of
from llm_jax.training.state import TrainState, init_state, train_step


@dataclasses.dataclass(frozen=True)
class Program:
  """A stage ready to be trained. All values of its config are resolved."""

  stage: Stage
  data: Data
  model: LanguageModel
  objective: Objective
  tx: Optimizer
  is_trainable: Callable[[tuple], bool]  # of a parameter's path
  constants: Params  # frozen arrays of losses by name, arguments of `step`
  info: Params  # a tree of ParamInfo
  abstract: TrainState  # of ShapeDtypeStructs, with shardings
  shardings: TrainState
  rows: np.ndarray  # indices of this process's rows in each batch
  held_rows: int  # rows on a device at a time
  num_microbatches: int
  init: Callable[[], TrainState]
  step: Callable[[TrainState, Batch, Params], tuple[TrainState, PackedMetrics]]
  evaluator: Evaluator
  evaluated: Callable[[Any, Params], Params]  # (opt_state, trainable) -> the trainable weights to evaluate
  flops_per_token: float
  fingerprint: dict  # of the data

  @property
  def config(self) -> Config:
    return self.stage.config

  @property
  def state_key(self) -> str:
    """A hash of the paths and shapes of the optimizer's state."""
    return key_of([[jax.tree_util.keystr(path), leaf.shape] for path, leaf
                   in jax.tree_util.tree_leaves_with_path(self.abstract.opt_state)])

  def weights(self, state: TrainState) -> Params:
    """The parameters to evaluate, sample from and export."""
    return on_devices(merge(self.evaluated(state.opt_state, state.trainable), state.frozen))


def build_program(stage: Stage, workdir: Path, mesh: Mesh, custom: Custom) -> Program:
  """Builds the program of a stage, under its mesh. Raises UserErrors."""
  num_shards = num_batch_shards(mesh)
  stage.config.split_batch(num_shards)  # to report an error before the data are read
  config, batches = stage.config, custom.batches
  data = open_together(config.data) if batches is None else batches.data(config.model.vocab_size)
  config = resolve(config, data)
  config, constants = with_constants(config, data, mesh)
  objective = make_objective(config.loss, custom.loss_terms, make_metrics(config.eval.metrics, config.eval.sections),
                             constants)
  model = make_model(config.model, objective.heads, objective.num_weights, custom.model)
  config = without_masks(config, model)
  features = example_features(config.data, data) if batches is None else batches.row()
  check_features(config, model, objective, features)
  example, batch = pipeline.example_batch(config.data), pipeline.abstract_batch(features, config.rows_per_batch)
  config = with_logits(config, data, model, example)

  boxed = boxed_params(example, model=model)
  info = param_info(boxed)
  tx, is_trainable = build_optimizer(config, info, custom)
  abstract = offloaded(abstract_state(boxed, mesh, tx=tx, is_trainable=is_trainable), config.mesh.offload)
  shardings = shardings_of(abstract)
  check_results(config, data, model, objective, abstract.params, batch)
  arrays = {name: constant.arrays for name, constant in constants.items()}
  # Cached, so that a step that was compiled to measure its memory is not compiled again.
  make_step = functools.cache(partial(jit_step, config, mesh, shardings, arrays, model=model, tx=tx,
                                      objective=objective))
  config = fit_memory(config, num_shards, workdir, compile_step=lambda num_microbatches: make_step(
      num_microbatches).lower(abstract, batch, arrays).compile())
  held_rows, num_microbatches = config.split_batch(num_shards)
  warn_if_too_large(config, abstract, mesh, num_microbatches)
  check_microbatches(config, objective, num_microbatches, num_shards)
  stage = dataclasses.replace(stage, config=config, end=stage.end if config.stages else config.num_steps)
  init = jax.jit(partial(init_state, model=model, tx=tx, is_trainable=is_trainable), out_shardings=shardings)
  average = jax.jit(lambda *args: tx.evaluated(*fetched(args)), out_shardings=shardings.trainable)
  return Program(
      stage, data, model, objective, tx, is_trainable, arrays, info, abstract, shardings,
      local_rows(mesh, config.rows_per_batch), held_rows, num_microbatches,
      init=lambda: init(jax.random.key(config.seed), example),
      step=make_step(num_microbatches), evaluator=make_evaluator(config, data, model, objective, mesh),
      evaluated=average if tx.averages else lambda _, trainable: trainable,
      flops_per_token=(flops_per_token(config, model, abstract.params, batch)
                       + sum(constant.flops_per_token for constant in constants.values())),
      fingerprint=fingerprint_of(stage, data))


def example_features(config: DataConfig, data: Data) -> Features:
  """The features of one row. Raises ConfigError for settings that contradict each other."""
  store = next(iter((data.val or data.train).values()))
  return pipeline.open_examples(config, data, store, train=False).make(0, np.random.default_rng(0))


def build_optimizer(config: Config, info: Params, custom: Custom) -> tuple[Optimizer, Callable[[tuple], bool]]:
  """(the optimizer of the trainable parameters, whether a path is one of them). Raises ConfigError."""
  groups = config.optim.groups
  try:
    is_trainable = trainable_paths(groups, info)
  except ValueError as e:
    raise ConfigError(f'config.optim.{e}') from None
  if custom.tx is None:
    return make_optimizer(config.optim, config.num_steps, info), is_trainable
  if any(not group.frozen or group.layers is not None for group in groups.values()):
    raise ConfigError('config.optim.groups: with an optimizer passed from Python, groups can only freeze whole '
                      'parameters; put factors into your optimizer (optax.multi_transform)')
  return as_optimizer(custom.tx), is_trainable


def open_together(config: DataConfig) -> Data:
  """Opens the data on all processes after process 0 has prepared them. Raises UserErrors."""
  return in_turn(lambda: open_data(config))


def jit_step(config: Config, mesh: Mesh, shardings: TrainState, constants: Params, num_microbatches: int,
             **parts: Any) -> Any:
  """The jitted step (state, batch, constants) -> (state, PackedMetrics); the state is donated."""
  def step(state: TrainState, batch: Batch, constants: Params) -> tuple[TrainState, PackedMetrics]:
    state = offloaded(state, config.mesh.offload)
    state, metrics = train_step(state, batch, seed=config.seed, num_microbatches=num_microbatches,
                                constants=constants, **parts)
    return state, pack_metrics(metrics)

  constant_shardings = jax.tree.map(lambda x: x.sharding, constants)
  return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh), constant_shardings),
                 out_shardings=(shardings, shardings.step), donate_argnums=0)
