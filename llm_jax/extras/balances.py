"""Balances that weight losses by uncertainty or by gradient norms; see losses/balance.py. Dims: I losses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.base.registry import NoSettings, register
from llm_jax.losses.balance import BALANCES, Balance, Norms


@dataclasses.dataclass(frozen=True)
class Uncertainty(Balance):
  """sum_i exp(-s_i) L_i + s_i / 2, s_i = log sigma_i^2 of the noise in task i (Kendall et al., arXiv 1705.07115)."""

  learns = True

  def __call__(self, losses_I: jax.Array, s_I: jax.Array, share: float, norms: Norms, initial_I: jax.Array):
    del norms, initial_I
    weights_I = jnp.exp(-s_I)
    return jnp.sum(weights_I * losses_I) + share * jnp.sum(s_I) / 2, weights_I


@dataclasses.dataclass(frozen=True)
class GradNorm(Balance):
  """GradNorm (Chen et al., arXiv 1711.02257): trains weights that bring each loss's gradient to a target norm.

  With w = I softmax(s), G_i = w_i |grad L_i| and r_i = L_i / L_i(0), divided by its mean, the weights minimize
  sum_i |G_i - mean(G) r_i^alpha| and the model minimizes sum_i w_i L_i. The paper takes gradients with respect to a
  layer's weights; here they are with respect to the shared hidden states, as in arXiv 1810.04650, and L_i(0) is the
  loss of an uninformed prediction.
  """

  alpha: float = 1.5
  learns = True
  row_wise = False
  by_speed = True

  def __call__(self, losses_I: jax.Array, s_I: jax.Array, share: float, norms: Norms, initial_I: jax.Array):
    del share
    weights_I = s_I.size * jax.nn.softmax(s_I)
    norms_I = jax.lax.stop_gradient(norms())
    ratio_I = jax.lax.stop_gradient(losses_I) / initial_I
    target_I = jnp.mean(weights_I * norms_I) * (ratio_I / jnp.mean(ratio_I)) ** self.alpha
    balance = jnp.sum(jnp.abs(weights_I * norms_I - jax.lax.stop_gradient(target_I)))
    return jnp.sum(jax.lax.stop_gradient(weights_I) * losses_I) + balance, weights_I


register(BALANCES, 'uncertainty', Uncertainty, NoSettings)
register(BALANCES, 'grad_norm', GradNorm, NoSettings)
