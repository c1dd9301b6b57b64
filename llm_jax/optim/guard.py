"""Applies an update, unless a value that is not finite would be used or written, or a link of the chain objects."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.host_memory import fetched, is_held, put_back

# Float32 ends at 3.4e38. A larger sum of squares of the gradients, or a larger value to be written, is an error; below
# it, second moments cannot overflow, even if a filter amplifies the gradients.
LARGEST = 1e30


def guarded_update(optimizer: Any, grads: Params, opt_state: optax.OptState, params: Params, *, loss: jax.Array,
                   extra_loss: jax.Array) -> tuple[Params, optax.OptState, Metrics]:
  """(params, opt_state, {'grad_norm': ..., 'skipped': 1 if the update was not applied}).

  Decided before the update, so that it can write in place. What it has written is checked when it is saved
  (training/finite.py), which costs nothing in between: a value that is not finite makes the losses of later steps so.
  """
  squares = optax.tree.norm(grads, squared=True)
  accepted, opt_state = optimizer.judge(opt_state, loss, jnp.sqrt(squares))
  accepted &= jnp.isfinite(loss + extra_loss) & (squares < LARGEST)

  def update(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
    updates, opt_state = optimizer.update(grads, opt_state, params, value=loss, grad=grads)
    return optax.apply_updates(params, updates), opt_state

  held = params, opt_state
  if any(map(is_held, jax.tree.leaves(held))):  # array by array, so that few of them are on the devices at a time
    near = fetched(held)
    new = jax.tree.map(lambda x, old: jnp.where(accepted, x, old), update(*near), near)
    params, opt_state = put_back(new, held)
  else:
    params, opt_state = jax.lax.cond(accepted, update, lambda *unchanged: unchanged, *held)
  return params, opt_state, {'grad_norm': jnp.sqrt(squares), 'skipped': 1 - accepted.astype(jnp.int32)}
