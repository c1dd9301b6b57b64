"""All optimizers and weight averages against their papers in NumPy, and Muon's rule for stacks of matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import INFO, RATE, STEPS, by_equation, close, descend, mean, momentum, optimizer, tree

from llm_jax.base.builder import build
from llm_jax.optim.chain import OptimConfig, make_optimizer
from llm_jax.optim.masks import matrix_dims
from llm_jax.optim.matrices import as_matrices, from_matrices


def adam(b1, b2, eps=1e-8, nesterov=False):
  def rule(memory, g, t):
    m, v = mean(memory, 'm', g, b1), mean(memory, 'v', g * g, b2)
    m_hat = m / (1 - b1**t)
    if nesterov:
      m_hat = b1 * m / (1 - b1**(t + 1)) + (1 - b1) * g / (1 - b1**t)
    return m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
  return rule


def lion(b1, b2):
  def rule(memory, g, t):
    direction = np.sign(b1 * memory.get('m', 0.0) + (1 - b1) * g)
    mean(memory, 'm', g, b2)
    return direction
  return rule


def ademamix(b1, b2, b3, alpha, eps=1e-8):
  def rule(memory, g, t):
    m1, m2, v = mean(memory, 'm1', g, b1), mean(memory, 'm2', g, b3), mean(memory, 'v', g * g, b2)
    return (m1 / (1 - b1**t) + alpha * m2) / (np.sqrt(v / (1 - b2**t)) + eps)
  return rule


@pytest.mark.parametrize(('name', 'settings', 'rule', 'decay'), [
    ('adamw', {'b1': 0.8, 'b2': 0.9, 'weight_decay': 0.3}, adam(0.8, 0.9), 0.3),
    ('adam', {'b1': 0.8, 'b2': 0.9}, adam(0.8, 0.9), 0.0),
    ('adam', {'b1': 0.8, 'b2': 0.9, 'nesterov': True}, adam(0.8, 0.9, nesterov=True), 0.0),
    ('sgd', {'momentum': 0.0}, momentum(0.0, False), 0.0),
    ('sgd', {'momentum': 0.7, 'weight_decay': 0.1}, momentum(0.7, False), 0.1),
    ('sgd', {'momentum': 0.7, 'nesterov': True}, momentum(0.7, True), 0.0),
    ('lion', {'b1': 0.8, 'b2': 0.9, 'weight_decay': 0.2}, lion(0.8, 0.9), 0.2),
    ('ademamix', {'b1': 0.8, 'b2': 0.9, 'b3': 0.99, 'alpha': 3.0, 'weight_decay': 0.2}, ademamix(0.8, 0.9, 0.99, 3.0),
     0.2),
], ids=lambda x: x if isinstance(x, str) else None)
def test_optimizers_match_their_equations(name, settings, rule, decay):
  got, _ = descend(optimizer(name, **{name: settings}))
  close(got, by_equation(rule, decay=decay), rtol=3e-6)  # first moments are kept in float32


def test_ademamix_warmup_ends_at_its_settings():
  slow, _ = descend(optimizer('ademamix', ademamix={'b3': 0.99, 'alpha': 3.0, 'slow_steps': 3}))
  close(slow, by_equation(warming_ademamix(3, 0.9, 0.999, 0.99, 3.0), decay=0.1), rtol=1e-5)


def warming_ademamix(T, b1, b2, b3, alpha):
  """Schedules of arXiv 2409.03137, appendix: alpha grows linearly, b3 so that its half-life grows linearly."""
  def rule(memory, g, t):
    done = min(1.0, t / T)  # as in the authors' code: the first update has 1 / T of the warm-up
    log = np.log
    b = min(np.exp(log(b1) * log(b3) / ((1 - done) * log(b3) + done * log(b1))), b3)
    m1, m2, v = mean(memory, 'm1', g, b1), mean(memory, 'm2', g, b), mean(memory, 'v', g * g, b2)
    return (m1 / (1 - b1**t) + alpha * done * m2) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
  return rule


def test_adafactor_factors_large_second_moments():
  """arXiv 1804.04235, algorithm 4, on one matrix: row and column means, their product over the rows' mean."""
  tx = make_optimizer(build(OptimConfig, {
      'learning_rate': RATE, 'schedule': 'constant', 'chain': ['adafactor'],
      'adafactor': {'min_dim_size_to_factor': 2, 'multiply_by_parameter_scale': False}}), 100)
  rng = np.random.default_rng(0)
  p = expected = rng.standard_normal((4, 3))
  rows, columns = np.zeros(4), np.zeros(3)
  with jax.enable_x64(True):
    state, update = tx.init({'w': jnp.asarray(p)}), jax.jit(tx.update)
    for t in range(1, 6):
      g = rng.standard_normal((4, 3))
      updates, state = update({'w': jnp.asarray(g)}, state, {'w': jnp.asarray(p)}, value=1.0, grad=None)
      p = p + np.asarray(updates['w'])
      b = 1 - t**-0.8
      rows = b * rows + (1 - b) * (g**2 + 1e-30).mean(1)
      columns = b * columns + (1 - b) * (g**2 + 1e-30).mean(0)
      u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
      expected = expected - RATE * u / max(1.0, np.sqrt((u**2).mean()))
  np.testing.assert_allclose(p, expected, rtol=1e-5)
  assert max(leaf.size for leaf in jax.tree.leaves(state)) <= 4, 'no array of the size of the matrix'


