"""The optimizers: config sections that make Optax's optimizers. Weight decay applies to matrices and embeddings.

`mu_dtype` is the dtype of the stored first moment.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llm_jax.base.batch import Params
from llm_jax.optim.link import Link, at_least, positive, rates
from llm_jax.optim.masks import check_declared, matrices, matrix_dims

MuDtype = Literal['float32', 'bfloat16']


def decayed(tx: optax.GradientTransformation, schedule: optax.Schedule, weight_decay: float,
            mask: Any = matrices) -> optax.GradientTransformation:
  """Adds decoupled decay (arXiv 1711.05101) to `tx`, whose updates are final: p shrinks by learning rate * decay."""
  if not weight_decay:
    return tx
  return optax.chain(tx, optax.add_decayed_weights(lambda n: -weight_decay * schedule(n), mask))


@dataclasses.dataclass(frozen=True)
class AdamW(Link):
  """Adam with decoupled weight decay (arXiv 1711.05101)."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  mu_dtype: MuDtype = 'float32'

  def __post_init__(self) -> None:
    rates(b1=self.b1, b2=self.b2)
    positive(eps=self.eps)
    at_least(0, weight_decay=self.weight_decay)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.adamw(schedule, self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype, weight_decay=self.weight_decay,
                       mask=matrices)


