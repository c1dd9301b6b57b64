"""Balances, which weight several losses against each other; here fixed weights, others in extras/balances.py.

A balance is called with the losses L_i, already multiplied by the config's weights; its learned parameters s_i, which
start at zero; the microbatch's share of the batch; norms(), the norms of the losses' gradients with respect to the
shared hidden states; and the losses before training. It returns the objective and the weight of each loss, for the log.
Dims: I losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from llm_jax.base.registry import NoSettings, Registry, register

Norms = Callable[[], jax.Array]


@dataclasses.dataclass(frozen=True)
class Balance:
  """The base class of balances, and the balance with fixed weights: sum_i L_i."""

  alpha: float = 0.0
  learns: ClassVar[bool] = False  # whether s is trained
  row_wise: ClassVar[bool] = True  # whether the objectives of microbatches add up to that of the batch
  by_speed: ClassVar[bool] = False  # whether it favours losses that decrease slowly, by alpha, whatever their weights

  def __call__(self, losses_I: jax.Array, s_I: jax.Array, share: float, norms: Norms,
               initial_I: jax.Array) -> tuple[jax.Array, jax.Array]:
    del s_I, share, norms, initial_I
    return jnp.sum(losses_I), jnp.ones_like(losses_I)


BALANCES = Registry('balance')
register(BALANCES, 'fixed', Balance, NoSettings)
