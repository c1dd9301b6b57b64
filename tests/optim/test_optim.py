"""The optimizer chain against its papers' equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.base.builder import build
from llm_jax.base.params import ParamInfo
from llm_jax.optim.chain import TRANSFORMS, OptimConfig, make_optimizer
from llm_jax.optim.masks import matrices


def tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {'blocks': {'q': {'w': scale * rng.standard_normal((2, 3, 4)), 'b': scale * rng.standard_normal((2, 4))},
                     'norm': {'scale': scale * rng.standard_normal((2, 3))}},
          'embed': {'w': scale * rng.standard_normal((5, 3))}}


def warmup_cosine(step, peak, warmup, total, factor):
  if step < warmup:
    return peak * step / warmup
  progress, least = (step - warmup) / (total - warmup), factor * peak
  return least + 0.5 * (peak - least) * (1 + np.cos(np.pi * progress))


def test_warmup_cosine_matches_its_equation():
  config = build(OptimConfig, {'learning_rate': 0.3, 'first_count': 0,
                               'warmup_cosine': {'warmup_steps': 10, 'end_factor': 0.2}})
  schedule = make_optimizer(config, 50).schedule
  got = [float(schedule(step)) for step in range(51)]
  np.testing.assert_allclose(got, [warmup_cosine(step, 0.3, 10, 50, 0.2) for step in range(51)], rtol=1e-6)
  assert max(got) == pytest.approx(0.3) and got[10] == max(got) and got[50] == pytest.approx(0.06) and got[0] == 0


@pytest.mark.parametrize('name', TRANSFORMS)
def test_finite_squares_give_a_finite_state(name):
  """The step only checks the sum of squares of the gradients, so a finite sum must be sufficient."""
  info = {'w': ParamInfo(('embed', 'mlp'), (4, 4), ('in', 'out'))}
  link = optax.with_extra_args_support(TRANSFORMS[name]().make(optax.constant_schedule(1e-3), info))
  params = {'w': jnp.ones((4, 4))}
  state = jax.jit(link.init)(params)
  begin = jax.device_get((params, state))

  @jax.jit
  def step(grads, state, params):
    updates, state = link.update(grads, state, params, value=1.0, grad=grads)
    return optax.apply_updates(params, updates), state

  for size in (1e18, 1e-30, 4e18, 0.0, -4e18):  # 16 of 4e18, squared, are 2.6e38 of the 3.4e38 there are
    grads = {'w': jnp.full((4, 4), size, jnp.float32)}
    assert jnp.isfinite(optax.tree.norm(grads, squared=True))
    params, state = step(grads, state, params)
    jax.tree.map(lambda leaf, first: np.testing.assert_array_equal(np.isfinite(leaf) | (leaf == first), True),
                 jax.device_get((params, state)), begin)  # the best loss so far begins as infinity


def test_constant_warms_up_and_stays_constant():
  config = build(OptimConfig, {'learning_rate': 0.3, 'schedule': 'constant', 'constant': {'warmup_steps': 4}})
  schedule = make_optimizer(config, 50).schedule
  np.testing.assert_allclose([schedule(s) for s in (0, 1, 3, 30)], [0.075, 0.15, 0.3, 0.3], rtol=1e-6)


def test_the_default_chain_matches_clipping_and_adamw():
  """Twenty steps of the papers' equations in float64 NumPy agree within 1e-6."""
  config = build(OptimConfig, {
      'learning_rate': 0.003, 'adamw': {'b1': 0.8, 'b2': 0.9, 'weight_decay': 0.3},
      'clip_by_global_norm': {'max_norm': 2.0}, 'warmup_cosine': {'warmup_steps': 3, 'end_factor': 0.1}})
  tx = make_optimizer(config, 20)
  params = jax.tree.map(jnp.float32, tree(0))
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  expected, m, v = tree(0), tree(0, 0.0), tree(0, 0.0)
  decay = {'blocks': {'q': {'w': 0.3, 'b': 0.0}, 'norm': {'scale': 0.0}}, 'embed': {'w': 0.3}}
  norms = []
  for t in range(20):
    grads = tree(t + 1, 10.0 if t % 2 else 0.1)
    updates, state = update(jax.tree.map(jnp.float32, grads), state, params)
    params = optax.apply_updates(params, updates)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    norms.append(norm)
    grads = jax.tree.map(lambda g: g * min(1, 2 / norm), grads)  # noqa: B023
    m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, v, grads)
    rate = warmup_cosine(t + 1, 0.003, 3, 20, 0.1)
    expected = jax.tree.map(
        lambda p, m, v, d: p - rate * (m / (1 - 0.8**(t + 1)) / (np.sqrt(v / (1 - 0.9**(t + 1))) + 1e-8) + d * p),  # noqa: B023
        expected, m, v, decay)
  assert min(norms) < 2 < max(norms)
  jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, rtol=0, atol=1e-6), params, expected)


def test_matrices_exclude_norms_and_biases():
  assert matrices(tree(0)) == {'blocks': {'q': {'w': True, 'b': False}, 'norm': {'scale': False}}, 'embed': {'w': True}}


def test_a_bfloat16_first_moment_is_within_rounding():
  def run(mu_dtype):
    tx = make_optimizer(build(OptimConfig, {'adamw': {'mu_dtype': mu_dtype}}), 20)
    params = jax.tree.map(jnp.float32, tree(0))
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for t in range(5):
      updates, state = update(jax.tree.map(jnp.float32, tree(t + 1)), state, params)
    return updates, optax.tree.get(state, 'mu'), optax.tree.get(state, 'nu')

  exact, rounded = run('float32'), run('bfloat16')
  assert [{leaf.dtype for leaf in jax.tree.leaves(part)} for part in rounded] == [
      {jnp.dtype('float32')}, {jnp.dtype('bfloat16')}, {jnp.dtype('float32')}]
  error = optax.tree.norm(optax.tree.sub(exact[0], rounded[0])) / optax.tree.norm(exact[0])
  assert 0 < error < 2**-7
