"""RMSNorm and LayerNorm, in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.layers.linear import weight


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * scale over the last axis (arXiv 1910.07467)."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * _like(scale, x)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
  """(x - mean) / std * scale (+ bias) over the last axis (arXiv 1607.06450)."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * _like(scale, x)
  return y if bias is None else y + _like(bias, x)


def _like(v: jax.Array, x: jax.Array) -> jax.Array:
  return v.reshape((1,) * (x.ndim - 1) + v.shape)


class RMSNorm(nn.Module):
  axis: str = 'norm'  # logical
  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weight(self, 'scale', nn.initializers.ones, x.shape[-1:], (self.axis,))
    return rms_norm(x, scale, self.eps)


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
