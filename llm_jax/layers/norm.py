"""RMSNorm and LayerNorm: computed in float32, returned in the dtype of the input."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.base.registry import Registry, factory_of, register
from llm_jax.layers.linear import weight


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis (arXiv 1910.07467)."""
  return _norm(False, eps, x, scale).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
  """(x - mean) / std * scale (+ bias) over the last axis (arXiv 1607.06450)."""
  y = _norm(True, eps, x, scale)
  return (y if bias is None else y + _like(bias, x)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(centered: bool, eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
  """Either norm, float32, with a gradient that needs fewer passes over memory than the automatic one."""
  return _norm_fwd(centered, eps, x, scale)[0]


def _norm_fwd(centered: bool, eps: float, x: jax.Array, scale: jax.Array) -> tuple[jax.Array, Any]:
  # Both sums in one pass, over differences from the first feature, so that a large mean does not cancel the variance.
  saved, x = x, x.astype(jnp.float32)
  shift = x[..., :1] if centered else jnp.zeros((), x.dtype)
  mean = jnp.mean(x - shift, axis=-1, keepdims=True) if centered else shift
  variance = jnp.mean((x - shift) ** 2, axis=-1, keepdims=True) - mean * mean
  mean += shift
  inv_std = jax.lax.rsqrt(jnp.maximum(variance, 0) + eps)
  return (x - mean) * inv_std * _like(scale, x), (saved, mean, inv_std, scale)


def _norm_bwd(centered: bool, eps: float, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
  del eps
  x, mean, inv_std, scale = residuals
  x_hat = (x.astype(jnp.float32) - mean) * inv_std
  dx_hat = dy * _like(scale, x)
  dx = dx_hat - x_hat * jnp.mean(dx_hat * x_hat, axis=-1, keepdims=True)
  if centered:
    dx -= jnp.mean(dx_hat, axis=-1, keepdims=True)
  return (dx * inv_std).astype(x.dtype), jnp.sum(dy * x_hat, axis=tuple(range(x.ndim - 1)))


_norm.defvjp(_norm_fwd, _norm_bwd)


def _like(v: jax.Array, x: jax.Array) -> jax.Array:
  return v.reshape((1,) * (x.ndim - 1) + v.shape)


class RMSNorm(nn.Module):
  axis: str = 'norm'  # logical
  eps: float = 1e-6
  learned: bool = True  # whether it has a scale
  offset: bool = False  # the scale is 1 + w, as in Gemma, so that weight decay draws it to 1
  bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = jnp.ones(x.shape[-1:])
    if self.learned:
      init = nn.initializers.zeros if self.offset else nn.initializers.ones
      scale = weight(self, 'scale', init, x.shape[-1:], (self.axis,)) + float(self.offset)
    y = rms_norm(x, scale, self.eps)
    if self.bias:
      y += _like(weight(self, 'b', nn.initializers.zeros, x.shape[-1:], (self.axis,)), x).astype(y.dtype)
    return y


class LayerNorm(nn.Module):
  use_bias: bool = True
  axis: str = 'norm'  # logical
  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weight(self, 'scale', nn.initializers.ones, x.shape[-1:], (self.axis,))
    bias = None
    if self.use_bias:
      bias = weight(self, 'b', nn.initializers.zeros, x.shape[-1:], (self.axis,))
    return layer_norm(x, scale, bias, self.eps)


# Norms over the last axis: Flax modules. NORMS[name](settings) is called with name=, and use_bias= where it is a field.
NORMS = Registry('norm', factory_of('use_bias', 'axis'))
register(NORMS, 'layer_norm', LayerNorm)
register(NORMS, 'rms_norm', RMSNorm)
