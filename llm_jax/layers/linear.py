"""Einsum, the module that owns matrices, with their dtypes, logical axes and initialization."""

from __future__ import annotations

import re
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.params import Role
from llm_jax.base.registry import NoSettings, Registry, factory_of, register
from llm_jax.layers.boxes import Described
from llm_jax.layers.product import aligned, mixed_einsum


def roles_of(eqn: str) -> tuple[Role, ...]:
  """The role of each dimension of w in the equation: batch if in x and y, in if only in x, out if only in y."""
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  return tuple('out' if d not in x_dims else 'batch' if d in y_dims else 'in' for d in w_dims)


def weight(module: nn.Module, name: str, initializer: Initializer, shape: tuple[int, ...],
           axes: tuple[str, ...], roles: tuple[Role, ...] = ()) -> jax.Array:
  """A float32 parameter of `module` with one logical axis and one role per dimension.

  Muon and SOAP need the roles of all parameters with two or more dimensions besides stacks; see base/params.py.
  """
  def init(*args: Any) -> Described:
    return Described(initializer(*args), axes, roles=roles)

  return cast(jax.Array, module.param(name, init, shape, jnp.float32))


class Einsum(nn.Module):
  """y = einsum(eqn, x, w) (+ b), in `out_dtype`. One matrix per expert: Einsum(shape=(E, D, F))('EBCD,EDF->EBCF', x).

  The bias has the last `bias_dims` output dimensions of the weight, and its batch dimensions.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]  # logical, one per weight dimension
  initializer: Initializer
  dtype: Dtype = jnp.bfloat16  # of operands
  out_dtype: Dtype = jnp.float32
  grad_dtype: Dtype = jnp.float32  # in which devices sum their parts of the gradient
  bias_dims: int = 0

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    w = weight(self, 'w', self.initializer, self.shape, self.axes, roles_of(eqn))
    copy: jax.Array | None = self.get_variable('copies', 'w')  # w in a lower precision; see stack.apply_stack
    y = mixed_einsum(eqn, self.dtype, x, w, copy, self.out_dtype, self.grad_dtype, self.axes)
    return add_bias(self, eqn, checkpoint_name(y, 'matmul'))


def add_bias(module: Einsum, eqn: str, y: jax.Array) -> jax.Array:
  """y + b if the module has a bias, else y."""
  if not module.bias_dims:
    return y
  _, w_dims, y_dims = re.split(',|->', eqn)
  roles = roles_of(eqn)
  outputs = [i for i, role in enumerate(roles) if role == 'out'][-module.bias_dims:]
  kept = [i for i, role in enumerate(roles) if role == 'batch' or i in outputs]
  b = weight(module, 'b', nn.initializers.zeros, tuple(module.shape[i] for i in kept),
             tuple(module.axes[i] for i in kept), tuple(roles[i] for i in kept))
  return y + aligned(b, ''.join(w_dims[i] for i in kept), y_dims).astype(y.dtype)


def copy_of(module: nn.Module, w: jax.Array) -> jax.Array:
  """The copy of the parameter `w` of a module in the collection `copies` if there is one, else w."""
  copy: jax.Array | None = module.get_variable('copies', 'w')
  return w if copy is None else copy


# Kinds of matrices between hidden states: subclasses of Einsum. EINSUMS[name](settings) is called like Einsum.
EINSUMS = Registry('einsum', factory_of('bias_dims', 'dtype', 'out_dtype', 'grad_dtype'))
register(EINSUMS, 'full', lambda settings: Einsum, NoSettings)
