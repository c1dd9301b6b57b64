"""Links after the optimizer that scale updates: on a plateau of a metric, or by the gradient's noise."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.ranges import at_least, positive, ranged, rate
from llm_jax.base.registry import register
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link


@dataclasses.dataclass(frozen=True)
class ReduceOnPlateau(Link):
  """Multiplies updates by `factor` whenever `metric` has not improved for `patience` evaluations.

  An improvement is a change by more than `min_delta`; mode max is for metrics that increase. For train/loss, a mean
  over `accumulation_size` steps counts as an evaluation.
  """

  metric: str = 'val/loss'  # a result of evaluations, or train/loss
  mode: Literal['min', 'max'] = 'min'  # whether lower or higher values are better
  factor: float = ranged(0.5, lambda x: 0 < x < 1, 'in (0, 1)')  # of each reduction, in (0, 1)
  patience: int = positive(2)  # evaluations without an improvement before a reduction
  min_delta: float = positive(1e-4)  # least improvement that counts, in the metric's unit
  cooldown: int = at_least(0, 0)  # evaluations after a reduction that do not count
  accumulation_size: int = positive(100)  # steps whose mean counts as one evaluation, for train/loss
  min_scale: float = at_least(0, 0.0)  # lowest product of all reductions
  place = 'control'
  scales = True

  def __post_init__(self):
    super().__post_init__()
    if self.metric == 'train/loss' and self.mode == 'max':
      raise ValueError('mode must be min for metric train/loss; got max')

  @property
  def required_metrics(self) -> tuple[str, ...]:
    return () if self.metric == 'train/loss' else (self.metric,)

  def _optax(self) -> optax.GradientTransformationExtraArgs:
    return contrib.reduce_on_plateau(self.factor, self.patience, 0.0, self.min_delta, cooldown=self.cooldown,
                                     min_scale=self.min_scale,
                                     accumulation_size=1 if self.required_metrics else self.accumulation_size)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    tx = self._optax()
    if not self.required_metrics:
      return tx
    return optax.GradientTransformation(
        tx.init, lambda updates, state, params=None: (optax.tree.scale(state.scale, updates), state))

  def update_from_eval(self, state: Any, results: dict[str, float]) -> Any:
    if self.metric not in results:
      raise ValueError(f'{self.metric} is not a result of the evaluation; known: {", ".join(sorted(results))}')
    value = results[self.metric] * (1 if self.mode == 'min' else -1)
    return self._optax().update({}, state, value=value)[1]

  def report(self, state: Any) -> Metrics:
    return {'plateau_scale': state.scale}


class NoiseState(NamedTuple):
  mean: Params  # of gradients
  square: jax.Array  # float32: mean of the gradients' squared norm
  scale: jax.Array  # float32
  step: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class NoiseAdaptive(Link):
  """Scales updates by the gradient's signal, so that the learning rate decreases as noise dominates.

  signal = |E g|^2 / E |g|^2 is the share of the gradient's energy that persists (1 - signal is the noise scale of
  arXiv 1812.06162 as a share); both means decay by `decay`. The factor is (signal / `target`)^`power`, clipped to
  [`min_scale`, `max_scale`].
  """

  decay: float = rate(0.98)  # of both means, per step, in [0, 1)
  target: float = positive(0.1)  # the signal at which the factor is 1
  power: float = positive(0.5)  # exponent of signal / target
  min_scale: float = positive(0.1)  # smallest factor
  max_scale: float = 1.0  # largest factor
  place = 'control'
  scales = True

  def __post_init__(self):
    super().__post_init__()
    if not self.max_scale >= self.min_scale:
      raise ValueError(f'max_scale must be at least {self.min_scale}; got {self.max_scale}')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def init(params: Params) -> NoiseState:
      return NoiseState(optax.tree.zeros_like(params), jnp.zeros(()), jnp.ones(()), jnp.zeros((), jnp.int32))

    def update(updates: Params, state: NoiseState, params: Params = None, *, grad: Params,
               **extra: Any) -> tuple[Params, NoiseState]:
      mean = jax.tree.map(lambda m, g: self.decay * m + (1 - self.decay) * g, state.mean, grad)
      square = self.decay * state.square + (1 - self.decay) * optax.tree.norm(grad, squared=True)
      unbiased = 1 - self.decay ** (state.step + 1)  # the mean appears squared, so one correction remains in the ratio
      signal = optax.tree.norm(mean, squared=True) / jnp.maximum(square * unbiased, jnp.finfo(jnp.float32).tiny)
      scale = jnp.clip((signal / self.target) ** self.power, self.min_scale, self.max_scale)
      return optax.tree.scale(scale, updates), NoiseState(mean, square, scale, optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)

  def report(self, state: Any) -> Metrics:
    return {'noise_scale': state.scale}


register(TRANSFORMS, 'reduce_on_plateau', ReduceOnPlateau)
register(TRANSFORMS, 'noise_adaptive', NoiseAdaptive)
