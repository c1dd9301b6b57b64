"""Learning rate schedules, each a config section. During `warmup_steps` the rate rises linearly to the peak.

Factors are relative to the peak, config.optim.learning_rate. With a warm-up of W steps, update W has the peak and
update 1 a W-th of it; a decay reaches its end value at the last update (see `first_count` of OptimConfig).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax

from llm_jax.base.ranges import Ranged, at_least, positive, share
from llm_jax.base.registry import is_frozen, settings_from_signature


class Schedule(Ranged):
  """A schedule of the learning rate. To add one, register a subclass or a function like `make` in SCHEDULES.

  make(peak_value, num_steps)       the Optax schedule of a run of `num_steps`
  make_for(optim, num_steps)        the same for an OptimConfig, of which it may use other sections
  named()                           the names of other schedules that it uses
  fitted(num_steps)                 the schedule with periods that fit the number of steps
  misfits(optim, name, num_steps)   messages about settings that do not fit the number of steps; `name` is its own
  """

  def make(self, peak_value: float, num_steps: int) -> optax.Schedule:
    raise NotImplementedError

  def make_for(self, optim: Any, num_steps: int) -> optax.Schedule:
    return self.make(optim.learning_rate, num_steps)

  def named(self) -> tuple[str, ...]:
    return ()

  def fitted(self, num_steps: int) -> Any:
    """Itself, or with warmup_steps and decay_steps shortened to half of the steps if they take all of them."""
    given = {field: getattr(self, field) for field in ('warmup_steps', 'decay_steps') if getattr(self, field, 0)}
    if sum(given.values()) < num_steps:
      return self
    return dataclasses.replace(self, **{  # type: ignore[type-var]
        field: value * num_steps // (2 * sum(given.values())) for field, value in given.items()})

  def misfits(self, optim: Any, name: str, num_steps: int) -> list[str]:
    del optim, name, num_steps
    return []


@dataclasses.dataclass(frozen=True)
class Warmup(Schedule):
  """The base class of schedules with a warm-up: a linear rise, then `after`."""

  warmup_steps: int = at_least(0, 0)  # steps of the linear rise from 0; 0: none

  def make_for(self, optim: Any, num_steps: int) -> optax.Schedule:
    schedule = self.fitted(num_steps).make(optim.learning_rate, num_steps)
    return lambda count: schedule(count + optim.first_count)

  def make(self, peak_value: float, num_steps: int) -> optax.Schedule:
    after = self.after(peak_value, num_steps - self.warmup_steps)
    if not self.warmup_steps:
      return after
    rise = optax.linear_schedule(0.0, peak_value, self.warmup_steps)
    return optax.join_schedules([rise, after], [self.warmup_steps])

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    """The schedule after the warm-up, over the remaining `num_steps`."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WarmupCosine(Warmup):
  """Cosine decay (arXiv 1608.03983) to `end_factor` at the last step."""

  end_factor: float = share(0.1)  # last rate, as a share of the peak

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak_value, num_steps, self.end_factor)


@dataclasses.dataclass(frozen=True)
class WarmupLinear(Warmup):
  """Linear decay to `end_factor` at the last step."""

  end_factor: float = share(0.0)  # last rate, as a share of the peak

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.linear_schedule(peak_value, self.end_factor * peak_value, num_steps)


@dataclasses.dataclass(frozen=True)
class Constant(Warmup):
  """The peak at every step after the warm-up."""

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak_value)


@dataclasses.dataclass(frozen=True)
class InverseSqrt(Warmup):
  """Decay as 1 / sqrt(step) after the warm-up (arXiv 1706.03762), independent of the number of steps."""

  warmup_steps: int = positive(1000)  # steps of the linear rise, and the scale of the decay

  def fitted(self, num_steps: int) -> InverseSqrt:
    return self  # the decay does not depend on the number of steps

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return lambda step: peak_value * jnp.sqrt(self.warmup_steps / (self.warmup_steps + jnp.maximum(step, 0)))


SHAPES: dict[str, Callable[[Any], Any]] = {  # of a cool-down: functions of its progress, 0 to 1
    'linear': lambda x: 1 - x,
    'sqrt': lambda x: 1 - jnp.sqrt(x),  # arXiv 2405.18392
    'cosine': lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
}


@dataclasses.dataclass(frozen=True)
class Wsd(Warmup):
  """Warm-up, stable, decay (arXiv 2404.06395): the peak, then a cool-down over the last `decay_steps`.

  A cool-down can branch off any checkpoint of a run: see config.start.
  """

  decay_steps: int = at_least(0, 0)  # steps of the cool-down
  shape: Literal['linear', 'sqrt', 'cosine'] = 'sqrt'  # of the cool-down
  end_factor: float = share(0.0)  # last rate, as a share of the peak

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    begin = num_steps - self.decay_steps

    def schedule(step: Any) -> Any:
      progress = jnp.clip((step - begin) / max(1, self.decay_steps), 0, 1)
      return peak_value * (self.end_factor + (1 - self.end_factor) * SHAPES[self.shape](progress))

    return schedule


def adapt_schedule(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """A Schedule unchanged; a frozen dataclass with `make`, or a function with its parameters and settings, as one."""
  if isinstance(value, type) and issubclass(value, Schedule):
    return value, value

  def make(self: Any, peak_value: float, num_steps: int) -> optax.Schedule:
    return value(peak_value, num_steps, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  own, methods = (value, {}) if is_frozen(value) else (settings or settings_from_signature(value), {'make': make})
  schedule: type = dataclasses.dataclass(frozen=True)(type(own.__name__, (own, Schedule), methods))
  return schedule, schedule
