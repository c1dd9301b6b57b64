"""Grokfast: filters that amplify the slow components of gradients (arXiv 2405.20233)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.conditions import Condition, condition
from llm_jax.base.ranges import at_least, rate
from llm_jax.base.registry import register
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link


class Phase(NamedTuple):
  """The position of a filter in its phases."""

  step: jax.Array  # int32: completed updates
  number: jax.Array  # int32: index of the phase


@dataclasses.dataclass(frozen=True)
class Phased(Link):
  """A filter whose amplification changes in phases.

  `phases` has a factor on `lamb` per phase; `until` has the end of each phase but the last: a step ('1000') or a
  condition on evaluations ('val/accuracy > 0.5'). For example, warm-up, acceleration, consolidation and refinement are
  phases (0, 1, 0.2, 0).
  """

  lamb: float = at_least(0, 2.0)  # factor on the slow gradient, before it is added
  phases: tuple[float, ...] = at_least(0, ())  # a factor on lamb for each phase; (): one phase with factor 1
  until: tuple[str, ...] = ()  # ends of the phases but the last: '1000', 'val/accuracy > 0.5'
  place = 'filter'

  def __post_init__(self):
    super().__post_init__()
    if len(self.until) != max(0, len(self.phases) - 1):
      raise ValueError(f'until must have {max(0, len(self.phases) - 1)} entries, one for each phase but the last; got '
                       f'{len(self.until)}')
    steps = [end for end in self.ends if isinstance(end, int)]
    if steps != sorted(set(steps)):
      raise ValueError(f'until: steps must be increasing; got {", ".join(map(str, steps))}')

  @property
  def ends(self) -> list[int | Condition]:
    """The end of each phase but the last: a step or a condition."""
    return [int(text) if text.strip().isdecimal() else condition(text) for text in self.until]

  @property
  def required_metrics(self) -> tuple[str, ...]:
    return tuple(end.metric for end in self.ends if isinstance(end, Condition))

  def first(self) -> Phase:
    return Phase(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

  def next(self, phase: Phase) -> tuple[jax.Array, Phase]:
    """(amplification of this update, phase of the next one)."""
    never = jnp.iinfo(jnp.int32).max
    steps = jnp.array([end if isinstance(end, int) else never for end in self.ends] + [never])
    number = phase.number + (phase.step >= steps[phase.number])
    factors = jnp.array(self.phases or (1.0,))
    return self.lamb * factors[number], Phase(optax.safe_increment(phase.step), number)

  def update_from_eval(self, state: Any, results: dict[str, float]) -> Any:
    number, ends = int(state.phase.number), self.ends
    while number < len(ends) and isinstance(end := ends[number], Condition) and end.holds(results):
      number += 1
    return state._replace(phase=state.phase._replace(number=jnp.full_like(state.phase.number, number)))

  def report(self, state: Any) -> Metrics:
    return {'grokfast_phase': state.phase.number} if self.phases else {}


class EmaState(NamedTuple):
  mean: Params
  phase: Phase


@dataclasses.dataclass(frozen=True)
class GrokfastEma(Phased):
  """Grokfast-EMA (arXiv 2405.20233, equation 9): g + lamb * m with m = alpha m + (1 - alpha) g.

  The mean starts at the first gradient, as in the authors' code.
  """

  alpha: float = rate(0.98)  # decay of the gradient's mean, per step, in [0, 1)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def init(params: Params) -> EmaState:
      return EmaState(optax.tree.zeros_like(params), self.first())

    def update(grads: Params, state: EmaState, params: Params = None) -> tuple[Params, EmaState]:
      alpha = jnp.where(state.phase.step == 0, 0.0, self.alpha)
      mean = jax.tree.map(lambda m, g: alpha * m + (1 - alpha) * g, state.mean, grads)
      lamb, phase = self.next(state.phase)
      return jax.tree.map(lambda g, m: g + lamb * m, grads, mean), EmaState(mean, phase)

    return optax.GradientTransformation(init, update)


class MaState(NamedTuple):
  last: Params  # leaves [window, ...]: a ring buffer, written at step % window
  total: Params  # the sum of the ring buffer
  phase: Phase


@dataclasses.dataclass(frozen=True)
class GrokfastMa(Phased):
  """Grokfast-MA (arXiv 2405.20233, equation 7): g + lamb * the mean of the last `window` gradients.

  Nothing is amplified before the window is full, as in the authors' code. It stores `window` copies of the gradients.
  """

  lamb: float = at_least(0, 5.0)
  window: int = at_least(1, 100)  # steps of the mean

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    size = self.window

    def init(params: Params) -> MaState:
      return MaState(jax.tree.map(lambda p: jnp.zeros((size, *p.shape), p.dtype), params),
                     optax.tree.zeros_like(params), self.first())

    def update(grads: Params, state: MaState, params: Params = None) -> tuple[Params, MaState]:
      place = state.phase.step % size
      # Recomputed once per round of the ring buffer, so that rounding errors do not accumulate.
      total = jax.tree.map(lambda t, ring, g: g + jax.lax.cond(
          place == 0, lambda t, ring: ring[1:].sum(0), lambda t, ring: t - ring[place], t, ring),
          state.total, state.last, grads)
      last = jax.tree.map(lambda ring, g: ring.at[place].set(g), state.last, grads)
      lamb, phase = self.next(state.phase)
      scale = jnp.where(phase.step >= size, lamb / size, 0.0)
      return jax.tree.map(lambda g, t: g + scale * t, grads, total), MaState(last, total, phase)

    return optax.GradientTransformation(init, update)


register(TRANSFORMS, 'grokfast_ema', GrokfastEma)
register(TRANSFORMS, 'grokfast_ma', GrokfastMa)