def newton_schulz(g):
  """kellerjordan.github.io/posts/muon."""
  x = g.T if g.shape[0] > g.shape[1] else g
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize('scale', ['moonshot', 'jordan'])
@pytest.mark.parametrize(('nesterov', 'mix'), [(False, 'corrected'), (True, 'corrected'), (True, 'uncorrected')])
def test_muon_orthogonalizes_each_layer_separately(nesterov, mix, scale):
  """The matrix of q [D, N, H] is D x NH, that of out [N, H, D] is NH x D. Adam, for the others, never looks ahead."""
  got, _ = descend(optimizer('muon', muon={'weight_decay': 0.2, 'beta': 0.9, 'nesterov': nesterov, 'mix': mix,
                                           'scale': scale}))
  expected = by_equation(adam(0.9, 0.95), decay=0.2)
  for name, shape in (('q', (6, 8)), ('out', (8, 6))):
    factor = {'moonshot': 0.2 * np.sqrt(8), 'jordan': np.sqrt(max(1, shape[1] / shape[0]))}[scale]
    for layer in range(2):
      p, m = tree(0)['blocks'][name]['w'][layer], 0.0
      for t in range(1, STEPS + 1):
        g = tree(t)['blocks'][name]['w'][layer]
        m = 0.9 * m + 0.1 * g
        c, d = (1 - 0.9 ** (t + 1), 1 - 0.9**t) if mix == 'corrected' else (1, 1)
        o = newton_schulz((0.9 * m / c + 0.1 * g / d if nesterov else m).reshape(shape)).reshape(p.shape)
        p = p - RATE * (factor * o + 0.2 * p)
      expected['blocks'][name]['w'][layer] = p
  close(got, expected, rtol=2e-4)  # the polynomial magnifies the float32 moments' rounding


def test_the_first_update_of_muons_adam_is_the_rate():
  got, _ = descend(optimizer('muon', muon={'weight_decay': 0.0}), 1)
  np.testing.assert_allclose(np.abs(got['embed']['w'] - tree(0)['embed']['w']), RATE, rtol=1e-6)


def test_as_matrices_is_fan_in_by_fan_out():
  dims = matrix_dims(INFO)
  assert dims['embed']['w'] is None and dims['blocks']['q']['b'] is None
  x = jnp.arange(96.0).reshape(2, 2, 4, 6)
  m = as_matrices(x, dims['blocks']['out']['w'])
  np.testing.assert_array_equal(m, x.reshape(2, 8, 6))
  for name in ('q', 'out'):
    x = jnp.asarray(tree(0)['blocks'][name]['w'])
    d = dims['blocks'][name]['w']
    np.testing.assert_array_equal(from_matrices(as_matrices(x, d), x, d), x)


@pytest.mark.parametrize(('bias_correction', 'safeguard', 'decay'), [
    (True, False, 0.0), (True, True, 0.5), (False, False, 0.5), (False, True, 0.0)])
