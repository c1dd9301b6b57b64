"""Schedules beyond those of optim/schedules.py: cycles, phases, and several schedules in sequence."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from llm_jax.base.builder import known_names
from llm_jax.base.ranges import at_least, positive, ranged, share
from llm_jax.base.registry import register
from llm_jax.optim.chain import SCHEDULES
from llm_jax.optim.schedules import SHAPES, Schedule, Warmup


@dataclasses.dataclass(frozen=True)
class Polynomial(Warmup):
  """Polynomial decay, (1 - progress)^power, to `end_factor` at the last step."""

  power: float = positive(2.0)  # 1: linear; 2: quadratic
  end_factor: float = share(0.0)  # last rate, as a share of the peak

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.polynomial_schedule(peak_value, self.end_factor * peak_value, self.power, num_steps)


@dataclasses.dataclass(frozen=True)
class OneCycle(Schedule):
  """One cosine up from peak / div_factor and one down to peak / div_factor / final_div_factor (arXiv 1708.07120).

  As torch's OneCycleLR: the first update has the first rate, update pct_start * num_steps the peak, the last the last.
  """

  pct_start: float = ranged(0.3, lambda x: 0 < x < 1, 'in (0, 1)')  # share of the steps that rise, in (0, 1)
  div_factor: float = positive(25.0)  # the peak / the first rate
  final_div_factor: float = positive(1e4)  # the first rate / the last rate

  def make(self, peak_value: float, num_steps: int) -> optax.Schedule:
    first = peak_value / self.div_factor
    last, top = first / self.final_div_factor, self.pct_start * num_steps - 1

    def schedule(step: Any) -> Any:
      up = 1 - SHAPES['cosine'](jnp.clip(step / max(top, 1e-9), 0, 1))
      down = SHAPES['cosine'](jnp.clip((step - top) / max(num_steps - 1 - top, 1e-9), 0, 1))
      return jnp.where(step <= top, first + (peak_value - first) * up, last + (peak_value - last) * down)

    return schedule


@dataclasses.dataclass(frozen=True)
class Cyclic(Schedule):
  """Triangular cycles (arXiv 1506.01186): `half_steps` up from `min_factor` to the peak, as many down, repeated.

  `shrink` scales the height of each cycle relative to the one before: 1 is "triangular", 0.5 "triangular2".
  """

  half_steps: int = positive(1000)  # steps from the lowest to the highest rate
  min_factor: float = share(0.1)  # lowest rate, as a share of the peak
  # height of a cycle relative to the one before, in (0, 1]
  shrink: float = ranged(1.0, lambda x: 0 < x <= 1, 'in (0, 1]')

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

  period: int = positive(1000)  # steps of the first decay
  multiply: float = at_least(1, 2.0)  # length of a decay relative to the one before, at least 1
  shrink: float = positive(1.0)  # peak of a decay relative to the one before
  end_factor: float = share(0.0)  # last rate of a decay, as a share of its peak

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

  factors: tuple[float, ...] = at_least(0, (1.0, 5.0, 0.2, 0.1))  # on the peak, one for each phase
  boundaries: tuple[int, ...] = (1000, 6000, 8000)  # the first steps of all phases but the first

  def __post_init__(self) -> None:
    super().__post_init__()
    check_boundaries(self.boundaries, 'factors', len(self.factors))

  def make_for(self, optim: Any, num_steps: int) -> optax.Schedule:
    # A phase of N steps has N updates, whatever the first count is.
    counts = tuple(end + optim.first_count for end in self.boundaries)
    return Warmup.make_for(dataclasses.replace(self, boundaries=counts), optim, num_steps)

  def after(self, peak_value: float, num_steps: int) -> optax.Schedule:
    parts = [optax.constant_schedule(peak_value * factor) for factor in self.factors]
    return optax.join_schedules(parts, [end - self.warmup_steps for end in self.boundaries])

  def misfits(self, optim: Any, name: str, num_steps: int) -> list[str]:
    if not self.boundaries or self.warmup_steps <= self.boundaries[0] <= self.boundaries[-1] < num_steps:
      return []
    return [f'{name}.boundaries {", ".join(map(str, self.boundaries))} must be between warmup_steps '
            f'{self.warmup_steps} and its {num_steps} steps']


@dataclasses.dataclass(frozen=True)
class Composite(Schedule):
  """A sequence of schedules: `parts` by name, each with the settings of its section and its own range of steps.

  Part k starts at step `boundaries[k - 1]` of the run, which is its own step 0.
  """

  parts: tuple[str, ...] = ()  # each one of SCHEDULES, but not composite
  boundaries: tuple[int, ...] = ()  # the first steps of all parts but the first

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.parts:
      check_boundaries(self.boundaries, 'parts', len(self.parts))

  def named(self) -> tuple[str, ...]:
    """The names of its parts. Raises ValueError for unknown names, and if there are none."""
    known = [name for name in SCHEDULES if name != 'composite']
    for name in self.parts:
      if name not in known:
        raise ValueError(f'composite.parts names {name!r}, which is unknown; '
                         f'{known_names(name, known, extensible=True)}')
    if not self.parts:
      raise ValueError(f'composite.parts must name schedules: {", ".join(known)}')
    return self.parts

  def lengths(self, num_steps: int) -> list[tuple[str, int]]:
    """(name, number of steps) of each part."""
    ends = [*self.boundaries, num_steps]
    return [(name, end - begin) for name, begin, end in zip(self.parts, [0, *self.boundaries], ends, strict=True)]

  def make_for(self, optim: Any, num_steps: int) -> optax.Schedule:
    return optax.join_schedules([optim.section(name).make_for(optim, steps) for name, steps in self.lengths(num_steps)],
                                list(self.boundaries))

  def misfits(self, optim: Any, name: str, num_steps: int) -> list[str]:
    problems = []
    for part, steps in self.lengths(num_steps):
      section = optim.section(part)
      problems += section.misfits(optim, part, steps)
      if steps < 1 or section.fitted(steps) != section:
        problems.append(f'{name}.boundaries leave {part} {max(steps, 0)} steps, which its warm-up and decay exceed')
    return problems


def check_boundaries(boundaries: tuple[int, ...], what: str, count: int) -> None:
  if not count:
    raise ValueError(f'{what} must have at least one entry')
  if len(boundaries) != count - 1:
    raise ValueError(f'boundaries must be {count - 1} steps for {count} {what}; got {len(boundaries)}')
  if any(b >= c for b, c in zip((0, *boundaries), boundaries, strict=False)):
    raise ValueError(f'boundaries must be increasing, from 1 on; got {", ".join(map(str, boundaries))}')


for _name, _schedule in (
    ('one_cycle', OneCycle), ('cyclic', Cyclic), ('restarts', Restarts), ('polynomial', Polynomial),
    ('phases', Phases), ('composite', Composite)):
  register(SCHEDULES, _name, _schedule)
