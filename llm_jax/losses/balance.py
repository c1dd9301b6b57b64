"""How several losses are weighted against each other; here by fixed weights. Others: extras/balances.py.

A balance is called with the losses L_i, already multiplied by the config's weights, its trained numbers s_i (zeros at
first), the microbatch's share of the batch, norms() of the losses' gradients by the hidden states that they share, and
the losses before training. It returns the objective and the weight of each loss, which is logged. Dims: I losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llm_jax.base.registry import NoSettings, Registry, register

Norms = Callable[[], jax.Array]


@dataclasses.dataclass(frozen=True)
class Fixed:
  """sum_i L_i."""

  alpha: float = 0.0
  learns = False  # s
  row_wise = True  # whether parts of a batch add up to the whole

  def __call__(self, losses_I: jax.Array, s_I: jax.Array, share: float, norms: Norms,
               initial_I: jax.Array) -> tuple[jax.Array, jax.Array]:
    del s_I, share, norms, initial_I
    return jnp.sum(losses_I), jnp.ones_like(losses_I)


BALANCES = Registry('balance')
register(BALANCES, 'fixed', Fixed, NoSettings)
