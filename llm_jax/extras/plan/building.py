"""Builds a run's train step for a target without data, without weights and without the target's devices."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import make_mesh, num_batch_shards, use_mesh
from llm_jax.base.target import Target, compiling_for
from llm_jax.config import Config, replace
from llm_jax.data import pipeline
from llm_jax.data.open import Data, open_data
from llm_jax.data.stores.store import TokenStore
from llm_jax.losses.config import make_objective
from llm_jax.losses.metrics import make_metrics
from llm_jax.models.registry import make_model
from llm_jax.training.custom import Custom
from llm_jax.training.estimate import estimate
from llm_jax.training.flops import flops_per_token
from llm_jax.training.memory import needed
from llm_jax.training.program import build_optimizer, example_features, jit_step
from llm_jax.training.resolve import check_microbatches, resolve, with_logits, without_masks
from llm_jax.training.shardings import abstract_state, boxed_params, offloaded, param_info, shardings_of

PROCESS = 20_000_000  # bytes of threads and compiled code


@dataclasses.dataclass(frozen=True)
class Built:
  """The program of a run, as training/program.py builds it, of shapes alone."""

  config: Config  # resolved, but for tokens_per_device
  mesh: Mesh
  target: Target
  info: Any  # a tree of ParamInfo
  abstract: Any  # TrainState of ShapeDtypeStructs with shardings
  batch: Any
  make_step: Any  # num_microbatches -> the jitted step; None: build anew, as with another policy of remat
  objective: Any
  flops_per_token: float
  train_tokens: int  # of the training data; 0: unknown

  @property
  def num_shards(self) -> int:
    return num_batch_shards(self.mesh)

  def lower(self, num_microbatches: int) -> Any:
    """The step, lowered. Raises ConfigError."""
    check_microbatches(self.config, self.objective, num_microbatches, self.num_shards)
    with compiling_for(self.target), use_mesh(self.mesh, self.config.mesh):
      return self.make_step(num_microbatches).lower(self.abstract, self.batch, {})


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step."""

  memory: dict[str, int]  # bytes of a device
  text: str  # its optimized HLO
  lower_seconds: float
  compile_seconds: float


def build(config: Config, target: Target, *, read_data: bool) -> Built:
  """The program for the target. `read_data`: prepares the data as a run does. Raises UserErrors."""
  if target.devices[0].platform == 'cpu':  # which have one network, whatever they stand in for
    config = replace(config, mesh=dataclasses.replace(config.mesh, dcn_data=1, dcn_fsdp=1))
  mesh = make_mesh(config.mesh, list(target.devices))
  config.split_batch(num_batch_shards(mesh))
  data = open_data(config.data) if read_data or not stands_in(config) else stand_in(config)
  with compiling_for(target):
    config = resolve(config, data)
    if any(hasattr(term, 'teacher') for term in config.loss.sections.values()):
      raise ConfigError('config.loss: a step with a teacher cannot be planned')
    objective = make_objective(config.loss, {}, make_metrics(config.eval.metrics, config.eval.sections), {})
    model = make_model(config.model, objective.heads, objective.num_weights, None)
    config = without_masks(config, model)
    features = example_features(config.data, data)
    example = pipeline.example_batch(config.data)
    batch = pipeline.abstract_batch(features, config.rows_per_batch)
    config = with_logits(config, data, model, example)
    with use_mesh(mesh, config.mesh):
      boxed = boxed_params(example, model=model)
    info = param_info(boxed)
    tx, is_trainable = build_optimizer(config, info, Custom())
    with use_mesh(mesh, config.mesh):
      abstract = offloaded(abstract_state(boxed, mesh, tx=tx, is_trainable=is_trainable), config.mesh.offload)
      flops = flops_per_token(config, model, abstract.params, batch)
  step = partial(jit_step, config, mesh, shardings_of(abstract), {}, model=model, tx=tx, objective=objective)
  known = sum(len(store.tokens) for store in data.train.values()) if read_data or not stands_in(config) else 0
  return Built(config, mesh, target, info, abstract, batch, step, objective, flops, known)


def stands_in(config: Config) -> bool:
  """Whether the step can be built without reading data: all that it needs of them is the vocabulary's size."""
  return config.data.task == 'next_token' and config.model.vocab_size is not None and not config.num_epochs


def stand_in(config: Config) -> Data:
  """Data of one blank document with token ids of the model's vocabulary."""
  store = TokenStore(np.zeros(4 * config.data.seq_len, np.uint32), np.zeros(1, np.int64), '', 0.0,
                     vocab_size=config.model.vocab_size)
  return Data({'train': {'data': store}, 'val': {'data': store}}, None, config.model.vocab_size, 0, 0)


def compile_step(built: Built, num_microbatches: int) -> Compiled:
  """Compiles the step for the target."""
  began = time.perf_counter()
  lowered = built.lower(num_microbatches)
  traced = time.perf_counter()
  with compiling_for(built.target), use_mesh(built.mesh, built.config.mesh):
    compiled = lowered.compile()
  ended = time.perf_counter()
  return Compiled(memory_of(compiled, built, num_microbatches), compiled.as_text(), traced - began, ended - traced)


def memory_of(compiled: Any, built: Built, num_microbatches: int) -> dict[str, int]:
  """Bytes of a device by use.

  On CPUs the compiler's peak is that of arguments alone, so that the sum of all takes its place. It leaves out what the
  process and its products take besides: by benchmarks/plan_memory.py about PROCESS and half a chunk of logits.
  """
  stats, platform = compiled.memory_analysis(), built.target.platform
  scratch = 0
  if platform == 'cpu':
    found = estimate(built.config, built.abstract, built.mesh, num_microbatches, platform)
    scratch = PROCESS // built.mesh.size + found.logits // 4
  on_host = getattr(stats, 'host_argument_size_in_bytes', 0)  # which the compilers of GPUs and TPUs count too
  reported = max(0, int(getattr(stats, 'peak_memory_in_bytes', 0) or 0) - on_host)
  peak = needed(compiled) + scratch if platform == 'cpu' else reported or needed(compiled)
  return {'arguments': stats.argument_size_in_bytes, 'outputs': stats.output_size_in_bytes,
          'aliased': stats.alias_size_in_bytes, 'temporaries': stats.temp_size_in_bytes,
          'code': stats.generated_code_size_in_bytes, 'scratch': scratch, 'peak': peak}
