"""Optimizers beyond those of optim/optimizers.py, and L2 regularization."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llm_jax.base.batch import Params
from llm_jax.base.params import ParamInfo
from llm_jax.base.ranges import at_least, decay, epsilon, positive, ranged, rate
from llm_jax.base.registry import register
from llm_jax.base.trees import path_of
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link, regular
from llm_jax.optim.masks import check_declared, matrices
from llm_jax.optim.optimizers import MuDtype, decayed


@dataclasses.dataclass(frozen=True)
class Adafactor(Link):
  """Adafactor (arXiv 1804.04235): second moments factored over each array's two largest sides, if both are large.

  Clipping and scaling by the parameter apply to whole arrays; for a stack that is all layers together.
  """

  decay_rate: float = rate(0.8)  # exponent by which the decay of the second moment grows with the step
  min_dim_size_to_factor: int = positive(128)  # matrices with a smaller dimension keep a whole second moment
  multiply_by_parameter_scale: bool = True  # scale updates by the rms of the parameter
  clipping_threshold: float = positive(1.0)  # largest rms of an update
  momentum: float = rate(0.0)  # decay of the first moment, per step; 0: none
  weight_decay: float = decay(0.0)  # decoupled, times the learning rate; 0: none
  mu_dtype: MuDtype = 'float32'  # of the momentum

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return decayed(optax.adafactor(
        schedule, self.min_dim_size_to_factor, self.decay_rate,
        multiply_by_parameter_scale=self.multiply_by_parameter_scale, clipping_threshold=self.clipping_threshold,
        momentum=self.momentum or None, dtype_momentum=self.mu_dtype), schedule, self.weight_decay)


@dataclasses.dataclass(frozen=True)
class AdEMAMix(Link):
  """AdEMAMix (arXiv 2409.03137): Adam with a second, much slower momentum, with warm-up of its rate and weight.

  The warm-up counts from 1, as in the paper and the authors' code: update n has n / slow_steps of it, at most all.
  """

  b1: float = rate(0.9)  # decay of the fast mean of gradients, per step
  b2: float = rate(0.999)  # decay of the mean of squared gradients, per step
  b3: float = rate(0.9999)  # decay of the slow mean of gradients, per step
  alpha: float = positive(5.0)  # weight of the slow mean
  slow_steps: int = at_least(0, 0)  # warm-up steps of alpha and b3; 0: none. The paper uses all of training
  eps: float = epsilon(1e-8)  # added to the denominator
  weight_decay: float = decay(0.1)  # decoupled, times the learning rate; 0: none
  mu_dtype: MuDtype = 'float32'  # of the fast mean, as stored

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.b3 < self.b1:
      raise ValueError(f'b3 {self.b3} must not be less than b1 {self.b1}: it is the rate of the slower momentum')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    alpha: optax.ScalarOrSchedule = self.alpha
    b3: optax.ScalarOrSchedule = self.b3
    if self.slow_steps:
      alphas = optax.linear_schedule(0.0, self.alpha, self.slow_steps)
      half_lives = optax.linear_schedule(*(half_life(b) for b in (self.b1, self.b3)), self.slow_steps)
      alpha = lambda n: alphas(n + 1)  # noqa: E731
      b3 = lambda n: 0.5 ** (1 / (half_lives(n + 1) + 1))  # noqa: E731
    inner = contrib.ademamix(schedule, self.b1, self.b2, b3, alpha, self.eps, weight_decay=self.weight_decay,
                             mask=matrices)

    def stored(state: Any) -> Any:  # Optax's own mu_dtype also holds the slow mean, which would lose its small steps
      return (state[0]._replace(m1=optax.tree.cast(state[0].m1, self.mu_dtype)), *state[1:])

    def update(grads: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
      updates, new = inner.update(grads, state, params)
      return updates, stored(new)

    return optax.GradientTransformation(lambda params: stored(inner.init(params)), update)


def half_life(b: float) -> float:
  """The half-life in steps, less one, of a decaying average with rate b: equation 4 of arXiv 2409.03137."""
  return math.log(0.5) / math.log(b) - 1 if b else 0.0


@dataclasses.dataclass(frozen=True)
class Prodigy(Link):
  """Prodigy (arXiv 2306.06101): Adam that estimates its learning rate; config.optim.learning_rate is a factor on it.

  The package prodigyopt has neither bias_correction nor safeguard_warmup unless they are set. Its coupled decay is the
  filter l2.
  """

  b1: float = rate(0.9)  # decay of the mean of gradients, per step
  b2: float = rate(0.999)  # decay of the mean of squared gradients, per step
  estim_lr0: float = positive(1e-6)  # first estimate of the step size
  estim_lr_coef: float = positive(1.0)  # factor on the estimated step size
  safeguard_warmup: bool = True  # keep warm-up steps out of the estimate
  bias_correction: bool = True  # Adam's, as a factor on the step size
  weight_decay: float = decay(0.0)  # decoupled, times the step size; 0: none

  def check(self, optim: Any) -> None:
    if any(group.decays for group in optim.groups.values()) or optim.learning_rate < 0.1:
      raise ValueError('prodigy estimates its learning rate, and learning_rate multiplies the estimate: set it to 1 or '
                       f'near 1; got {optim.learning_rate}; groups cannot set weight_decay')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def correction(count: jax.Array) -> jax.Array:
      return jnp.sqrt(1 - self.b2 ** (count + 1)) / (1 - self.b1 ** (count + 1))

    # Optax's own always corrects, so the correction is taken out of the rate that it is given.
    given = schedule if self.bias_correction else lambda count: schedule(count) / correction(count)
    inner = contrib.prodigy(given, (self.b1, self.b2), estim_lr0=self.estim_lr0, estim_lr_coef=self.estim_lr_coef,
                            safeguard_warmup=self.safeguard_warmup)

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
      updates, new = inner.update(grads, state, params)
      # Optax's own decay includes biases.
      rate = self.weight_decay * state.estim_lr * given(state.count) * correction(state.count)
      updates = jax.tree.map(lambda u, p, m: u - rate * p if m else u, updates, params, matrices(params))
      # Optax divides zero by zero while all gradients so far are zero.
      finite = jnp.isfinite(new.estim_lr)
      return jax.tree.map(lambda u: jnp.where(finite, u, 0), updates), optax.tree.where(finite, new, state)

    return optax.GradientTransformation(inner.init, update)

  def report(self, state: Any) -> dict[str, jax.Array]:
    return {'estimated_learning_rate': state.estim_lr}


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Link):
  """AdamW with schedule-free averaging of weights (arXiv 2405.15682). Needs schedule `constant`, with warm-up.

  As AdamWScheduleFree of the authors' package schedulefree, whose decay includes biases.
  """

  # weight of the average in the point where gradients are taken, in (0, 1)
  b1: float = ranged(0.9, lambda x: 0 < x < 1, 'in (0, 1)')
  b2: float = rate(0.95)  # decay of the mean of squared gradients, per step
  eps: float = epsilon(1e-8)  # added to the denominator
  weight_decay: float = decay(0.1)  # decoupled, times the learning rate; 0: none
  weight_lr_power: float = 2.0  # exponent of the learning rate in a step's weight in the average
  averages = True

  def check(self, optim: Any) -> None:
    factors = any(link.scales for link in optim.links) or any(group.scales for group in optim.groups.values())
    if factors or optim.schedule != 'constant':
      raise ValueError('schedule_free averages its own steps, so nothing else may scale them: set schedule=constant, '
                       'and remove reduce_on_plateau, noise_adaptive and the factors of groups')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    inner = optax.adamw(schedule, 0.0, self.b2, self.eps, weight_decay=self.weight_decay, mask=matrices)
    # Optax's counts from 1, but the weight of a step is to follow the rate of this step, not of the next.
    return contrib.schedule_free(inner, lambda step: schedule(step - 1), self.b1, self.weight_lr_power)

  def evaluated(self, state: Any, params: Params) -> Params:
    return contrib.schedule_free_eval_params(state, params)


@dataclasses.dataclass(frozen=True)
class L2(Link):
  """L2 regularization: adds weight_decay * p to the gradient, before the optimizer scales it.

  With Adam, unlike adamw, the decay is strongest where gradients are small (arXiv 1711.05101, section 2).
  """

  weight_decay: float = positive(0.01)  # factor of the weights that is added to gradients
  pattern: str = '/w$'  # regular expression for the paths of decayed parameters; '^blocks.*/w$' excludes tables
  place = 'filter'

  def __post_init__(self) -> None:
    super().__post_init__()
    regular(self.pattern)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.add_decayed_weights(self.weight_decay, lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: re.search(self.pattern, path_of(path)) is not None, params))


@dataclasses.dataclass(frozen=True)
class AdaptiveGradClip(Link):
  """Adaptive gradient clipping (arXiv 2102.06171, equation 3): each unit's gradient to `clipping` times its weights.

  A unit has a norm of its own: the weights of one output of a matrix, a row of a table, or the whole of a bias or norm,
  in each layer of a stack. Weights smaller than `eps` count as `eps`, so that zeros can grow.
  """

  clipping: float = positive(0.01)  # largest norm of a unit's gradient, as a multiple of the norm of its weights
  eps: float = epsilon(1e-3)  # least norm of weights, so that zeros can grow
  place = 'filter'

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    check_declared(info)

    def clip(grad: jax.Array, weights: jax.Array, units: ParamInfo) -> jax.Array:
      tx = optax.adaptive_grad_clip(self.clipping, self.eps, unit_dims(units))
      return tx.update(grad, tx.init(weights), weights)[0]

    return optax.stateless(lambda grads, params: jax.tree.map(clip, grads, params, info))


def unit_dims(info: ParamInfo) -> tuple[int, ...]:
  """The dimensions of a parameter inside one unit."""
  if info.inputs or info.is_table:
    return info.inputs or info.outputs
  return tuple(i for i in range(len(info.shape)) if i not in info.batch)


for _name, _link in (('adafactor', Adafactor), ('ademamix', AdEMAMix), ('prodigy', Prodigy),
                     ('schedule_free', ScheduleFree), ('l2', L2), ('adaptive_grad_clip', AdaptiveGradClip)):
  register(TRANSFORMS, _name, _link)
