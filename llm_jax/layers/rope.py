"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of Llama and Qwen."""

import jax
import jax.numpy as jnp


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
  """Rotates the pair (i, i + H/2) of each head by positions * base^(-2i/H); float32."""
  half = x_BTNH.shape[-1] // 2
  frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  left, right = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
