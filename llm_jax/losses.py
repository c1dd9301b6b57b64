"""Losses as plain functions of logits and targets, in float32."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, targets: jax.Array, z_loss: float = 0.0) -> jax.Array:
  """Nats per target, float32 [...], of logits [..., V] and int targets [...].

  `z_loss` adds z_loss * logsumexp(logits)^2, which keeps the normaliser near 1 (PaLM, arXiv 2204.02311, section 5).
  """
  logits = logits.astype(jnp.float32)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  if z_loss:
    nll += z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
  return nll
