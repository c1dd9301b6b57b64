"""BitNet: matrices of one bit (arXiv 2310.11453) or three values (b1.58, arXiv 2402.17764), activations of 8 bits.

Training keeps float32 weights and quantizes them in each forward pass, with straight-through gradients (arXiv
1308.3432). Dims: I inputs and O outputs of a matrix, flattened; E matrices of a stack, flattened (experts).
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from typing import Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.registry import NoSettings, register
from llm_jax.layers.clock import progress
from llm_jax.layers.linear import EINSUMS, Einsum, add_bias, roles_of, weight
from llm_jax.layers.mlp import MLP, MLPS, relu_squared
from llm_jax.layers.product import aligned, batch_dims, mixed_einsum

EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class BitNet:
  """How matrices are quantized; embeddings, norms and the readout are not."""

  weight_bits: Literal['1.58', '1'] = '1.58'  # 1.58: weights of -1, 0 and 1; 1: of -1 and 1
  activation_bits: int = 8  # of the inputs of matrices
  rounding: Literal['nearest', 'stochastic'] = 'nearest'  # of activations and weights, in training
  warmup_steps: int = 0  # steps over which quantization is blended in linearly; evaluation is always fully quantized
  sub_norm: bool = False  # RMSNorm without a scale before each matrix, in addition to the model's norms
  out_norm: bool = False  # a learned RMSNorm before the matrices that write to the residual stream
  out_norm_eps: float = 1e-5  # added to the mean square in that norm
  penalty: float = 0.0  # weight of the mean squared rounding error of weights, in units of their scale
  sparsity_target: float = 0.0  # target share of zeros; 0: no target
  sparsity_weight: float = 1.0  # weight of the squared difference from the target
  gradient_scale: float = 1.0  # factor on the gradients of weights

  def __post_init__(self):
    if not 2 <= self.activation_bits <= 8:
      raise ValueError(f'activation_bits must be from 2 to 8; got {self.activation_bits}')
    if self.warmup_steps < 0 or self.penalty < 0 or self.sparsity_weight < 0:
      raise ValueError('warmup_steps, penalty and sparsity_weight must not be negative')
    if not 0 <= self.sparsity_target < 1:
      raise ValueError(f'sparsity_target must be in [0, 1); got {self.sparsity_target}')
    if not self.sparsity_target and self.sparsity_weight != 1:
      raise ValueError(f'sparsity_weight {self.sparsity_weight} has no effect without a sparsity_target')
    if self.sparsity_target and self.weight_bits == '1':
      raise ValueError('sparsity_target needs weight_bits 1.58: one bit has no zero')
    if self.gradient_scale <= 0:
      raise ValueError(f'gradient_scale must be positive; got {self.gradient_scale}')


def rounded(x: jax.Array, key: jax.Array | None) -> jax.Array:
  """x rounded to the nearest whole number; with a key, stochastically up or down so that the mean is kept."""
  return jnp.round(x) if key is None else jnp.floor(x + jax.random.uniform(key, x.shape))


def weight_codes(w: jax.Array, bits: str, key: jax.Array | None = None,
                 axes: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
  """(codes, scale) of a matrix: -1, 0, 1 with the mean of |w| as scale, or for one bit the signs of w - mean(w).

  The scale is at least 1e-5, as in the BitNet of transformers; the papers add such a number to it. Signs are not
  rounded stochastically. Means are over all of w, or over `axes`, which the scale keeps with size 1.
  """
  mean = partial(jnp.mean, axis=axes, keepdims=axes is not None)
  scale = jnp.maximum(mean(jnp.abs(w)), EPS)
  if bits == '1':
    return jnp.where(w >= mean(w), 1.0, -1.0), scale
  return jnp.clip(rounded(w / scale, key), -1, 1), scale


def activation_codes(x: jax.Array, bits: int, axes: tuple[int, ...],
                     key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """(codes, scale): whole numbers up to 2^(bits - 1) - 1, scaled by the largest |x| over `axes`."""
  most = 2 ** (bits - 1) - 1
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), EPS) / most
  return jnp.clip(rounded(x / scale, key), -most, most), scale


def summed_axes(eqn: str) -> tuple[int, ...]:
  """Axes of x that the product sums over."""
  x_dims, _, y_dims = re.split(',|->', eqn)
  return tuple(i for i, name in enumerate(x_dims) if name not in y_dims)


def matrix_axes(eqn: str) -> tuple[int, ...] | None:
  """Axes of w that one matrix spans; None: all of them."""
  return tuple(i for i, role in enumerate(roles_of(eqn)) if role != 'batch') if batch_dims(eqn) else None


def over_outputs(eqn: str, x_scale: jax.Array, w_scale: jax.Array) -> jax.Array:
  """The factor on y: `x_scale` has size 1 along x's summed axes, `w_scale` has only the batch dimensions."""
  x_dims, _, y_dims = re.split(',|->', eqn)
  rows = ''.join(name for name in x_dims if name in y_dims)
  return (aligned(w_scale, batch_dims(eqn), y_dims)
          * aligned(jnp.squeeze(x_scale, summed_axes(eqn)), rows, y_dims))