@dataclasses.dataclass(frozen=True)
class Adam(Link):
  """Adam (arXiv 1412.6980), without decay; with `nesterov`, NAdam."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  nesterov: bool = False
  mu_dtype: MuDtype = 'float32'

  def __post_init__(self) -> None:
    rates(b1=self.b1, b2=self.b2)
    positive(eps=self.eps)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.adam(schedule, self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype, nesterov=self.nesterov)


@dataclasses.dataclass(frozen=True)
class Sgd(Link):
  """Stochastic gradient descent with momentum, optionally Nesterov's."""

  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 0.0
  accumulator_dtype: MuDtype = 'float32'

  def __post_init__(self) -> None:
    rates(momentum=self.momentum)
    at_least(0, weight_decay=self.weight_decay)
    if self.nesterov and not self.momentum:
      raise ValueError('nesterov needs a momentum above 0')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return decayed(optax.sgd(schedule, self.momentum or None, self.nesterov, self.accumulator_dtype), schedule,
                   self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Lion(Link):
  """Lion (arXiv 2302.06675): the sign of an interpolated momentum. Needs 3 to 10 times lower rates than Adam."""

  b1: float = 0.9
  b2: float = 0.99
  weight_decay: float = 0.5
  mu_dtype: MuDtype = 'float32'

  def __post_init__(self) -> None:
    rates(b1=self.b1, b2=self.b2)
    at_least(0, weight_decay=self.weight_decay)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.lion(schedule, self.b1, self.b2, self.mu_dtype, self.weight_decay, mask=matrices)


@dataclasses.dataclass(frozen=True)
class Adafactor(Link):
  """Adafactor (arXiv 1804.04235): second moments factored over each array's two largest sides, if both are large.

  Clipping and scaling by the parameter apply to whole arrays; for a stack that is all layers together.
  """

  decay_rate: float = 0.8
  min_dim_size_to_factor: int = 128
  multiply_by_parameter_scale: bool = True
  clipping_threshold: float = 1.0
  momentum: float = 0.0
  weight_decay: float = 0.0
  mu_dtype: MuDtype = 'float32'  # of the momentum

  def __post_init__(self) -> None:
    rates(decay_rate=self.decay_rate, momentum=self.momentum)
    positive(clipping_threshold=self.clipping_threshold, min_dim_size_to_factor=self.min_dim_size_to_factor)
    at_least(0, weight_decay=self.weight_decay)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return decayed(optax.adafactor(
        schedule, self.min_dim_size_to_factor, self.decay_rate,
        multiply_by_parameter_scale=self.multiply_by_parameter_scale, clipping_threshold=self.clipping_threshold,
        momentum=self.momentum or None, dtype_momentum=self.mu_dtype), schedule, self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Muon(Link):
  """Muon: momentum orthogonalized by Newton-Schulz for matrices between hidden states; Adam for other parameters.

  See kellerjordan.github.io/posts/muon. `consistent_rms` (arXiv 2502.16982) gives updates the size of Adam's, so that
  both use one learning rate. Each matrix of a stack of layers or experts is orthogonalized separately.
  """

  beta: float = 0.95
  ns_steps: int = 5
  nesterov: bool = True
  consistent_rms: float = 0.2
  weight_decay: float = 0.1
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  mu_dtype: MuDtype = 'float32'

  def __post_init__(self) -> None:
    rates(beta=self.beta, adam_b1=self.adam_b1, adam_b2=self.adam_b2)
    positive(ns_steps=self.ns_steps, consistent_rms=self.consistent_rms)
    at_least(0, weight_decay=self.weight_decay)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    check_declared(info)
    return decayed(contrib.muon(
        schedule, ns_steps=self.ns_steps, beta=self.beta, nesterov=self.nesterov, mu_dtype=self.mu_dtype,
        adam_b1=self.adam_b1, adam_b2=self.adam_b2, consistent_rms=self.consistent_rms,
        muon_weight_dimension_numbers=matrix_dims(info)), schedule, self.weight_decay)


@dataclasses.dataclass(frozen=True)
class AdEMAMix(Link):
  """AdEMAMix (arXiv 2409.03137): Adam with a second, much slower momentum, with warm-up of its rate and weight."""

  b1: float = 0.9
  b2: float = 0.999
  b3: float = 0.9999
  alpha: float = 5.0
  slow_steps: int = 0  # warm-up steps of alpha and b3; 0: none. The paper uses all of training
  eps: float = 1e-8
  weight_decay: float = 0.1
  mu_dtype: MuDtype = 'float32'

  def __post_init__(self) -> None:
    rates(b1=self.b1, b2=self.b2, b3=self.b3)
    positive(eps=self.eps, alpha=self.alpha)
    at_least(0, weight_decay=self.weight_decay, slow_steps=self.slow_steps)
    if self.b3 < self.b1:
      raise ValueError(f'b3 {self.b3} must not be less than b1 {self.b1}: it is the rate of the slower momentum')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    alpha: optax.ScalarOrSchedule = self.alpha
    b3: optax.ScalarOrSchedule = self.b3
    if self.slow_steps:
      alpha = optax.linear_schedule(0.0, self.alpha, self.slow_steps)
      half_lives = optax.linear_schedule(*(half_life(b) for b in (self.b1, self.b3)), self.slow_steps)
      b3 = lambda n: 0.5 ** (1 / (half_lives(n) + 1))  # noqa: E731
    return contrib.ademamix(schedule, self.b1, self.b2, b3, alpha, self.eps, mu_dtype=self.mu_dtype,
                            weight_decay=self.weight_decay, mask=matrices)


def half_life(b: float) -> float:
  """The half-life in steps, less one, of a decaying average with rate b: equation 4 of arXiv 2409.03137."""
  return math.log(0.5) / math.log(b) - 1 if b else 0.0


@dataclasses.dataclass(frozen=True)
class Prodigy(Link):
  """Prodigy (arXiv 2306.06101): Adam that estimates its learning rate; config.optim.learning_rate is a factor on it."""

  b1: float = 0.9
  b2: float = 0.999
  estim_lr0: float = 1e-6
  estim_lr_coef: float = 1.0
  safeguard_warmup: bool = True
  weight_decay: float = 0.0

  def __post_init__(self) -> None:
    rates(b1=self.b1, b2=self.b2)
    positive(estim_lr0=self.estim_lr0, estim_lr_coef=self.estim_lr_coef)
    at_least(0, weight_decay=self.weight_decay)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    inner = contrib.prodigy(schedule, (self.b1, self.b2), estim_lr0=self.estim_lr0, estim_lr_coef=self.estim_lr_coef,
                            safeguard_warmup=self.safeguard_warmup)

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
      updates, new = inner.update(grads, state, params)
      rate = self.weight_decay * state.estim_lr * schedule(state.count)  # Optax's own decay includes biases
      updates = jax.tree.map(lambda u, p, m: u - rate * p if m else u, updates, params, matrices(params))
      # Optax divides zero by zero while all gradients so far are zero.
      finite = jnp.isfinite(new.estim_lr)
      return jax.tree.map(lambda u: jnp.where(finite, u, 0), updates), optax.tree.where(finite, new, state)

    return optax.GradientTransformation(inner.init, update)

  def report(self, state: Any) -> dict[str, jax.Array]:
    return {'estimated_learning_rate': state.estim_lr}


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Link):
  """AdamW with schedule-free averaging of weights (arXiv 2405.15682). Needs schedule `constant`, with warm-up."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  weight_lr_power: float = 2.0

  def __post_init__(self) -> None:
    rates(b1=self.b1, b2=self.b2)
    positive(b1=self.b1, eps=self.eps)
    at_least(0, weight_decay=self.weight_decay)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    inner = optax.adamw(schedule, 0.0, self.b2, self.eps, weight_decay=self.weight_decay, mask=matrices)
    return contrib.schedule_free(inner, schedule, self.b1, self.weight_lr_power)

  @property
  def averages(self) -> bool:
    return True

  def evaluated(self, state: Any, params: Params) -> Params:
    return contrib.schedule_free_eval_params(state, params)
