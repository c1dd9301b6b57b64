"""Einsum and Embed, the modules that own all matrices, with their dtype, logical axes and initialization.

Dims: B batch, T length, E experts, D embed, V vocab.
"""

from __future__ import annotations

import functools
import re
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.params import ParamInfo, Role
from llm_jax.base.registry import NoSettings, Registry, factory_of, register


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def mixed_einsum(eqn: str, dtype: Dtype, x: jax.Array, w: jax.Array, copy: jax.Array | None = None) -> jax.Array:
  """einsum(eqn, x, w) with operands in `dtype`, forward and backward, accumulated and returned in float32.

  `eqn` has two operands and no repeated or dropped letters. Without batch dimensions, rows lead in x and y and occur
  nowhere else: 'BTD,DNH->BTNH'. Letters in x, w and y are batch dimensions, anywhere: 'EBD,EDF->EBF', 'BTED,EDF->BTEF'.
  The gradient is that of w, in w's dtype; if `copy` is given, the products use it instead of w.
  """
  w = w if copy is None else copy
  if batch_dims(eqn):
    return _stacked_product(eqn, x.astype(dtype), w.astype(dtype))
  eqn, x, w = _merge_summed(eqn, x, w)
  return jnp.einsum(eqn, x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)


def batch_dims(eqn: str) -> str:
  """The letters of an equation's batch dimensions, such as experts, in the order of w."""
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  return ''.join(d for d in w_dims if d in x_dims and d in y_dims)


def _stacked_product(eqn: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """The product with batch dimensions moved to the front, as XLA:CPU lacks some bfloat16 kernels for other orders."""
  batch, dims = batch_dims(eqn), re.split(',|->', eqn)
  x_dims, w_dims, y_dims = (batch + ''.join(d for d in part if d not in batch) for part in dims)
  x, w = aligned(x, dims[0], x_dims), aligned(w, dims[1], w_dims)
  y = jnp.einsum(f'{x_dims},{w_dims}->{y_dims}', x, w, preferred_element_type=jnp.float32)
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


def _mixed_einsum_fwd(eqn: str, dtype: Any, x: jax.Array, w: jax.Array, copy: Any) -> tuple[jax.Array, Any]:
  # x is saved in `dtype`, w as it is used.
  likes = jnp.zeros((), x.dtype), jnp.zeros((), w.dtype)
  return mixed_einsum(eqn, dtype, x, w, copy), (x.astype(dtype), w if copy is None else copy, *likes)


def _mixed_einsum_bwd(eqn: str, dtype: Any, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x, w, x_like, w_like = residuals
  x_dims, w_dims, y_dims = re.split(',|->', eqn)
  dx = mixed_einsum(f'{y_dims},{w_dims}->{x_dims}', dtype, dy, w).astype(x_like.dtype)
  if dtype == jnp.float32 and not batch_dims(eqn):
    # With B and T merged into one summed dimension XLA:CPU does not copy x; its bfloat16 kernels need the copy.
    num_rows = sum(d not in w_dims for d in x_dims)
    x, dy = (a.reshape(-1, *a.shape[num_rows:]) for a in (x, dy))
    x_dims, y_dims = x_dims[num_rows - 1:], y_dims[num_rows - 1:]
  dw = mixed_einsum(f'{x_dims},{y_dims}->{w_dims}', dtype, x, dy).astype(w_like.dtype)
  return dx, dw, None


mixed_einsum.defvjp(_mixed_einsum_fwd, _mixed_einsum_bwd)


class Described(nn.LogicallyPartitioned, eq=False):
  """A boxed parameter with its logical axes and roles; an axis that a transform adds has the role batch."""

  roles: tuple[Role, ...] = flax.struct.field(default=(), pytree_node=False)

  def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
    roles = (*self.roles[:index], 'batch', *self.roles[index:]) if self.roles else ()
    return super().add_axis(index, params).replace(roles=roles)

  def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
    return super().remove_axis(index, params).replace(roles=self.roles[:index] + self.roles[index + 1:])


def info_of(box: Any) -> ParamInfo:
  """The ParamInfo of a boxed parameter, or of a plain array, which has no logical axes."""
  value = getattr(box, 'value', box)
  axes = (*getattr(box, 'names', ()), *(None,) * value.ndim)[:value.ndim]
  return ParamInfo(axes, value.shape, getattr(box, 'roles', ()))


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
  """y = einsum(eqn, x, w) (+ b), float32. One matrix per expert: Einsum(shape=(E, D, F))('EBCD,EDF->EBCF', x).

  The bias has the last `bias_dims` output dimensions of the weight, and its batch dimensions.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]  # logical, one per weight dimension
  initializer: Initializer
  dtype: Dtype = jnp.bfloat16
  bias_dims: int = 0

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    w = weight(self, 'w', self.initializer, self.shape, self.axes, roles_of(eqn))
    copy: jax.Array | None = self.get_variable('copies', 'w')  # w in a lower precision; see stack.apply_stack
    return add_bias(self, eqn, checkpoint_name(mixed_einsum(eqn, self.dtype, x, w, copy), 'matmul'))


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
  return y + aligned(b, ''.join(w_dims[i] for i in kept), y_dims)


def aligned(x: jax.Array, x_dims: str, y_dims: str) -> jax.Array:
  """x with the dimensions of y in their order; dimensions that x lacks have size 1."""
  sizes = dict(zip(x_dims, x.shape, strict=True))
  x = x.transpose([x_dims.index(d) for d in y_dims if d in sizes])
  return x.reshape([sizes.get(d, 1) for d in y_dims])


class Embed(nn.Module):
  """A table w [V, D] whose rows are looked up."""

  num_embeddings: int
  embed_dim: int
  initializer: Initializer
  axes: tuple[str, str] = ('vocab', 'embed')

  def setup(self) -> None:
    self.w = weight(self, 'w', self.initializer, (self.num_embeddings, self.embed_dim), self.axes,
                    ('row', 'out'))

  def encode(self, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take(self.w, tokens_BT, axis=0, mode='clip')


# Kinds of matrices between hidden states: subclasses of Einsum. EINSUMS[name](settings) is called like Einsum.
EINSUMS = Registry('einsum', factory_of('bias_dims', 'dtype'))
register(EINSUMS, 'full', lambda settings: Einsum, NoSettings)
