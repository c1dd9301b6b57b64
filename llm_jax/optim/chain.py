"""OptimConfig, and the Optax chain for it: links by name, in the config's order, with a learning rate schedule."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.builder import Sections, check_names, keep_named, known_names, sections
from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import Registry, register
from llm_jax.base.trees import split
from llm_jax.optim import controls, filters, optimizers, schedules
from llm_jax.optim.groups import Group, trainable_paths, with_groups
from llm_jax.optim.link import Link, adapt_transform
from llm_jax.optim.schedules import adapt_schedule

# Links (see optim/link.py), or functions from a schedule to an Optax transformation, such as optax.adamw.
TRANSFORMS = Registry('transform', adapt_transform)
for _name, _link in (
    ('clip_by_global_norm', filters.ClipByGlobalNorm), ('l2', filters.L2), ('adamw', optimizers.AdamW),
    ('adam', optimizers.Adam), ('sgd', optimizers.Sgd), ('lion', optimizers.Lion), ('adafactor', optimizers.Adafactor),
    ('muon', optimizers.Muon), ('ademamix', optimizers.AdEMAMix), ('prodigy', optimizers.Prodigy),
    ('schedule_free', optimizers.ScheduleFree), ('ema', controls.Ema)):
  register(TRANSFORMS, _name, _link)
# Frozen dataclasses with make(peak_value, num_steps) -> Optax schedule, or functions with these two parameters.
SCHEDULES = Registry('schedule', adapt_schedule)
for _name, _schedule in (
    ('warmup_cosine', schedules.WarmupCosine), ('warmup_linear', schedules.WarmupLinear),
    ('constant', schedules.Constant), ('inverse_sqrt', schedules.InverseSqrt), ('wsd', schedules.Wsd),
    ('one_cycle', schedules.OneCycle), ('cyclic', schedules.Cyclic), ('restarts', schedules.Restarts),
    ('polynomial', schedules.Polynomial), ('phases', schedules.Phases), ('composite', schedules.Composite)):
  register(SCHEDULES, _name, _schedule)
PLACES = ('filter', 'optimizer', 'control')


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The links of the chain in order, the settings of each, and the peak and schedule of the learning rate."""

  learning_rate: float = 6e-4
  schedule: str = 'warmup_cosine'  # one of SCHEDULES
  chain: tuple[str, ...] = ('clip_by_global_norm', 'adamw')  # of TRANSFORMS: filters, one optimizer, then controls
  groups: dict[str, Group] = dataclasses.field(default_factory=dict)
  sections: Sections = sections(TRANSFORMS, SCHEDULES)

  def __post_init__(self) -> None:
    if not 0 < self.learning_rate < float('inf'):
      raise ValueError(f'learning_rate must be positive; got {self.learning_rate}')
    check_names('chain', self.chain, TRANSFORMS)
    if self.schedule not in SCHEDULES:
      raise ValueError(f'schedule {self.schedule!r} is unknown; {known_names(self.schedule, SCHEDULES)}')
    parts = self.sections['composite'].parts if 'composite' in self.sections else ()
    known = [name for name in SCHEDULES if name != 'composite']
    for name in parts:
      if name not in known:
        raise ValueError(f'composite.parts names {name!r}, which is unknown; {known_names(name, known)}')
    if self.schedule == 'composite' and not parts:
      raise ValueError(f'composite.parts must name schedules: {", ".join(known)}')
    keep_named(self, [*self.chain, self.schedule, *parts], 'neither chain nor schedule names it')
    places = [TRANSFORMS[name].place for name in self.chain]
    if places.count('optimizer') != 1 or places != sorted(places, key=PLACES.index):
      raise ValueError(f'chain must be filters ({_at("filter")}), one optimizer ({_at("optimizer")}) and then controls '
                       f'({_at("control")}); got {", ".join(self.chain) or "nothing"}')
    if len(set(self.chain)) < len(self.chain):
      raise ValueError(f'chain names a link twice: {", ".join(self.chain)}')
    if sum(link.averages for link in self.links) > 1 or ('ema' in self.chain and self.chain[-1] != 'ema'):
      raise ValueError('chain can have one link that averages weights, and ema must be the last link; got '
                       f'{", ".join(self.chain)}')
    scaling = {'reduce_on_plateau', 'noise_adaptive'} & set(self.chain)
    factors = [g for g in self.groups.values() if not g.frozen and (g.learning_rate, g.layer_decay) != (1, 1)]
    decays = {name for name, group in self.groups.items() if not group.frozen and group.weight_decay != 1}
    if 'schedule_free' in self.chain and (scaling or factors or decays or self.schedule != 'constant'):
      raise ValueError('schedule_free averages its own steps, so nothing else may scale them: set schedule=constant, '
                       'and remove reduce_on_plateau, noise_adaptive and the factors of groups')
    if 'prodigy' in self.chain and (decays or self.learning_rate < 0.1):
      raise ValueError('prodigy estimates its learning rate, and learning_rate multiplies the estimate: set it to 1 or '
                       f'near 1; got {self.learning_rate}; groups cannot set weight_decay')
    if decays and not self.weight_decay:
      raise ValueError(f'groups.{min(decays)}.weight_decay is set, but the optimizer has no weight_decay: it would '
                       'have no effect')

  @property
  def links(self) -> list[Link]:
    return [self.sections.get(name) or TRANSFORMS.settings(name)() for name in self.chain]

  @property
  def weight_decay(self) -> float:
    """The weight decay of the optimizer."""
    return next(getattr(link, 'weight_decay', 0.0) for link in self.links if link.place == 'optimizer')

  def section(self, name: str) -> Any:
    """The settings of a schedule."""
    return self.sections.get(name) or SCHEDULES.settings(name)()

  def schedule_parts(self, num_steps: int) -> list[tuple[str, int]]:
    """(name, number of steps) of each schedule, in order."""
    if self.schedule != 'composite':
      return [(self.schedule, num_steps)]
    return self.sections['composite'].lengths(num_steps)

  def misfits(self, num_steps: int) -> list[str]:
    """Messages about schedule settings that do not fit a run of `num_steps`."""
    problems = []
    for name, steps in self.schedule_parts(num_steps):
      section = self.section(name)
      warmup, decay = getattr(section, 'warmup_steps', 0), getattr(section, 'decay_steps', 0)
      boundaries = getattr(section, 'boundaries', ())
      if steps < 1:
        problems.append(f'optim.composite.boundaries leave {name} no steps (num_steps {num_steps})')
      elif warmup + decay >= steps:
        given = ' + '.join(f'{field} {value}' for field, value in (('warmup_steps', warmup), ('decay_steps', decay))
                           if value)
        problems.append(f'optim.{name}.{given} must be less than its {steps} steps (num_steps {num_steps})')
      elif boundaries and not warmup <= boundaries[0] <= boundaries[-1] < steps:
        problems.append(f'optim.{name}.boundaries {", ".join(map(str, boundaries))} must be between warmup_steps '
                        f'{warmup} and num_steps {num_steps}')
    return problems

  def make_schedule(self, num_steps: int) -> optax.Schedule:
    parts = self.schedule_parts(num_steps)
    ends = np.cumsum([steps for _, steps in parts])
    return optax.join_schedules([self.section(name).make(self.learning_rate, steps) for name, steps in parts],
                                ends[:-1].tolist())


