"""Products of 8-bit operands by qwix, with a scale per row and column, for accelerators that compute them faster.

The master weights are float32; each product quantizes its operands.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib.util import find_spec
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.registry import register
from llm_jax.layers.linear import EINSUMS, Einsum, add_bias, roles_of, weight


def product(eqn: str, a: jax.Array, b: jax.Array, types: tuple[str, str]) -> jax.Array:
  """einsum(eqn, a, b), float32. Operands with a type are quantized by their largest value over the summed axes."""
  import qwix  # an optional dependency
  operands, out = eqn.split('->')
  quantized: list[Any] = []
  for x, dims, kind in zip((a, b), operands.split(','), types, strict=True):
    kept = [i for i, name in enumerate(dims) if name in out]
    quantized.append(qwix.quantize(x.astype(jnp.float32), kind, channelwise_axes=kept) if kind else x)
  return qwix.einsum(eqn, *quantized, preferred_element_type=jnp.float32 if '' in types else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def lowbit_einsum(eqn: str, forward: str, backward: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """einsum(eqn, x, w), float32, with operands of type `forward`; gradients have type `backward`, or '' for float32."""
  return product(eqn, x, w, (forward, forward))


def _fwd(eqn, forward, backward, x, w):
  return lowbit_einsum(eqn, forward, backward, x, w), (x, w)


def _bwd(eqn, forward, backward, residuals, dy):
  x, w = residuals
  (x_dims, w_dims), y_dims = (lambda ins, out: (ins.split(','), out))(*eqn.split('->'))
  operand = forward if backward else ''
  dx = product(f'{y_dims},{w_dims}->{x_dims}', dy, w, (backward, operand))
  dw = product(f'{x_dims},{y_dims}->{w_dims}', x, dy, (operand, backward))
  return dx.astype(x.dtype), dw.astype(w.dtype)


lowbit_einsum.defvjp(_fwd, _bwd)


@dataclasses.dataclass(frozen=True)
class LowBit:
  """No settings. Raises ValueError where qwix is not installed."""

  def __post_init__(self):
    if find_spec('qwix') is None:
      raise ValueError("einsum int8 needs qwix, as does fp8: pip install 'llm_jax[quant]'")


class LowBitEinsum(Einsum):
  """Einsum of 8-bit operands."""

  forward: str = 'int8'
  backward: str = ''  # type of incoming gradients; '': products of the backward pass have float32 operands

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    w = weight(self, 'w', self.initializer, self.shape, self.axes, roles_of(eqn))
    y = lowbit_einsum(eqn, self.forward, self.backward, x, w)
    return add_bias(self, eqn, checkpoint_name(y, 'matmul'))


register(EINSUMS, 'int8', lambda settings: functools.partial(LowBitEinsum, forward='int8'), LowBit)
register(EINSUMS, 'fp8', lambda settings: functools.partial(
    LowBitEinsum, forward='float8_e4m3fn', backward='float8_e5m2'), LowBit)
