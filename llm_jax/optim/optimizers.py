"""The links of the core but Muon (optim/muon.py). Weight decay applies to matrices and embeddings.

`mu_dtype` is the dtype of the stored first moment.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.base.ranges import decay, epsilon, rate, within
from llm_jax.optim.link import Link
from llm_jax.optim.masks import matrices

MuDtype = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm(Link):
  """Scales gradients down to at most this norm (arXiv 1211.5063)."""

  max_norm: float = within(1e-9, 1e9, 1.0)  # L2 norm of all gradients together
  place = 'filter'

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    # Optax's own divides each element, and XLA writes the clipped gradients to memory; a factor is fused instead.
    def clip(grads: Params, params: Params) -> Params:
      factor = jnp.minimum(1, self.max_norm / optax.tree.norm(grads))
      return jax.tree.map(lambda g: (factor * g).astype(g.dtype), grads)

    return optax.stateless(clip)


def decayed(tx: optax.GradientTransformation, schedule: optax.Schedule, weight_decay: float,
            mask: Any = matrices) -> optax.GradientTransformation:
  """Adds decoupled decay (arXiv 1711.05101) to `tx`, whose updates are final: p shrinks by learning rate * decay."""
  if not weight_decay:
    return tx
  return optax.chain(tx, optax.add_decayed_weights(lambda n: -weight_decay * schedule(n), mask))


@dataclasses.dataclass(frozen=True)
class AdamW(Link):
  """Adam with decoupled weight decay (arXiv 1711.05101)."""

  b1: float = rate(0.9)  # decay of the mean of gradients, per step
  b2: float = rate(0.95)  # decay of the mean of squared gradients, per step
  eps: float = epsilon(1e-8)  # added to the denominator
  weight_decay: float = decay(0.1)  # decoupled, times the learning rate; 0: none
  mu_dtype: MuDtype = 'float32'  # of the mean of gradients, as stored

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.adamw(schedule, self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype, weight_decay=self.weight_decay,
                       mask=matrices)


@dataclasses.dataclass(frozen=True)
class Adam(Link):
  """Adam (arXiv 1412.6980), without decay; with `nesterov`, NAdam.

  NAdam here has a constant b1, as torch's NAdam with an infinite momentum_decay; torch's default of 0.004 raises b1
  from half of it.
  """

  b1: float = rate(0.9)  # decay of the mean of gradients, per step
  b2: float = rate(0.999)  # decay of the mean of squared gradients, per step
  eps: float = epsilon(1e-8)  # added to the denominator
  nesterov: bool = False  # NAdam
  mu_dtype: MuDtype = 'float32'  # of the mean of gradients, as stored

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.adam(schedule, self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype, nesterov=self.nesterov)


@dataclasses.dataclass(frozen=True)
class Sgd(Link):
  """Stochastic gradient descent with momentum, optionally Nesterov's, as torch's SGD without dampening.

  The decay is decoupled (SGDW, arXiv 1711.05101). Torch's weight_decay is coupled: that is the filter l2.
  """

  momentum: float = rate(0.9)  # decay of the sum of gradients, per step; 0: none
  nesterov: bool = False  # look ahead along the momentum
  weight_decay: float = decay(0.0)  # decoupled, times the learning rate; 0: none
  accumulator_dtype: MuDtype = 'float32'  # of the momentum, as stored

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.nesterov and not self.momentum:
      raise ValueError('nesterov needs a momentum above 0')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return decayed(optax.sgd(schedule, self.momentum or None, self.nesterov, self.accumulator_dtype), schedule,
                   self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Lion(Link):
  """Lion (arXiv 2302.06675): the sign of an interpolated momentum. Needs 3 to 10 times lower rates than Adam."""

  b1: float = rate(0.9)  # weight of the momentum in the sign of an update
  b2: float = rate(0.99)  # decay of the momentum, per step
  weight_decay: float = decay(0.5)  # decoupled, times the learning rate; 0: none
  mu_dtype: MuDtype = 'float32'  # of the momentum, as stored

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.lion(schedule, self.b1, self.b2, self.mu_dtype, self.weight_decay, mask=matrices)


class AverageState(NamedTuple):
  average: Params
  step: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Ema(Link):
  """An exponential moving average of the weights, used for evaluation and export; must be the last link.

  a = d a + (1 - d) p after each update, with d = min(decay, (1 + t) / (10 + t)) at update t, as in TensorFlow.
  """

  decay: float = rate(0.999)  # of the average, per step, in [0, 1)
  place = 'control'
  averages = True

  def check(self, optim: Any) -> None:
    if optim.links[-1] != self:
      raise ValueError(f'ema must be the last link of chain; got {", ".join(optim.chain)}')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def init(params: Params) -> AverageState:
      return AverageState(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

    def update(updates: Params, state: AverageState, params: Params = None) -> tuple[Params, AverageState]:
      decay = jnp.minimum(self.decay, (1 + state.step) / (10 + state.step))
      average = jax.tree.map(lambda a, p, u: a + (1 - decay) * (p + u - a), state.average, params, updates)
      return updates, AverageState(average, optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)

  def evaluated(self, state: Any, params: Params) -> Params:
    return state.average
