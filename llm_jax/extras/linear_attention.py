"""Causal linear attention (Katharopoulos et al., arXiv 2006.16236): a state of fixed size instead of keys and values.

y_t = phi(q_t) S_t / (phi(q_t) . z_t), where S_t and z_t are the sums over s <= t of phi(k_s) v_s^T and phi(k_s), and
phi(x) = elu(x) + 1. Computed chunk by chunk: masked attention inside a chunk, and the state for what is before it.
Dims: B batch, T length, M chunks, C length of a chunk, N heads, H head_dim, I head_dim of the values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens: then the saved states, one per chunk, are no larger than keys and values

State = dict[str, jax.Array]  # s [B, N, H, I], z [B, N, H]; float32


def feature(x: jax.Array) -> jax.Array:
  """elu(x) + 1 in float32, computed without cancellation for negative x."""
  x = x.astype(jnp.float32)
  return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def empty_state(batch_size: int, num_heads: int, head_dim: int) -> State:
  z_BNH = jnp.zeros((batch_size, num_heads, head_dim))
  return {'s': jnp.zeros((*z_BNH.shape, head_dim)), 'z': z_BNH}


def linear_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, state: State | None = None,
                     real_BT: jax.Array | None = None) -> tuple[jax.Array, State]:
  """(y [B, T, N, H] float32, the state after T). Keys and values where real_BT is False are ignored."""
  B, T, N, H = q_BTNH.shape
  # Scaling a query cancels in y, so queries with only negative values are shifted to keep the normaliser from zero.
  largest_BTN1 = jnp.minimum(q_BTNH.max(-1, keepdims=True), 0)
  q_BTNH = feature(q_BTNH - jax.lax.stop_gradient(largest_BTN1))
  k_BTNH, v_BTNH = feature(k_BTNH), v_BTNH.astype(jnp.float32)
  if real_BT is not None:
    k_BTNH *= real_BT[..., None, None]
  C = min(CHUNK, T)
  M = -(-T // C)
  causal_CC = jnp.tril(jnp.ones((C, C)))

  def chunks(x_BTNH):  # zero padding at the end: a key of zero adds nothing
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, M * C - T), (0, 0), (0, 0)))
    return x_BTNH.reshape(B, M, C, N, H).transpose(1, 0, 3, 2, 4)

  @jax.checkpoint  # saves the states, but not the attention weights inside the chunks
  def body(state, chunk):
    q_BNCH, k_BNCH, v_BNCI = chunk
    w_BNCS = jnp.einsum('BNCH,BNSH->BNCS', q_BNCH, k_BNCH) * causal_CC[None, None]
    y_BNCI = jnp.einsum('BNCS,BNSI->BNCI', w_BNCS, v_BNCI) + jnp.einsum('BNCH,BNHI->BNCI', q_BNCH, state['s'])
    norm_BNC = w_BNCS.sum(-1) + jnp.einsum('BNCH,BNH->BNC', q_BNCH, state['z'])
    state = {'s': state['s'] + jnp.einsum('BNCH,BNCI->BNHI', k_BNCH, v_BNCI), 'z': state['z'] + k_BNCH.sum(2)}
    return state, y_BNCI / jnp.maximum(norm_BNC, 1e-30)[..., None]

  first: State = empty_state(B, N, H) if state is None else state
  last, y_MBNCI = jax.lax.scan(body, first, tuple(map(chunks, (q_BTNH, k_BTNH, v_BTNH))))
  return y_MBNCI.transpose(1, 0, 3, 2, 4).reshape(B, M * C, N, H)[:, :T], last
