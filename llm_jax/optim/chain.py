"""OptimConfig, and the Optax chain for it: links by name, in the config's order, with a learning rate schedule."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.builder import Sections, check_names, keep_named, known_names, sections
from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import Registry, register
from llm_jax.base.trees import split
from llm_jax.optim import muon, optimizers, schedules
from llm_jax.optim.groups import Group, keep_frozen, masked, trainable_paths, with_groups
from llm_jax.optim.link import Link, adapt_transform
from llm_jax.optim.schedules import adapt_schedule

# Links (see optim/link.py), or functions from a schedule to an Optax transformation, such as optax.adamw.
TRANSFORMS = Registry('transform', adapt_transform)
for _name, _link in (
    ('clip_by_global_norm', optimizers.ClipByGlobalNorm), ('adamw', optimizers.AdamW), ('adam', optimizers.Adam),
    ('sgd', optimizers.Sgd), ('lion', optimizers.Lion), ('muon', muon.Muon), ('ema', optimizers.Ema)):
  register(TRANSFORMS, _name, _link)
# Schedules (see optim/schedules.py), or functions (peak_value, num_steps) -> Optax schedule.
SCHEDULES = Registry('schedule', adapt_schedule)
for _name, _schedule in (
    ('warmup_cosine', schedules.WarmupCosine), ('warmup_linear', schedules.WarmupLinear),
    ('constant', schedules.Constant), ('inverse_sqrt', schedules.InverseSqrt), ('wsd', schedules.Wsd)):
  register(SCHEDULES, _name, _schedule)
PLACES = ('filter', 'optimizer', 'control')


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The links of the chain in order, the settings of each, and the peak and schedule of the learning rate."""

  learning_rate: float = 6e-4  # the peak of the schedule, in (0, 1000]
  schedule: str = 'warmup_cosine'  # one of SCHEDULES
  chain: tuple[str, ...] = ('clip_by_global_norm', 'adamw')  # filters, one optimizer, then controls, of TRANSFORMS
  groups: dict[str, Group] = dataclasses.field(default_factory=dict)
  first_count: int = 1  # the count at which a schedule with a warm-up is read for the first update; 0: as Optax counts
  rewarm: tuple[int, ...] = ()  # (step, steps): from that step on, the rate rises from 0 again, over so many steps
  sections: Sections = sections(TRANSFORMS, SCHEDULES)

  def __post_init__(self) -> None:
    if not 0 < self.learning_rate <= 1000:
      raise ValueError(f'learning_rate must be positive and at most 1000; got {self.learning_rate}')
    if self.first_count not in (0, 1):
      raise ValueError(f'first_count must be 0 or 1; got {self.first_count}')
    if self.rewarm and (len(self.rewarm) != 2 or min(self.rewarm) < 1):
      raise ValueError(f'rewarm must be a step and a number of steps, such as 700,50; got {self.rewarm}')
    check_names('chain', self.chain, TRANSFORMS)
    if self.schedule not in SCHEDULES:
      raise ValueError(f'schedule {self.schedule!r} is unknown; {known_names(self.schedule, SCHEDULES)}')
    names = [*self.chain, self.schedule, *self.section(self.schedule).named()]
    keep_named(self, names, 'neither chain nor schedule names it')
    places = [TRANSFORMS[name].place for name in self.chain]
    if places.count('optimizer') != 1 or places != sorted(places, key=PLACES.index):
      raise ValueError(f'chain must be filters ({_at("filter")}), one optimizer ({_at("optimizer")}) and then controls '
                       f'({_at("control")}); got {", ".join(self.chain) or "nothing"}')
    if len(set(self.chain)) < len(self.chain):
      raise ValueError(f'chain names a link twice: {", ".join(self.chain)}')
    if sum(link.averages for link in self.links) > 1:
      raise ValueError(f'chain can have one link that averages weights; got {", ".join(self.chain)}')
    for link in self.links:
      link.check(self)
    decays = [name for name, group in self.groups.items() if group.decays]
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

  def misfits(self, num_steps: int) -> list[str]:
    """Messages about schedule settings that do not fit a run of `num_steps`."""
    problems = self.section(self.schedule).misfits(self, self.schedule, num_steps)
    return [f'optim.{problem} (num_steps {num_steps})' for problem in problems]

  def make_schedule(self, num_steps: int) -> optax.Schedule:
    """The learning rate of update n + 1 by n, which is the number of updates before it."""
    schedule = self.section(self.schedule).make_for(self, num_steps)
    if not self.rewarm:
      return schedule
    begin, length = self.rewarm
    return lambda count: schedule(count) * jnp.where(count < begin, 1.0, jnp.minimum(1, (count + 1 - begin) / length))

  def shortened(self, num_steps: int) -> list[str]:
    """Lines on periods of the schedule that are shortened to fit the number of steps."""
    section = self.section(self.schedule)
    fitted = section.fitted(num_steps)
    return [f'optim.{self.schedule}.{field.name}: {getattr(section, field.name)} is shortened to '
            f'{getattr(fitted, field.name)}, as the run has {num_steps} steps' for field in dataclasses.fields(section)
            if getattr(section, field.name) != getattr(fitted, field.name)]


def without_replaced(optim: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  """The section of a config file without the settings of links and schedules that `overrides` remove."""
  chain, schedule = (overrides.get(f'optim.{field}', optim.get(field, '')) for field in ('chain', 'schedule'))
  given = optim.get(schedule, {}) if schedule in SCHEDULES else {}
  settings = {f'optim.{schedule}.{field}': value for field, value in given.items()} | {  # they may name other schedules
      path: value for path, value in overrides.items() if path.startswith(f'optim.{schedule}.')}
  kept = set(re.findall(r'\w+', f'{chain} {schedule} {list(settings.values())}'))
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
  trained: Params = None  # for parameters with single frozen layers: booleans that are False there

  def learning_rate(self, step: jax.Array) -> Metrics:
    """{'learning_rate': ...}, or {} if the schedule is not known."""
    return {} if self.schedule is None else {'learning_rate': self.schedule(step)}

  def report(self, opt_state: optax.OptState) -> Metrics:
    """Scalars of all links, for the log."""
    reports = [link.report(state) for link, state in self._pairs(opt_state)]
    return {name: value for report in reports for name, value in report.items()}

  def judge(self, opt_state: optax.OptState, loss: jax.Array,
            grad_norm: jax.Array) -> tuple[jax.Array, optax.OptState]:
    """(whether all links allow the step, the state after their judgement)."""
    judged = [link.judge(state, loss, grad_norm) for link, state in self._pairs(opt_state)]
    allowed = jnp.all(jnp.stack([jnp.asarray(True), *(jnp.asarray(verdict) for verdict, _ in judged)]))
    return allowed, tuple(state for _, state in judged) or opt_state

  @property
  def averages(self) -> bool:
    """Whether the evaluated weights differ from the trained ones."""
    return any(link.averages for link in self.links)

  def evaluated(self, opt_state: optax.OptState, params: Params) -> Params:
    for link, state in self._pairs(opt_state):
      params = keep_frozen(self.trained, link.evaluated(state, params), params)
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
    links, trained = with_groups(config.links, config.groups, config.weight_decay, info)
    if config.groups:
      info, _ = split(info, trainable_paths(config.groups, info))
    tx = optax.chain(*(masked(link.make(schedule, info), trained) for link in links))
  except ValueError as e:
    raise ConfigError(f'config.optim.{e}') from None
  return Optimizer(tx.init, tx.update, schedule, tuple(links), trained)
