"""Layers against their equations in NumPy, and the one matrix product against autodiff."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from llm_jax.base.registry import NoSettings
from llm_jax.layers.mlp import MLPS
from llm_jax.layers.norm import layer_norm, rms_norm
from llm_jax.layers.product import mixed_einsum
from llm_jax.layers.rope import Rope, apply_rope
from llm_jax.layers.rope_scaling import unscaled


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(('eqn', 'x_shape', 'w_shape'), [
    ('BTD,DNH->BTNH', (2, 3, 8), (8, 2, 5)), ('BTNH,NHD->BTD', (2, 3, 2, 5), (2, 5, 8)),
    ('BTD,VD->BTV', (2, 3, 8), (7, 8)), ('BTPE,PED->BTD', (2, 3, 2, 5), (2, 5, 8))])
def test_mixed_einsum_matches_einsum_and_gradient(eqn, x_shape, w_shape):
  x, w = normal(0, *x_shape), normal(1, *w_shape)

  def loss(f):
    return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))(x, w)

  (value, grads), (expected, expected_grads) = loss(lambda x, w: mixed_einsum(eqn, jnp.float32, x, w)), loss(
      lambda x, w: jnp.einsum(eqn, x, w))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_accumulate_in_float32():
  """Sums 1 and 4096 times 2^-8: a bfloat16 accumulator stays at 1, a float32 one reaches 17."""
  x, w = np.full((1, 1, 4097), 2.0**-8, np.float32), np.ones((4097, 1), np.float32)
  x[0, 0, 0] = 1.0
  y = mixed_einsum('BTD,DF->BTF', jnp.bfloat16, x, w)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, 17.0, rtol=1e-6)
  x = np.swapaxes(x, 1, 2)  # now the weight's gradient is the long sum
  dw = jax.grad(lambda w: mixed_einsum('BTD,DF->BTF', jnp.bfloat16, x, w).sum())(np.ones((1, 1), np.float32))
  assert dw.dtype == jnp.float32
  np.testing.assert_allclose(dw, 17.0, rtol=1e-6)


def test_norms_match_their_equations():
  x, scale, bias = normal(0, 2, 3, 8) * 5 + 1, normal(1, 8), normal(2, 8)
  np.testing.assert_allclose(
      rms_norm(x, scale, 1e-6), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale, rtol=1e-5, atol=1e-6)
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
  np.testing.assert_allclose(layer_norm(x, scale, bias, 1e-5), expected, rtol=1e-4, atol=1e-5)


def test_gelu_matches_its_equation():
  x = normal(0, 64) * 4
  expected = [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x.tolist()]
  np.testing.assert_allclose(MLPS['gelu'](NoSettings()).keywords['activation'](x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('norm', [lambda x, scale: rms_norm(x, scale, 1e-6),
                                  lambda x, scale: layer_norm(x, scale, None, 1e-5)])
def test_norm_gradients_match_finite_differences(norm):
  """Compares with central differences in random directions of x and scale."""
  x, scale, weights = normal(0, 2, 3, 8) + 1, normal(1, 8), normal(3, 2, 3, 8)
  check_grads(lambda x, scale: jnp.sum(norm(x, scale) * weights), (x, scale), order=1, modes=('rev',), rtol=2e-2,
              atol=2e-2, eps=1e-2)


def test_layer_norm_is_exact_for_a_large_mean():
  x = normal(0, 4, 64).astype(np.float64) + 1000
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(layer_norm(x.astype(np.float32), np.ones(64, np.float32), None, 1e-5), expected, atol=1e-3)


def test_products_use_the_copy_and_gradients_go_to_w():
  x, w = normal(0, 2, 3, 8), normal(1, 8, 5)

  def run(*copy):
    y, vjp = jax.vjp(lambda x, w: mixed_einsum('BTD,DF->BTF', jnp.bfloat16, x, w, *copy), x, w)
    return y, *vjp(jnp.sin(y))

  for plain, copied in zip(run(), run(jnp.asarray(w, jnp.bfloat16)), strict=True):
    assert copied.dtype == jnp.float32
    np.testing.assert_array_equal(plain, copied)
  np.testing.assert_array_equal(run(jnp.zeros_like(w))[0], 0)


def test_rope_rotates_pairs_and_depends_on_distances():
  q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

  def turned(x, position):
    return np.asarray(apply_rope(x, jnp.array([[position]]), Rope(10000.0, unscaled)))[0, 0, 0]

  expected = np.empty(8)
  for i in range(4):
    angle = 3 * 10000.0 ** (-2 * i / 8)
    pair = q[0, 0, 0, [i, i + 4]]
    expected[[i, i + 4]] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]] @ pair
  np.testing.assert_allclose(turned(q, 3), expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(turned(q, 9) @ turned(k, 4), turned(q, 105) @ turned(k, 100), rtol=1e-4, atol=1e-4)
