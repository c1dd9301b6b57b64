"""Makes a plan: the figures of a run on a target, as a dict that report.py prints and that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from llm_jax.base.errors import ConfigError
from llm_jax.base.process import gib
from llm_jax.base.target import compiling_for
from llm_jax.config import Config, replace
from llm_jax.extras.plan.building import Compiled, build, compile_step
from llm_jax.extras.plan.collectives import read_collectives
from llm_jax.extras.plan.hlo import kernels
from llm_jax.extras.plan.rows import parameter_rows
from llm_jax.extras.plan.search import Candidate, candidates
from llm_jax.extras.plan.targets import Place
from llm_jax.extras.plan.traffic import hbm_bytes
from llm_jax.extras.plan.work import collective_rows, network_parts_on, work_of
from llm_jax.layers.pipeline import describe_pipeline

SHARE = 0.95  # of a device's memory that a step may need; the rest is for evaluation, samples and fragmentation
TRIES = 6  # candidates that are compiled at most
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of llm-jax plan that decide how a plan is made."""

  compiles: bool = True  # False: the estimate alone
  search: bool = False  # whether to look for the fastest settings that fit, over meshes too
  read_data: bool = False
  mfu: float = 0.4
  price: float | None = None
  data_tokens: int | None = None


def make_plan(config: Config, place: Place, target: Any, options: Options, say: Say) -> dict[str, Any]:
  """The plan. Raises UserErrors."""
  free = options.search or config.tokens_per_device is None
  every = candidates(config, place, target, options.read_data, whole=options.search)
  limit = int(SHARE * place.memory) if place.memory else None
  if free:
    order = [each for each in every if options.search or same_policy(each, config)]
  else:
    order = [as_configured(every, config)]
  chosen, compiled, failure = choose(order, limit if free else None, target, options, say)
  plan = describe(chosen, compiled, place, options)
  plan['memory']['failure'] = failure
  needed = plan['memory'].get('compiled', {}).get('peak', chosen.memory.total)
  fits = None if limit is None else not failure and needed <= limit
  plan['memory'].update(limit=place.memory, share=SHARE, fits=fits)
  if fits is False:
    scale = max(1.0, needed / chosen.memory.total)
    better = next((each for each in every if limit and each.memory.total * scale <= limit), None)
    plan['advice'] = {'settings': better.settings, 'bytes': int(better.memory.total * scale)} if better else None
  return plan


def same_policy(candidate: Candidate, config: Config) -> bool:
  """Whether the candidate has the config's policy of remat."""
  return getattr(candidate.built.config.model, 'remat', '') == getattr(config.model, 'remat', '')


def as_configured(every: list[Candidate], config: Config) -> Candidate:
  """The candidate that the config's own settings make."""
  fitting = [each for each in every if same_policy(each, config)]
  held, _ = config.split_batch(fitting[0].built.num_shards)
  return next(each for each in fitting if each.rows == held)


def choose(order: list[Candidate], limit: int | None, target: Any, options: Options,
           say: Say) -> tuple[Candidate, Compiled | None, str]:
  """(the first candidate that fits, its compiled step, '' or why it could not be compiled). Raises ConfigError."""
  likely = [each for each in order if limit is None or each.memory.total <= limit] or order[-1:]
  if not options.compiles:
    return likely[0], None, ''
  worst, tries = float('inf'), 0
  chosen, compiled, failure = likely[0], None, ''
  for each in likely:
    if each.memory.total > worst:
      continue  # takes no less than one that did not fit
    chosen, tries = each, tries + 1
    settings = ' '.join(f'{name}={value}' for name, value in each.settings.items())
    say(f'compiling {settings}, {each.num_microbatches} microbatch(es)')
    compiled, failure = compile_candidate(each, target, options)
    peak = compiled.memory['peak'] if compiled else float('inf')
    if (limit is None or peak <= limit) or tries == TRIES:
      break
    say(f'  needs {gib(peak) if compiled else "more than there is"}')
    worst = min(worst, 0.9 * each.memory.total)
  return chosen, compiled, failure


def compile_candidate(candidate: Candidate, target: Any, options: Options) -> tuple[Compiled | None, str]:
  """(the compiled step, '') or (None, the compiler's message) where it runs out of the target's memory."""
  built = candidate.built
  if built.make_step is None:
    built = build(built.config, target, read_data=options.read_data)
  try:
    return compile_step(built, candidate.num_microbatches), ''
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise ConfigError(f'--on: the compiler fails: {str(e)[:500]}') from None
    return None, str(e).splitlines()[0][:300]


def describe(chosen: Candidate, compiled: Compiled | None, place: Place, options: Options) -> dict[str, Any]:
  """The figures of a candidate."""
  built, sizes = chosen.built, dict(chosen.built.mesh.shape)
  config = settled(chosen)
  plan: dict[str, Any] = {
      'on': str(place), 'devices': place.num_devices, 'kind': built.target.kind, 'mesh': sizes,
      'settings': chosen.settings, 'microbatches': chosen.num_microbatches, 'rows': chosen.rows,
      'model': described(built.target, place, config),
      'pipeline': describe_pipeline(sizes['stage'], config.mesh.repeats, chosen.num_microbatches),
      'dtypes': {name: getattr(config.model, name) for name in ('dtype', 'product_dtype', 'stream_dtype',
                                                                'gradient_dtype') if hasattr(config.model, name)},
      'parameters': [dataclasses.asdict(row) for row in parameter_rows(built)],
      'num_parameters': sum(leaf.size for leaf in jax.tree.leaves(built.abstract.params)),
      'memory': {'estimate': {**dataclasses.asdict(chosen.memory), 'total': chosen.memory.total}},
      'work': dataclasses.asdict(work_of(built, place, options.mfu, options.price, options.data_tokens))}
  if compiled is not None:
    plan['memory']['compiled'] = compiled.memory
    plan['seconds'] = {'lower': compiled.lower_seconds, 'compile': compiled.compile_seconds}
    plan |= read_text(compiled.text, place, built.mesh)
  return plan


def described(target: Any, place: Place, config: Config) -> list[str]:
  """Lines on the model, as a run on the place prints them."""
  with compiling_for(dataclasses.replace(target, capability=place.kind.capability)):
    return config.model.describe(config.data.seq_len, config.data.mask_documents)


def settled(chosen: Candidate) -> Config:
  """The config with the candidate's tokens on a device."""
  return replace(chosen.built.config, tokens_per_device=chosen.settings['tokens_per_device'])


def read_text(text: str, place: Place, mesh: Mesh) -> dict[str, Any]:
  """Collectives, kernels and memory traffic of the compiled step."""
  traffic = hbm_bytes(text)
  found = read_collectives(text, dict(mesh.shape), network_parts_on(place, mesh))
  return {'collectives': collective_rows(found, place), 'kernels': kernels(text),
          'traffic': {'bytes': traffic, 'seconds': traffic / place.kind.hbm if place.kind.hbm else None}}
