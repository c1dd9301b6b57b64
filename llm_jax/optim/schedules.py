"""Learning rate schedules, each a config section. During `warmup_steps` the rate rises linearly from 0 to the peak.

Factors are relative to the peak, config.optim.learning_rate. Schedules that span all of training end at
config.num_steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import optax

from llm_jax.base.registry import is_frozen, settings_from_signature
from llm_jax.optim.link import at_least, positive


@dataclasses.dataclass(frozen=True)
class Warmup:
  """The base class of schedules with a warm-up: a linear rise, then `after`."""

  warmup_steps: int = 0

  def __post_init__(self) -> None:
    at_least(0, warmup_steps=self.warmup_steps)
    for name in ('end_factor', 'min_factor'):
      if not 0 <= getattr(self, name, 0) <= 1:
        raise ValueError(f'{name} must be in [0, 1]; got {getattr(self, name)}')

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

  end_factor: float = 0.1

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak_value, num_steps, self.end_factor)


@dataclasses.dataclass(frozen=True)
class WarmupLinear(Warmup):
  """Linear decay to `end_factor` at the last step."""

  end_factor: float = 0.0

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.linear_schedule(peak_value, self.end_factor * peak_value, num_steps)


@dataclasses.dataclass(frozen=True)
class Polynomial(Warmup):
  """Polynomial decay, (1 - progress)^power, to `end_factor` at the last step."""

  power: float = 2.0
  end_factor: float = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    positive(power=self.power)

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.polynomial_schedule(peak_value, self.end_factor * peak_value, self.power, num_steps)


@dataclasses.dataclass(frozen=True)
class Constant(Warmup):
  """The peak at every step after the warm-up."""

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak_value)


@dataclasses.dataclass(frozen=True)
class InverseSqrt(Warmup):
  """Decay as 1 / sqrt(step) after the warm-up (arXiv 1706.03762), independent of the number of steps."""

  warmup_steps: int = 1000

  def __post_init__(self) -> None:
    super().__post_init__()
    positive(warmup_steps=self.warmup_steps)

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

  decay_steps: int = 0
  shape: Literal['linear', 'sqrt', 'cosine'] = 'sqrt'
  end_factor: float = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    at_least(0, decay_steps=self.decay_steps)

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    begin = num_steps - self.decay_steps

    def schedule(step: Any) -> Any:
      progress = jnp.clip((step - begin) / max(1, self.decay_steps), 0, 1)
      return peak_value * (self.end_factor + (1 - self.end_factor) * SHAPES[self.shape](progress))

    return schedule


@dataclasses.dataclass(frozen=True)
class OneCycle:
  """One cosine up from peak / div_factor and one down to peak / div_factor / final_div_factor (arXiv 1708.07120)."""

  pct_start: float = 0.3
  div_factor: float = 25.0
  final_div_factor: float = 1e4

  def __post_init__(self) -> None:
    positive(div_factor=self.div_factor, final_div_factor=self.final_div_factor)
    if not 0 < self.pct_start < 1:
      raise ValueError(f'pct_start must be in (0, 1); got {self.pct_start}')

  def make(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.cosine_onecycle_schedule(num_steps, peak_value, self.pct_start, self.div_factor,
                                          self.final_div_factor)


@dataclasses.dataclass(frozen=True)
class Cyclic:
  """Triangular cycles (arXiv 1506.01186): `half_steps` up from `min_factor` to the peak, as many down, repeated.

  `shrink` scales the height of each cycle relative to the one before: 1 is "triangular", 0.5 "triangular2".
  """

  half_steps: int = 1000
  min_factor: float = 0.1
  shrink: float = 1.0

  def __post_init__(self) -> None:
    positive(half_steps=self.half_steps, shrink=self.shrink)
    if not 0 <= self.min_factor <= 1 or self.shrink > 1:
      raise ValueError(f'min_factor must be in [0, 1], shrink in (0, 1]; got {self.min_factor} and {self.shrink}')

  def make(self, peak_value: float, num_steps: int) -> optax.Schedule:
    def schedule(step: Any) -> Any:
      cycle = step // (2 * self.half_steps)
      height = 1 - jnp.abs(step / self.half_steps - 2 * cycle - 1)
      return peak_value * (self.min_factor + (1 - self.min_factor) * height * self.shrink ** cycle)
    return schedule


@dataclasses.dataclass(frozen=True)
class Restarts(Warmup):
  """Cosine decays with warm restarts (SGDR, arXiv 1608.03983), each `multiply` times as long as the one before.

  `shrink` scales the peak of each decay relative to the one before; `end_factor` is relative to its own peak.
  """

  period: int = 1000
  multiply: float = 2.0
  shrink: float = 1.0
  end_factor: float = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    positive(period=self.period, shrink=self.shrink)
    at_least(1, multiply=self.multiply)

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    lengths, begins = [self.period], [0]
    while begins[-1] + lengths[-1] < num_steps:
      begins.append(begins[-1] + lengths[-1])
      lengths.append(round(lengths[-1] * self.multiply))

    def schedule(step: Any) -> Any:
      cycle = jnp.searchsorted(jnp.array(begins[1:]), step, side='right')
      progress = jnp.clip((step - jnp.array(begins)[cycle]) / jnp.array(lengths)[cycle], 0, 1)
      cosine = self.end_factor + (1 - self.end_factor) * SHAPES['cosine'](progress)
      return peak_value * self.shrink ** cycle * cosine

    return schedule


@dataclasses.dataclass(frozen=True)
class Phases(Warmup):
  """The peak times `factors[k]` from step `boundaries[k - 1]` on.

  The defaults are four phases as in Grokfast: warm-up, acceleration, consolidation, refinement.
  """

  factors: tuple[float, ...] = (1.0, 5.0, 0.2, 0.1)
  boundaries: tuple[int, ...] = (1000, 6000, 8000)

  def __post_init__(self) -> None:
    super().__post_init__()
    at_least(0, **{f'factors[{i}]': factor for i, factor in enumerate(self.factors)})
    _check_boundaries(self.boundaries, 'factors', len(self.factors))

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    parts = [optax.constant_schedule(peak_value * factor) for factor in self.factors]
    return optax.join_schedules(parts, [end - self.warmup_steps for end in self.boundaries])


@dataclasses.dataclass(frozen=True)
class Composite:
  """A sequence of schedules: `parts` by name, each with the settings of its section and its own range of steps.

  Part k starts at step `boundaries[k - 1]` of the run, which is its own step 0.
  """

  parts: tuple[str, ...] = ()
  boundaries: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    if self.parts:
      _check_boundaries(self.boundaries, 'parts', len(self.parts))

  def lengths(self, num_steps: int) -> list[tuple[str, int]]:
    """(name, number of steps) of each part."""
    ends = [*self.boundaries, num_steps]
    return [(name, end - begin) for name, begin, end in zip(self.parts, [0, *self.boundaries], ends, strict=True)]


def _check_boundaries(boundaries: tuple[int, ...], what: str, count: int) -> None:
  if not count:
    raise ValueError(f'{what} must have at least one entry')
  if len(boundaries) != count - 1:
    raise ValueError(f'boundaries must be {count - 1} steps for {count} {what}; got {len(boundaries)}')
  if any(b >= c for b, c in zip((0, *boundaries), boundaries, strict=False)):
    raise ValueError(f'boundaries must be increasing, from 1 on; got {", ".join(map(str, boundaries))}')


def adapt_schedule(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """A frozen dataclass unchanged; a function (peak_value, num_steps, **settings) -> Optax schedule as such a class."""
  if is_frozen(value):
    return value, value

  def make(self: Any, peak_value: float, num_steps: int) -> optax.Schedule:
    return value(peak_value, num_steps, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  own = settings or settings_from_signature(value)
  schedule: type = dataclasses.dataclass(frozen=True)(type(own.__name__, (own,), {'make': make}))
  return schedule, schedule