def test_prodigy_equals_prodigyopt(bias_correction, safeguard, decay):
  """Algorithm 4 of arXiv 2306.06101, over all parameters together, in the order of the package's Prodigy.step."""
  got, state = descend(optimizer('prodigy', learning_rate=1.0, prodigy={
      'b1': 0.8, 'b2': 0.9, 'estim_lr0': 1e-3, 'safeguard_warmup': safeguard, 'bias_correction': bias_correction,
      'weight_decay': decay}), 20)
  flat = lambda tree: np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])  # noqa: E731
  decays = flat(jax.tree_util.tree_map_with_path(lambda path, x: np.full(x.shape, path[-1].key == 'w'), tree(0)))
  x = x0 = flat(tree(0))
  d, d0, r, s, m, v, b3 = 1e-3, 1e-3, 0.0, 0.0, 0.0, 0.0, 0.9**0.5
  for t in range(1, 21):
    g = flat(tree(t))
    rate = d * (np.sqrt(1 - 0.9**t) / (1 - 0.8**t) if bias_correction else 1)
    m, v = 0.8 * m + 0.2 * d * g, 0.9 * v + 0.1 * d * d * g * g
    r = b3 * r + d / d0 * rate * g @ (x0 - x)
    s = b3 * s + (d if safeguard else rate) * d / d0 * g
    step = max(d, r / np.abs(s).sum())
    x = x - decay * rate * decays * x
    x = x - rate * m / (np.sqrt(v) + step * 1e-8)
    d = step
  np.testing.assert_allclose(flat(got), x, rtol=1e-5)
  assert state[0].estim_lr == pytest.approx(d, rel=1e-5)


def test_prodigy_decays_matrices_and_survives_zero_gradients():
  decayed, _ = descend(optimizer('prodigy', learning_rate=1.0, prodigy={'weight_decay': 0.5, 'estim_lr0': 1e-3}), 1)
  plain, _ = descend(optimizer('prodigy', learning_rate=1.0, prodigy={'estim_lr0': 1e-3}), 1)
  np.testing.assert_array_equal(decayed['blocks']['q']['b'], plain['blocks']['q']['b'])
  rate = 1e-3 * np.sqrt(1 - 0.999) / (1 - 0.9)  # with the bias correction of the first step
  np.testing.assert_allclose(decayed['embed']['w'], plain['embed']['w'] - 0.5 * rate * tree(0)['embed']['w'], rtol=1e-6)
  tx, params = optimizer('prodigy', learning_rate=1.0), {'w': jnp.ones(3)}
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  for g in (0.0, 0.0, 1.0, 1.0):
    grads = {'w': jnp.full(3, g)}
    updates, state = update(grads, state, params, value=1.0, grad=grads)
    params = optax.apply_updates(params, updates)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
  assert (params['w'] < 1).all()


@pytest.mark.parametrize('warmup', [0, 5])
def test_schedule_free_equals_its_authors_package(warmup):
  """AdamWScheduleFree of schedulefree: z by Adam without momentum, x its weighted mean, gradients at y between them."""
  b1, b2, steps = 0.7, 0.9, 20
  tx = make_optimizer(build(OptimConfig, {
      'learning_rate': RATE, 'schedule': 'constant', 'constant': {'warmup_steps': warmup}, 'chain': ['schedule_free'],
      'schedule_free': {'b1': b1, 'b2': b2, 'weight_decay': 0.2}}), 100, INFO)
  y, state = descend(tx, steps)

  def one(path, z):
    x = y = z
    v = total = largest = 0.0
    for t in range(1, steps + 1):
      g = tree(t)
      for key in path:
        g = g[key.key]
      rate = RATE * (min(1, t / warmup) if warmup else 1)
      largest = max(largest, rate)
      total += largest**2
      v = b2 * v + (1 - b2) * g * g
      z = z - rate * (g / (np.sqrt(v / (1 - b2**t)) + 1e-8) + (0.2 * y if path[-1].key == 'w' else 0))
      share = largest**2 / total
      x = (1 - share) * x + share * z
      y = (1 - b1) * z + b1 * x
    return x, y

  both = jax.tree_util.tree_map_with_path(one, tree(0))
  pick = lambda i: jax.tree.map(lambda pair: pair[i], both, is_leaf=lambda x: isinstance(x, tuple))  # noqa: E731
  close(y, pick(1), 1e-6)
  assert tx.averages
  with jax.enable_x64(True):
    close(tx.evaluated(state, jax.tree.map(jnp.asarray, y)), pick(0), 1e-6)


def test_averaged_weights_are_evaluated():
  tx = optimizer('sgd', controls=['ema'], sgd={'momentum': 0.0}, ema={'decay': 0.5})
  last, state = descend(tx)
  plain, _ = descend(optimizer('sgd', sgd={'momentum': 0.0}))
  close(last, plain)
  average = tree(0)
  for t in range(1, STEPS + 1):
    d = min(0.5, t / (9 + t))
    average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, descend(tx, t)[0])  # noqa: B023
  close(tx.evaluated(state, last), average, 1e-5)
