"""Layers against their equations in NumPy, and the one matrix product against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.layers.attention import cached_attention, causal_attention
from llm_jax.layers.linear import mixed_einsum
from llm_jax.layers.norm import layer_norm, rms_norm
from llm_jax.layers.rope import apply_rope
from llm_jax.losses import cross_entropy


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(('eqn', 'x_shape', 'w_shape'), [
    ('BTD,DNH->BTNH', (2, 3, 8), (8, 2, 5)), ('BTNH,NHD->BTD', (2, 3, 2, 5), (2, 5, 8)),
    ('BTD,VD->BTV', (2, 3, 8), (7, 8))])
def test_mixed_einsum_is_the_einsum_and_its_gradient(eqn, x_shape, w_shape):
  x, w = normal(0, *x_shape), normal(1, *w_shape)

  def loss(f):
    return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))(x, w)

  (value, grads), (expected, expected_grads) = loss(lambda x, w: mixed_einsum(eqn, jnp.float32, x, w)), loss(
      lambda x, w: jnp.einsum(eqn, x, w))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_accumulate_in_float32():
  """4096 ones of 2^-8 next to 1: a bfloat16 accumulator stays at 1, the float32 one reaches 17."""
  x, w = np.full((1, 1, 4097), 2.0**-8, np.float32), np.ones((4097, 1), np.float32)
  x[0, 0, 0] = 1.0
  y = mixed_einsum('BTD,DF->BTF', jnp.bfloat16, x, w)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, 17.0, rtol=1e-6)
  x = np.swapaxes(x, 1, 2)  # now the weight's gradient is the long sum
  dw = jax.grad(lambda w: mixed_einsum('BTD,DF->BTF', jnp.bfloat16, x, w).sum())(np.ones((1, 1), np.float32))
  assert dw.dtype == jnp.float32
  np.testing.assert_allclose(dw, 17.0, rtol=1e-6)


def test_norms_are_their_equations():
  x, scale, bias = normal(0, 2, 3, 8) * 5 + 1, normal(1, 8), normal(2, 8)
  np.testing.assert_allclose(
      rms_norm(x, scale, 1e-6), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale, rtol=1e-5, atol=1e-6)
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
  np.testing.assert_allclose(layer_norm(x, scale, bias, 1e-5), expected, rtol=1e-4, atol=1e-5)


def test_rope_turns_pairs_by_their_angle_and_sees_only_distances():
  q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

  def turned(x, position):
    return np.asarray(apply_rope(x, jnp.array([[position]]), 10000.0))[0, 0, 0]

  expected = np.empty(8)
  for i in range(4):
    angle = 3 * 10000.0 ** (-2 * i / 8)
    pair = q[0, 0, 0, [i, i + 4]]
    expected[[i, i + 4]] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]] @ pair
  np.testing.assert_allclose(turned(q, 3), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(turned(q, 9) @ turned(k, 4), turned(q, 105) @ turned(k, 100), rtol=1e-4, atol=1e-4)


def reference_attention(q, k, v, window, segment_ids, prefix=None):
  """In float64, one query and head at a time."""
  B, T, N, H = q.shape
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(B, T, N):
    keys = [s for s in range(T) if segment_ids[b, s] == segment_ids[b, t] and (
        (prefix is not None and prefix[b, s]) or (s <= t and (not window or t - s < window)))]
    head = n // (N // k.shape[2])
    scores = np.array([q[b, t, n].astype(np.float64) @ k[b, s, head] for s in keys]) / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    out[b, t, n] = (weights / weights.sum()) @ v[b, keys, head]
  return out


@pytest.mark.parametrize('window', [0, 1, 3])
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('segments', [False, True])
@pytest.mark.parametrize('with_prefix', [False, True])
def test_attention_is_its_equation(window, kv_heads, segments, with_prefix):
  q, k, v = normal(0, 2, 8, 4, 6), normal(1, 2, 8, kv_heads, 6), normal(2, 2, 8, kv_heads, 6)
  segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 0, 0]]) if segments else np.ones((2, 8), int)
  prefix = np.array([[1, 1, 0, 1, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0, 0, 0]], bool) if with_prefix else None
  got = causal_attention(q, k, v, window=window, segment_ids_BT=jnp.asarray(segment_ids) if segments else None,
                         prefix_BT=prefix)
  np.testing.assert_allclose(got, reference_attention(q, k, v, window, segment_ids, prefix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('window', [0, 3])
def test_cached_attention_ignores_what_lies_behind_the_position(window):
  q, k, v = normal(0, 1, 8, 4, 6), normal(1, 1, 8, 2, 6), normal(2, 1, 8, 2, 6)
  rubbish = np.full((1, 4, 2, 6), 1e9, np.float32)
  got = cached_attention(q[:, 5:6], np.concatenate([k[:, :6], rubbish], 1), np.concatenate([v[:, :6], rubbish], 1),
                         positions_BT=jnp.array([[5]]), window=window)
  full = reference_attention(q, k, v, window, np.ones((1, 8), int))
  np.testing.assert_allclose(got[0, 0], full[0, 5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('z_loss', [0.0, 0.01])
def test_cross_entropy_is_its_equation(z_loss):
  logits, targets = normal(0, 2, 3, 7) * 10, np.array([[0, 6, 3], [1, 1, 2]])
  log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
  expected = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0] + z_loss * log_z**2
  np.testing.assert_allclose(cross_entropy(logits, targets, z_loss), expected, rtol=1e-4, atol=1e-5)
  assert cross_entropy(logits.astype(jnp.bfloat16), targets).dtype == jnp.float32