def without_replaced(optim: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """The section of a config file without the settings of links and schedules that `overrides` remove."""
  named = [overrides.get(f'optim.{field}', optim.get(field, '')) for field in ('chain', 'schedule')]
  parts = overrides.get('optim.composite.parts', optim.get('composite', {}).get('parts', ''))
  kept = set(re.findall(r'\w+', f'{named} {parts}'))
  return {name: value for name, value in optim.items()
          if name in kept or not (name in TRANSFORMS or name in SCHEDULES)}


def _at(place: str) -> str:
  return ', '.join(name for name in TRANSFORMS if TRANSFORMS[name].place == place)


class Optimizer(NamedTuple):
  """A gradient transformation (init, update), with its schedule and links if they are known."""

  init: Callable[[Params], optax.OptState]
  update: Callable[..., tuple[Params, optax.OptState]]
  schedule: optax.Schedule | None = None
  links: tuple[Link, ...] = ()

  def learning_rate(self, step: jax.Array) -> Metrics:
    """{'learning_rate': ...}, or {} if the schedule is not known."""
    return {} if self.schedule is None else {'learning_rate': self.schedule(step)}

  def report(self, opt_state: optax.OptState) -> Metrics:
    """Scalars of all links, for the log."""
    reports = [link.report(state) for link, state in self._pairs(opt_state)]
    return {name: value for report in reports for name, value in report.items()}

  @property
  def averages(self) -> bool:
    """Whether the evaluated weights differ from the trained ones."""
    return any(link.averages for link in self.links)

  @property
  def required_metrics(self) -> tuple[str, ...]:
    """The evaluation results that its links use."""
    return tuple(name for link in self.links for name in link.required_metrics)

  def evaluated(self, opt_state: optax.OptState, params: Params) -> Params:
    for link, state in self._pairs(opt_state):
      params = link.evaluated(state, params)
    return params

  def _pairs(self, opt_state: optax.OptState) -> list[tuple[Link, Any]]:
    return list(zip(self.links, opt_state, strict=True)) if self.links else []

  def update_from_eval(self, opt_state: optax.OptState, results: dict[str, float]) -> optax.OptState:
    """The state after an evaluation. Raises ConfigError if `results` lack a metric that a link needs."""
    try:
      updated = tuple(link.update_from_eval(state, results) if link.required_metrics else state
                      for link, state in self._pairs(opt_state)) or opt_state
    except ValueError as e:
      raise ConfigError(f'config.optim: {e}') from None
    return jax.tree.map(lambda new, old: old if new is old else jax.device_put(np.asarray(new), old.sharding),
                        updated, opt_state)


def as_optimizer(tx: optax.GradientTransformation | Optimizer) -> Optimizer:
  """An Optax transformation as an Optimizer, without a known schedule."""
  return tx if isinstance(tx, Optimizer) else Optimizer(*optax.with_extra_args_support(tx))


def make_optimizer(config: OptimConfig, num_steps: int, info: Params = None) -> Optimizer:
  """The config's chain as one gradient transformation of the trainable parameters.

  `info` is a tree of ParamInfo of all parameters, needed by groups, muon and soap. Raises ConfigError if groups or
  links do not fit the parameters.
  """
  schedule = config.make_schedule(num_steps)
  try:
    links = with_groups(config.links, config.groups, config.weight_decay, info)
    if config.groups:
      info, _ = split(info, trainable_paths(config.groups, info))
    tx = optax.chain(*(optax.with_extra_args_support(link.make(schedule, info)) for link in links))
  except ValueError as e:
    raise ConfigError(f'config.optim.{e}') from None
  return Optimizer(tx.init, tx.update, schedule, tuple(links))
