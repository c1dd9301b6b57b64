"""Looks for the settings of microbatches, remat and mesh with which a step fits, the fastest by estimate first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from llm_jax.base.devices import peak_of_kind
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, num_batch_shards
from llm_jax.config import Config, replace
from llm_jax.extras.plan.building import Built, build
from llm_jax.extras.plan.targets import Place
from llm_jax.extras.plan.work import bandwidth
from llm_jax.layers.pipeline import num_ticks
from llm_jax.training.estimate import Estimate, estimate

# Work of a step with a policy of remat, relative to none: a forward pass more is a third.
RECOMPUTED = {'none': 1.0, 'save_matmuls': 1.03, 'save_attention': 1.25, 'full': 1.33}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Settings that a step can be compiled with."""

  built: Built  # of its mesh and remat
  num_microbatches: int
  rows: int  # of a device at a time
  memory: Estimate
  seconds: float  # of a step, by estimate

  @property
  def settings(self) -> dict[str, Any]:
    """The fields to set on the command line, without config."""
    config = self.built.config
    mesh = {f'mesh.{axis}': size for axis, size in self.built.mesh.shape.items()
            if axis in ('data', 'fsdp', 'tensor') or size != getattr(MeshConfig, axis)}
    return {**mesh, 'tokens_per_device': self.rows * config.row_part, 'model.remat': config.model.remat}


def candidates(config: Config, place: Place, target: Any, read_data: bool, whole: bool) -> list[Candidate]:
  """All candidates, the fastest first; of the config's mesh alone unless `whole`."""
  found = []
  for mesh in meshes(config, place.num_devices) if whole else (config.mesh,):
    try:
      built = build(replace(config, mesh=mesh), target, read_data=read_data)
    except ConfigError:
      if not whole:
        raise
      continue
    found += [each for remat in remats(built.config) for each in of_mesh(with_remat(built, remat), place)]
  return sorted(found, key=lambda each: (each.seconds, each.num_microbatches))


def meshes(config: Config, num_devices: int) -> list[MeshConfig]:
  """The config's mesh, and those with tensor up to 8 and fsdp over a host, or over all devices that are left.

  Rows are split over up to 16 devices, if 4,096 tokens or more are left on each.
  """
  given = config.mesh
  found = [given]
  contexts = {1, given.context, *(n for n in (2, 4, 8, 16) if config.data.seq_len >= 4096 * n)}
  for tensor, context in itertools.product((1, 2, 4, 8), sorted(contexts)):
    for fsdp in {1, 8, num_devices // tensor // context}:
      if fsdp and num_devices % (tensor * context * fsdp) == 0:
        found.append(dataclasses.replace(given, data=num_devices // tensor // context // fsdp, fsdp=fsdp,
                                         tensor=tensor, context=context))
  return list(dict.fromkeys(found))


def remats(config: Config) -> tuple[str, ...]:
  """Policies of remat to try: those that the model has and config.mesh.repeats allows."""
  if not hasattr(config.model, 'remat'):
    return ('none',)
  return tuple(name for name in RECOMPUTED if name != 'none' or config.mesh.repeats == 1)


def with_remat(built: Built, remat: str) -> Built:
  """The same program with another policy; its step is built anew when it is compiled."""
  config = built.config
  if getattr(config.model, 'remat', remat) == remat:
    return built
  config = replace(config, model=dataclasses.replace(config.model, remat=remat))
  return dataclasses.replace(built, config=config, make_step=None)


def of_mesh(built: Built, place: Place) -> Iterator[Candidate]:
  """A candidate for each number of rows that a device can hold at a time."""
  shards, config = num_batch_shards(built.mesh), built.config
  rows_of_shard = config.rows_per_batch // shards
  for rows in (n for n in range(1, rows_of_shard + 1) if rows_of_shard % n == 0):
    number = rows_of_shard // rows
    yield Candidate(built, number, rows, estimate(config, built.abstract, built.mesh, number, place.kind.platform),
                    step_seconds(built, place, number))


def step_seconds(built: Built, place: Place, num_microbatches: int) -> float:
  """A rough time of a step, to compare candidates: the longer one of half the peak's compute and the wire's."""
  sizes, config, model = dict(built.mesh.shape), built.config, built.config.model
  peak = peak_of_kind(built.target.kind) or 1e11
  compute = (built.flops_per_token * config.batch_tokens / place.num_devices / peak / 0.5
             * RECOMPUTED.get(getattr(model, 'remat', 'none'), 1.0))
  leaves = [leaf.size for leaf in jax.tree.leaves(built.abstract.params)]
  stages, repeats, layers = sizes['stage'], config.mesh.repeats, getattr(model, 'num_layers', 1)
  weights = 2 * sum(leaves) / sizes['tensor'] / stages  # bf16
  tokens = config.batch_tokens / sizes['data'] / sizes['fsdp'] / stages
  wire, passes = 0.0, float(num_microbatches)
  if stages > 1:  # each tick, forward and backward, sends a microbatch on; each microbatch moves in and out too
    passes = num_ticks(stages, repeats, num_microbatches) / repeats
    compute *= passes / stages / num_microbatches
    sent = (4 + 2 * repeats) * stages * tokens / sizes['context'] * 2 * getattr(model, 'embed_dim', 1)
    exchanged = 3 * weights / sizes['fsdp'] / sizes['context'] * (repeats > 1)
    wire += (sent + exchanged) / (bandwidth(place, built.mesh, ('stage',)) or 1e9)
  if sizes['fsdp'] * sizes['context'] > 1:  # gathered forward and backward, reduced once
    wire += weights * (2 * passes + 1) / (bandwidth(place, built.mesh, ('fsdp', 'context')) or 1e9)
  if sizes['context'] > 1:  # keys and values, gathered forward and backward, and their gradients reduced
    width = 2 * getattr(model, 'K', 1) * getattr(model, 'H', 1)
    wire += 3 * layers * tokens * 2 * width / sizes['tensor'] / (bandwidth(place, built.mesh, ('context',)) or 1e9)
  if sizes['data'] > 1:
    wire += 2 * weights / sizes['fsdp'] / sizes['context'] / (bandwidth(place, built.mesh, ('data',)) or 1e9)
  if sizes['tensor'] > 1:
    wire += (8 * layers * tokens / sizes['context'] * 2 * getattr(model, 'embed_dim', 1)
             / (bandwidth(place, built.mesh, ('tensor',)) or 1e9))
  return max(compute, wire) + 0.2 * min(compute, wire)
