"""The product of activations and a matrix in low precision, accumulated in float32, with its gradient.

Dims: B batch, T length, E experts, D embed, F mlp.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from llm_jax.base.sharding import beside_weights, constrain, gathered


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 5, 6, 7))
def mixed_einsum(eqn: str, dtype: Dtype, x: jax.Array, w: jax.Array, copy: jax.Array | None = None,
                 out_dtype: Dtype = jnp.float32, grad_dtype: Dtype = jnp.float32,
                 axes: tuple[str, ...] | None = None) -> jax.Array:
  """einsum(eqn, x, w) with operands in `dtype`, forward and backward, accumulated in float32, returned in `out_dtype`.

  `eqn` has two operands and no repeated or dropped letters. Without batch dimensions, rows lead in x and y and occur
  nowhere else: 'BTD,DNH->BTNH'. Letters in x, w and y are batch dimensions, anywhere: 'EBD,EDF->EBF', 'BTED,EDF->BTEF'.
  If `copy` is given, the products use it instead of w. The gradient is that of w, in w's dtype; devices sum their
  parts of it in `grad_dtype`. With the logical `axes` of w, each pass gathers a sharded w once, in `dtype`, and the
  gradient is sharded like w.
  """
  w = _whole(w if copy is None else copy, dtype, axes)
  if axes is None:
    return _product(eqn, x.astype(dtype), w, out_dtype)
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  names = dict(zip(w_dims, axes, strict=True))
  x = beside_weights(x.astype(dtype), *map(names.get, x_dims))
  return beside_weights(_product(eqn, x, w, out_dtype), *map(names.get, y_dims))


def _whole(w: jax.Array, dtype: Dtype, axes: tuple[str, ...] | None, backward: bool = False) -> jax.Array:
  return w.astype(dtype) if axes is None else gathered(w.astype(dtype), axes, backward)


def _product(eqn: str, x: jax.Array, w: jax.Array, out_dtype: Dtype) -> jax.Array:
  if batch_dims(eqn):
    return _stacked_product(eqn, x, w, out_dtype)
  eqn, x, w = _merge_summed(eqn, x, w)
  return jnp.einsum(eqn, x, w, preferred_element_type=out_dtype)


def batch_dims(eqn: str) -> str:
  """The letters of an equation's batch dimensions, such as experts, in the order of w."""
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  return ''.join(d for d in w_dims if d in x_dims and d in y_dims)


def _stacked_product(eqn: str, x: jax.Array, w: jax.Array, out_dtype: Dtype) -> jax.Array:
  """The product with batch dimensions moved to the front, as XLA:CPU lacks some bfloat16 kernels for other orders."""
  batch, dims = batch_dims(eqn), re.split(',|->', eqn)
  x_dims, w_dims, y_dims = (batch + ''.join(d for d in part if d not in batch) for part in dims)
  x, w = aligned(x, dims[0], x_dims), aligned(w, dims[1], w_dims)
  y = jnp.einsum(f'{x_dims},{w_dims}->{y_dims}', x, w, preferred_element_type=out_dtype)
  return aligned(y, y_dims, dims[2])


def _merge_summed(eqn: str, x: jax.Array, w: jax.Array) -> tuple[str, jax.Array, jax.Array]:
  """Merges the trailing summed dimensions of x into one, as XLA:CPU would copy and transpose w for two."""
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  summed = ''.join(d for d in x_dims if d not in y_dims)
  if len(summed) < 2 or not x_dims.endswith(summed) or summed not in w_dims:
    return eqn, x, w
  first = w_dims.index(summed)
  x = x.reshape(*x.shape[:-len(summed)], -1)
  w = w.reshape(*w.shape[:first], -1, *w.shape[first + len(summed):])
  return eqn.replace(summed, summed[0]), x, w


def _mixed_einsum_fwd(eqn: str, dtype: Any, x: jax.Array, w: jax.Array, copy: Any, out_dtype: Any, grad_dtype: Any,
                      axes: Any) -> tuple[jax.Array, Any]:
  # x is saved in `dtype`, w as it is used, but not gathered.
  likes = jnp.zeros((), x.dtype), jnp.zeros((), w.dtype)
  y = mixed_einsum(eqn, dtype, x, w, copy, out_dtype, grad_dtype, axes)
  return y, (x.astype(dtype), w if copy is None else copy, *likes)


def _mixed_einsum_bwd(eqn: str, dtype: Any, out_dtype: Any, grad_dtype: Any, axes: Any, residuals: Any,
                      dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x, w, x_like, w_like = residuals
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  dy, whole = dy.astype(dtype), _whole(w, dtype, axes, backward=True)
  dx_dtype = min(jnp.dtype(out_dtype), x_like.dtype, key=lambda dtype: dtype.itemsize)
  dx = _product(f'{y_dims},{w_dims}->{x_dims}', dy, whole, dx_dtype).astype(x_like.dtype)
  if dtype == jnp.float32 and not batch_dims(eqn):
    # With B and T merged into one summed dimension XLA:CPU does not copy x; its bfloat16 kernels need the copy.
    num_rows = sum(d not in w_dims for d in x_dims)
    x, dy = (a.reshape(-1, *a.shape[num_rows:]) for a in (x, dy))
    x_dims, y_dims = x_dims[num_rows - 1:], y_dims[num_rows - 1:]
  dw = _product(f'{x_dims},{y_dims}->{w_dims}', x, dy, grad_dtype)
  return dx, (dw if axes is None else constrain(dw, *axes)).astype(w_like.dtype), None


mixed_einsum.defvjp(_mixed_einsum_fwd, _mixed_einsum_bwd)


def aligned(x: jax.Array, x_dims: str, y_dims: str) -> jax.Array:
  """x with the dimensions of y in their order; dimensions that x lacks have size 1."""
  sizes = dict(zip(x_dims, x.shape, strict=True))
  x = x.transpose([x_dims.index(d) for d in y_dims if d in sizes])
  return x.reshape([sizes.get(d, 1) for d in y_dims])
