"""Muon: momentum, orthogonalized by Newton-Schulz (kellerjordan.github.io/posts/muon), and the parts of its relatives.

Dims: S stack of matrices, M inputs, N outputs of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.base.ranges import decay, positive, rate
from llm_jax.optim.link import Link
from llm_jax.optim.matrices import each_stack, with_adam
from llm_jax.optim.optimizers import MuDtype

JORDAN = (3.4445, -4.775, 2.0315)  # of Newton-Schulz: steep at 0, so that 5 steps suffice; singular values end near 1
EXACT = (2.0, -1.5, 0.5)  # singular values end at 1, after 12 steps


class MomentumState(NamedTuple):
  step: jax.Array  # int32
  mu: Params


def scale_by_momentum(beta: float, nesterov: bool, mix: str, mu_dtype: MuDtype) -> optax.GradientTransformation:
  """The mean m of gradients, with Nesterov's look ahead b m + (1 - b) g.

  `mix` matters only then: corrected divides m by 1 - b^(t + 1) and g by 1 - b^t at step t, as NAdam and Optax's muon
  do; uncorrected does not, as in Keller Jordan's and Moonshot's code.
  """
  def init(params: Params) -> MomentumState:
    return MomentumState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

  def update(grads: Params, state: MomentumState, params: Params = None) -> tuple[Params, MomentumState]:
    step = optax.safe_increment(state.step)
    mu = optax.tree.update_moment(grads, state.mu, beta, 1)
    lack = [1 - beta ** (step + i) if mix == 'corrected' else 1.0 for i in (0, 1)]
    ahead = jax.tree.map(lambda m, g: beta * m / lack[1] + (1 - beta) * g / lack[0], mu, grads) if nesterov else mu
    return ahead, MomentumState(step, optax.tree.cast(mu, mu_dtype))

  return optax.GradientTransformation(init, update)


def frobenius_norm(x_SMN: jax.Array) -> jax.Array:
  return jnp.linalg.norm(x_SMN, axis=(1, 2), keepdims=True)


def orthogonalized(x_SMN: jax.Array, steps: int, coefficients: tuple[float, float, float] = JORDAN,
                   norm: Callable[[jax.Array], jax.Array] = frobenius_norm) -> jax.Array:
  """Each matrix with its singular values near 1: x = a x + (b xx' + c (xx')^2) x, from norm 1, in x's own dtype."""
  a, b, c = coefficients
  tall = x_SMN.shape[1] > x_SMN.shape[2]
  x = jnp.swapaxes(x_SMN, 1, 2) if tall else x_SMN
  x = x / (norm(x) + 1e-7)
  for _ in range(steps):
    square = x @ jnp.swapaxes(x, 1, 2)
    x = a * x + (b * square + c * square @ square) @ x
  return jnp.swapaxes(x, 1, 2) if tall else x


def shape_factor(scale: str, consistent_rms: float, x_SMN: jax.Array) -> float:
  """The factor on an orthogonalized update: Moonshot's (arXiv 2502.16982, equation 4) or Keller Jordan's."""
  _, M, N = x_SMN.shape
  return consistent_rms * max(M, N) ** 0.5 if scale == 'moonshot' else max(1.0, N / M) ** 0.5


@dataclasses.dataclass(frozen=True)
class Muon(Link):
  """Muon: momentum orthogonalized by Newton-Schulz for matrices between hidden states; Adam for other parameters.

  See kellerjordan.github.io/posts/muon. Each matrix of a stack of layers or experts is orthogonalized separately, in
  float32. The scale `moonshot`, consistent_rms * sqrt(max(inputs, outputs)) of arXiv 2502.16982, gives updates the size
  of Adam's, so that both use one learning rate; `jordan` is sqrt(max(1, outputs / inputs)).
  """

  beta: float = rate(0.95)  # decay of the momentum, per step
  ns_steps: int = positive(5)  # Newton-Schulz iterations
  nesterov: bool = True  # look ahead along the momentum
  mix: Literal['corrected', 'uncorrected'] = 'corrected'  # with nesterov: as in NAdam, or Keller Jordan's
  scale: Literal['moonshot', 'jordan'] = 'moonshot'  # of updates by the shape of their matrix
  consistent_rms: float = positive(0.2)  # rms of an update before the learning rate, with scale moonshot
  weight_decay: float = decay(0.1)  # decoupled, times the learning rate; 0: none
  adam_b1: float = rate(0.9)  # b1 of the Adam for other parameters
  adam_b2: float = rate(0.95)  # b2 of the Adam for other parameters
  mu_dtype: MuDtype = 'float32'  # of the momentum, as stored

  def __post_init__(self) -> None:
    if self.consistent_rms is None:
      raise ValueError('consistent_rms must be a number; for Keller Jordan\'s scale, set scale to jordan')
    super().__post_init__()

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return with_adam(info, self.of_matrices, optax.scale_by_adam(self.adam_b1, self.adam_b2, mu_dtype=self.mu_dtype),
                     schedule, self.weight_decay)

  def of_matrices(self, dims: Params) -> optax.GradientTransformation:
    """The direction of the update of matrices, for a tree of Dims."""
    return optax.chain(self.momentum(), each_stack(self.finish, dims))

  def momentum(self) -> optax.GradientTransformation:
    return scale_by_momentum(self.beta, self.nesterov, self.mix, self.mu_dtype)

  def finish(self, x_SMN: jax.Array) -> jax.Array:
    """A momentum, orthogonalized and scaled."""
    return shape_factor(self.scale, self.consistent_rms, x_SMN) * orthogonalized(x_SMN, self.ns_steps)
