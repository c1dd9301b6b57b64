"""Links after the optimizer: the moving average of weights."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.optim.link import Link, rates


class AverageState(NamedTuple):
  average: Params
  step: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Ema(Link):
  """An exponential moving average of the weights, used for evaluation and export; must be the last link.

  a = d a + (1 - d) p after each update, with d = min(decay, (1 + t) / (10 + t)) at update t, as in TensorFlow.
  """

  decay: float = 0.999
  place = 'control'

  def __post_init__(self) -> None:
    rates(decay=self.decay)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def init(params: Params) -> AverageState:
      return AverageState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(updates: Params, state: AverageState, params: Params = None) -> tuple[Params, AverageState]:
      decay = jnp.minimum(self.decay, (1 + state.step) / (10 + state.step))
      average = jax.tree.map(lambda a, p, u: a + (1 - decay) * (p + u - a), state.average, params, updates)
      return updates, AverageState(average, optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)

  @property
  def averages(self) -> bool:
    return True

  def evaluated(self, state: Any, params: Params) -> Params:
    return state.average
