"""Einsum and Embed: the only owners of matrices; the one address of dtype, logical axes and initialisation.

Dims: B batch, T length, D embed, V vocab.
"""

from __future__ import annotations

import functools
import re
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.registry import NoSettings, Registry, factory_of, register


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mixed_einsum(eqn: str, dtype: Dtype, x: jax.Array, w: jax.Array, copy: jax.Array | None = None) -> jax.Array:
  """einsum(eqn, x, w) with operands in `dtype`, forward and backward, accumulated and returned in float32.

  `eqn` is two-operand without repeated or dropped letters; rows lead in x and y and nowhere else: 'BTD,DNH->BTNH'.
  The gradient is w's, in its own dtype; what the products read is `copy`, if there is one.
  """
  eqn, x, w = _merge_summed(eqn, x, w if copy is None else copy)
  return jnp.einsum(eqn, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)


def _merge_summed(eqn: str, x: jax.Array, w: jax.Array) -> tuple[str, jax.Array, jax.Array]:
  """The same with the last dimensions of x, if all are summed over, as one: of w XLA:CPU would transpose a copy."""
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  summed = ''.join(d for d in x_dims if d not in y_dims)
  if len(summed) < 2 or not x_dims.endswith(summed) or summed not in w_dims:
    return eqn, x, w
  first = w_dims.index(summed)
  x = x.reshape(*x.shape[:-len(summed)], -1)
  w = w.reshape(*w.shape[:first], -1, *w.shape[first + len(summed):])
  return eqn.replace(summed, summed[0]), x, w


def _mixed_einsum_fwd(eqn, dtype, x, w, copy):
  # x is kept in `dtype`, w as it was read.
  likes = jnp.zeros((), x.dtype), jnp.zeros((), w.dtype)
  return mixed_einsum(eqn, dtype, x, w, copy), (x.astype(dtype), w if copy is None else copy, *likes)


def _mixed_einsum_bwd(eqn, dtype, residuals, dy):
  x, w, x_like, w_like = residuals
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  dx = mixed_einsum(f'{y_dims},{w_dims}->{x_dims}', dtype, dy, w).astype(x_like.dtype)
  if dtype == jnp.float32:
    # Summed over one dimension instead of B and T, XLA:CPU reads x as it lies; its bfloat16 kernels want the copy.
    num_rows = sum(d not in w_dims for d in x_dims)
    x, dy = (a.reshape(-1, *a.shape[num_rows:]) for a in (x, dy))
    x_dims, y_dims = x_dims[num_rows - 1:], y_dims[num_rows - 1:]
  dw = mixed_einsum(f'{x_dims},{y_dims}->{w_dims}', dtype, x, dy).astype(w_like.dtype)
  return dx, dw, None


mixed_einsum.defvjp(_mixed_einsum_fwd, _mixed_einsum_bwd)


def weight(module: nn.Module, name: str, initializer: Initializer, shape: tuple[int, ...],
           axes: tuple[str, ...]) -> jax.Array:
  """A float32 parameter of `module` with one logical axis a dimension."""
  return cast(jax.Array, module.param(name, nn.with_logical_partitioning(initializer, axes), shape, jnp.float32))


class Einsum(nn.Module):
  """y = einsum(eqn, x, w) (+ b), float32. The bias spans the last `bias_dims` dimensions of the weight."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]  # logical, one per weight dimension
  initializer: Initializer
  dtype: Dtype = jnp.bfloat16
  bias_dims: int = 0

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    w = weight(self, 'w', self.initializer, self.shape, self.axes)
    copy: jax.Array | None = self.get_variable('copies', 'w')  # see stack.py
    return add_bias(self, checkpoint_name(mixed_einsum(eqn, self.dtype, x, w, copy), 'matmul'))


def add_bias(module: Einsum, y: jax.Array) -> jax.Array:
  """y + b, where the module has a bias."""
  if not module.bias_dims:
    return y
  b = weight(module, 'b', nn.initializers.zeros, module.shape[-module.bias_dims:], module.axes[-module.bias_dims:])
  return y + b.reshape((1,) * (y.ndim - b.ndim) + b.shape)


class Embed(nn.Module):
  """A table w [V, D] whose rows are looked up."""

  num_embeddings: int
  embed_dim: int
  initializer: Initializer
  axes: tuple[str, str] = ('vocab', 'embed')

  def setup(self):
    self.w = weight(self, 'w', self.initializer, (self.num_embeddings, self.embed_dim), self.axes)

  def encode(self, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take(self.w, tokens_BT, axis=0, mode='clip')


# Kinds of matrices between hidden states: subclasses of Einsum. EINSUMS[name](settings) is called like Einsum.
EINSUMS = Registry('einsum', factory_of('bias_dims', 'dtype'))
register(EINSUMS, 'full', lambda settings: Einsum, NoSettings)
