"""Losses weighted by their uncertainty, or by the norms of their gradients. See losses/balance.py. Dims: I losses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.base.registry import NoSettings, register
from llm_jax.losses.balance import BALANCES, Norms


@dataclasses.dataclass(frozen=True)
class Uncertainty:
  """sum_i exp(-s_i) L_i + s_i / 2, s_i = log sigma_i^2 of the noise in task i (Kendall et al., arXiv 1705.07115)."""

  alpha: float = 0.0
  learns = True
  row_wise = True

  def __call__(self, losses_I: jax.Array, s_I: jax.Array, share: float, norms: Norms, initial_I: jax.Array):
    del norms, initial_I
    weights_I = jnp.exp(-s_I)
    return jnp.sum(weights_I * losses_I) + share * jnp.sum(s_I) / 2, weights_I


@dataclasses.dataclass(frozen=True)
class GradNorm:
  """GradNorm (Chen et al., arXiv 1711.02257): weights that bring each loss's gradient to the norm that it should have.

  With w = I softmax(s), G_i = w_i |grad L_i| and r_i = L_i / L_i(0), over its mean, the weights descend on
  sum_i |G_i - mean(G) r_i^alpha| and the model on sum_i w_i L_i. Their norms are of a layer's weights; here, as in
  arXiv 1810.04650, of the hidden states that all losses share, and L_i(0) is the loss of someone who knows nothing.
  """

  alpha: float = 1.5
  learns = True
  row_wise = False

  def __call__(self, losses_I: jax.Array, s_I: jax.Array, share: float, norms: Norms, initial_I: jax.Array):
    del share
    weights_I = s_I.size * jax.nn.softmax(s_I)
    norms_I = jax.lax.stop_gradient(norms())
    behind_I = jax.lax.stop_gradient(losses_I) / initial_I
    wanted_I = jnp.mean(weights_I * norms_I) * (behind_I / jnp.mean(behind_I)) ** self.alpha
    balance = jnp.sum(jnp.abs(weights_I * norms_I - jax.lax.stop_gradient(wanted_I)))
    return jnp.sum(jax.lax.stop_gradient(weights_I) * losses_I) + balance, weights_I


register(BALANCES, 'uncertainty', Uncertainty, NoSettings)
register(BALANCES, 'grad_norm', GradNorm, NoSettings)
