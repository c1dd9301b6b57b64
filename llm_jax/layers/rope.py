"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of Llama and Qwen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rope(NamedTuple):
  """How a layer rotates queries and keys."""

  base: float
  scaling: Callable[..., tuple[jax.Array, float]]  # see layers/rope_scaling.py
  dim: int | None = None  # features of a head that are rotated, its first ones; None: all


def apply_rope(x_BTNH: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
  """Rotates the pair (i, i + dim/2) of each head by positions * base^(-2i/dim), as `scaling` changes it; float32."""
  dim = rope.dim or x_BTNH.shape[-1]
  half = dim // 2
  plain = rope.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  frequencies, factor = rope.scaling(plain, rope.base, positions_BT)
  angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
  sin, cos = factor * jnp.sin(angles), factor * jnp.cos(angles)
  left, right, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, dim], axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)