def rms(x: jax.Array, axes: tuple[int, ...], eps: float = EPS) -> jax.Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + eps)


def normed(module: Einsum, cfg: BitNet, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """The input of a matrix, float32, after the norms over `axes`, its last ones, that the settings name."""
  x = rms(x, axes) if cfg.sub_norm else x.astype(jnp.float32)
  if not cfg.out_norm or module.axes[-1] != 'embed':
    return x
  sizes = [x.shape[i] for i in axes]
  scale = weight(module, 'norm', nn.initializers.ones, (math.prod(sizes),), ('norm',))
  return rms(x, axes, cfg.out_norm_eps) * scale.reshape((1,) * (x.ndim - len(sizes)) + tuple(sizes))


class BitEinsum(Einsum):
  """Einsum of quantized operands. It has the parameters of Einsum, so that runs can be converted.

  It sows `sparsity` and `quantization_error` into metrics, and the penalties into losses. Products are of whole
  numbers, which bfloat16 represents exactly, and are scaled afterwards.
  """

  bitnet: BitNet = BitNet()

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    cfg, axes = self.bitnet, summed_axes(eqn)
    w = weight(self, 'w', self.initializer, self.shape, self.axes, roles_of(eqn))
    x = normed(self, cfg, x, axes)
    keys: tuple[jax.Array | None, jax.Array | None] = (None, None)
    if cfg.rounding == 'stochastic' and self.has_rng('dropout'):
      keys = tuple(jax.random.split(self.make_rng('dropout')))
    still = jax.lax.stop_gradient
    w_codes, w_scale = weight_codes(still(w), cfg.weight_bits, keys[0], matrix_axes(eqn))
    x_codes, x_scale = activation_codes(still(x), cfg.activation_bits, axes, keys[1])
    w_units, x_units = w / w_scale, x / x_scale
    self._sow(w_units, w_codes)
    w_units = cfg.gradient_scale * w_units + still((1 - cfg.gradient_scale) * w_units)
    strength = progress(cfg.warmup_steps)
    y = mixed_einsum(eqn, self.dtype, x_units + strength * still(x_codes - x_units),
                     w_units + strength * still(w_codes - w_units))
    w_scale = jnp.squeeze(w_scale, matrix_axes(eqn))
    return add_bias(self, eqn, checkpoint_name(y, 'matmul') * over_outputs(eqn, x_scale, w_scale))

  def _sow(self, w_units: jax.Array, w_codes: jax.Array) -> None:
    """Sows metrics and penalties of a matrix in units of its scale."""
    cfg = self.bitnet
    off = w_units - w_codes
    self.sow('metrics', 'sparsity', jnp.mean(w_codes == 0))
    self.sow('metrics', 'quantization_error', jnp.sqrt(jnp.sum(off * off) / (jnp.sum(w_units * w_units) + EPS)))
    loss = cfg.penalty * jnp.mean(off * off)
    if cfg.sparsity_target:
      zeros = jnp.mean(jax.nn.sigmoid(20 * (0.5 - jnp.abs(w_units))))  # a differentiable share of zeros
      loss += cfg.sparsity_weight * (zeros - cfg.sparsity_target) ** 2
    if cfg.penalty or cfg.sparsity_target:
      self.sow('losses', 'bitnet', loss)


SHIFTS_1K1 = np.arange(0, 8, 2, dtype=np.uint8)[None, :, None]


def pack(codes_IO: jax.Array) -> jax.Array:
  """uint8 [I / 4 (rounded up), O]: four codes -1, 0, 1 per byte, two bits each, the first in the lowest bits."""
  padded_IO = jnp.pad(codes_IO, ((0, -codes_IO.shape[0] % 4), (0, 0)))
  bits_JKO = (padded_IO + 1).astype(jnp.uint8).reshape(-1, 4, codes_IO.shape[1])
  return jnp.sum(bits_JKO << SHIFTS_1K1, axis=1, dtype=jnp.uint8)


def unpack(packed_JO: jax.Array, num_inputs: int) -> jax.Array:
  """The inverse of `pack`, int8 [..., I, O], for one packed matrix or a stack of them."""
  shifts_K1 = SHIFTS_1K1.reshape((1,) * (packed_JO.ndim - 1) + (4, 1))
  bits_JKO = (packed_JO[..., None, :] >> shifts_K1) & 3
  codes_IO = bits_JKO.reshape(*packed_JO.shape[:-2], -1, packed_JO.shape[-1])
  return codes_IO[..., :num_inputs, :].astype(jnp.int8) - 1


class PackedEinsum(Einsum):
  """BitEinsum from packed codes instead of weights, for inference only. See bitnet_pack.py."""

  bitnet: BitNet = BitNet()

  @nn.compact
  def __call__(self, eqn: str, x: jax.Array) -> jax.Array:
    axes, roles = summed_axes(eqn), roles_of(eqn)
    if list(roles) != sorted(roles, key=('batch', 'in', 'out').index):
      raise ValueError(f'packed matrices have batch dimensions first, then inputs, then outputs; got {eqn}')
    ends = roles.count('batch'), roles.count('batch') + roles.count('in')
    stack, inputs, outputs = self.shape[:ends[0]], self.shape[ends[0]:ends[1]], self.shape[ends[1]:]
    num_inputs = math.prod(inputs)
    boxed = nn.with_logical_partitioning(lambda key, shape, dtype: jnp.zeros(shape, dtype),
                                         (*self.axes[:ends[0]], 'norm', 'norm'))
    shape = (*stack, -(-num_inputs // 4), math.prod(outputs))
    packed = cast(jax.Array, self.param('packed', boxed, shape, jnp.uint8))
    scale = weight(self, 'scale', nn.initializers.ones, stack, self.axes[:ends[0]])
    x = normed(self, self.bitnet, x, axes)
    codes, x_scale = activation_codes(x, self.bitnet.activation_bits, axes)
    y = mixed_einsum(eqn, self.dtype, codes, unpack(packed, num_inputs).reshape(self.shape))
    return add_bias(self, eqn, y * over_outputs(eqn, x_scale, scale))


register(EINSUMS, 'bitnet', lambda settings: partial(BitEinsum, bitnet=settings), BitNet)
register(MLPS, 'relu2glu', lambda settings: partial(MLP, activation=relu_squared, gated=True), NoSettings)
# Inference-only, for exported models.
register(EINSUMS, 'packed', lambda settings: partial(PackedEinsum, bitnet=settings), BitNet)
