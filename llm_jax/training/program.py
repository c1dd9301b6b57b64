"""All that a stage trains with, made before its first step: data, model, optimizer, compiled steps."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import multihost

from llm_jax.base.batch import Batch, Params
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import batch_sharding, local_rows, num_batch_shards
from llm_jax.config import Config, replace
from llm_jax.data import pipeline
from llm_jax.data.config import DataConfig
from llm_jax.data.open import Data, data_fingerprint, open_data
from llm_jax.data.sources.corpus import key_of
from llm_jax.infer.load import Run, abstract_batch, build_model, example_batch, gather, load_teacher, make_evaluator
from llm_jax.losses.config import make_objective
from llm_jax.optim.chain import Optimizer, make_optimizer
from llm_jax.training.log import Packed, pack
from llm_jax.training.memory import fit_memory
from llm_jax.training.resolve import check_features, check_results, complete
from llm_jax.training.stages import Plan
from llm_jax.training.state import TrainState, abstract_state, init_state, param_info, state_shardings, train_step


@dataclasses.dataclass(frozen=True)
class Parts:
  """What make_parts makes."""

  stage: Plan  # nothing in its config is left open
  data: Data
  model: Any
  tx: Optimizer
  teacher: Run | None
  abstract: TrainState  # of ShapeDtypeStructs, with shardings
  shardings: TrainState
  rows: np.ndarray  # indices, of each batch, those of this process
  held_rows: int  # on a device at a time
  num_microbatches: int
  init: Callable[[], TrainState]
  step: Callable[[TrainState, Batch, Params], tuple[TrainState, Packed]]
  evaluator: Callable[..., tuple[dict, dict]]
  evaluated: Callable[[Any, Params], Params]  # (opt_state, params) -> the weights to evaluate
  fingerprint: dict  # of the data

  @property
  def config(self) -> Config:
    return self.stage.config

  @property
  def frozen(self) -> Params:
    return self.teacher and self.teacher.params

  @property
  def state_key(self) -> str:
    """Of the arrays that the optimizer keeps."""
    return key_of([[jax.tree_util.keystr(path), leaf.shape] for path, leaf
                   in jax.tree_util.tree_leaves_with_path(self.abstract.opt_state)])


def make_parts(stage: Plan, workdir: Path, mesh: Mesh) -> Parts:
  """The parts of a stage, under its mesh. Raises UserErrors."""
  config = stage.config
  num_shards, num_rows = num_batch_shards(mesh), config.rows_per_batch
  config.split_batch(num_shards)  # an error is better told now
  data = opened(config.data)
  config = complete(config, data)
  if config.num_epochs:
    [rows_of_all] = map(len, pipeline.train_sources(config.data, data).values())
    config = replace(config, num_steps=math.ceil(config.num_epochs * rows_of_all / num_rows), num_epochs=0.0)
    stage = dataclasses.replace(stage, end=config.num_steps)
  if len(set(gather(config.model.dtype))) > 1:
    raise ConfigError('config.model.dtype: auto means another dtype on each of these machines; set one')
  teacher = load_teacher(config, data, mesh)
  config = with_teacher(config, teacher)
  objective = make_objective(config.loss, teacher and teacher.model)
  frozen = teacher and teacher.params
  model, example = build_model(config), example_batch(config)
  examples = pipeline.open_examples(config.data, data, next(iter(data.val.values())), train=False)
  check_features(config, model, examples)

  tx = make_optimizer(config.optim, config.num_steps, param_info(example, model=model))
  shardings = state_shardings(example, mesh, model=model, tx=tx)
  abstract = abstract_state(example, shardings, model=model, tx=tx)
  batch = abstract_batch(examples, num_rows)
  check_results(config, data, model, abstract.params, batch, (*config.eval.asks, *tx.asks))
  # Cached, so that a step compiled to see what it needs is not compiled again to run.
  make_step = functools.cache(partial(jit_step, config, mesh, shardings, frozen, model=model, tx=tx,
                                      objective=objective))
  config = fit_memory(config, num_shards, workdir, compile_step=lambda num_microbatches: make_step(
      num_microbatches).lower(abstract, batch, frozen).compile())
  held_rows, num_microbatches = config.split_batch(num_shards)
  if num_microbatches > 1 and not objective.row_wise:
    raise ConfigError(f'config.tokens_per_device: {config.tokens_per_device} cuts a batch into {num_microbatches}, '
                      f'and config.loss (terms={", ".join(config.loss.terms)}, balance={config.loss.balance}) needs '
                      f'all of its rows at once; set {num_rows // num_shards * config.data.seq_len} or smaller batches')

  fingerprint = data_fingerprint(config.data, data, num_rows, config.seed)
  if stage.begin:
    fingerprint['first_row'] = stage.rows_at(stage.begin)
  if any(theirs != json.loads(json.dumps(fingerprint)) for theirs in gather(fingerprint)):
    raise ConfigError('config.data: the processes do not see the same data; share a cache (config.data.cache_dir), '
                      'or give every host the same files and versions')
  init = jax.jit(partial(init_state, model=model, tx=tx), out_shardings=shardings)
  return Parts(
      dataclasses.replace(stage, config=config), data, model, tx, teacher, abstract, shardings,
      local_rows(mesh, num_rows), held_rows, num_microbatches,
      init=lambda: init(jax.random.key(config.seed), example),
      step=make_step(num_microbatches),
      evaluator=make_evaluator(config, data, model, mesh),
      evaluated=jax.jit(tx.evaluated, out_shardings=shardings.params) if tx.averages else lambda _, params: params,
      fingerprint=fingerprint)


def opened(config: DataConfig) -> Data:
  """The data: made by process 0, then opened by all. Raises UserErrors."""
  data = None
  try:
    if jax.process_index() == 0:
      data = open_data(config)
  finally:  # also after an error, which the others then meet themselves instead of waiting
    barrier('data')
  return data or open_data(config)


def with_teacher(config: Config, teacher: Run | None) -> Config:
  """The config with the width of the teacher's hidden states, and the step that it stands at."""
  if teacher is None:
    return config
  learns = dataclasses.replace(config.loss.distillation, hidden_dim=teacher.config.model.embed_dim,
                               checkpoint=str(teacher.meta['step']))
  return dataclasses.replace(config, loss=dataclasses.replace(config.loss, distillation=learns))


def jit_step(config: Config, mesh: Mesh, shardings: TrainState, frozen: Params, num_microbatches: int,
             **parts: Any) -> Any:
  """The jitted (state, batch, frozen) -> (state, Packed metrics); the state is donated."""
  def step(state: TrainState, batch: Batch, frozen: Params) -> tuple[TrainState, Packed]:
    state, metrics = train_step(state, batch, seed=config.seed, num_microbatches=num_microbatches, frozen=frozen,
                                **parts)
    return state, pack(metrics)
  lies = jax.tree.map(lambda x: x.sharding, frozen)
  return jax.jit(step, in_shardings=(shardings, batch_sharding(mesh), lies),
                 out_shardings=(shardings, shardings.step), donate_argnums=0)


def barrier(name: str) -> None:
  """Waits for every process, however long: by the coordinator, as a collective may give up after 30 seconds."""
  multihost.get_barrier_sync_fn()(key=name, timeout_ms=24 * 60 * 60 * 1000)
