"""Every optimizer and filter against its paper's equations in NumPy; stacks of layers; groups of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.config import build
from llm_jax.errors import ConfigError
from llm_jax.optim import TRANSFORMS, OptimConfig, make_optimizer
from llm_jax.optim.masks import as_matrices, from_matrices, matrix_dims

RATE, STEPS = 0.05, 7
AXES = {'blocks': {'q': {'w': ('layers', 'embed', 'heads', 'head_dim'), 'b': ('layers', 'heads', 'head_dim')},
                   'out': {'w': ('layers', 'heads', 'head_dim', 'embed')}},
        'embed': {'w': ('vocab', 'embed')}}
SHAPES = {'blocks': {'q': {'w': (2, 6, 2, 4), 'b': (2, 2, 4)}, 'out': {'w': (2, 2, 4, 6)}}, 'embed': {'w': (5, 6)}}


def tree(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: rng.standard_normal(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def optimizer(name, filters=(), controls=(), groups=None, learning_rate=RATE, **settings):
  return make_optimizer(build(OptimConfig, {
      'learning_rate': learning_rate, 'schedule': 'constant', 'chain': [*filters, name, *controls],
      'groups': groups or {}, **{link: values for link, values in settings.items()}}), 100, AXES)


def descend(tx, steps=STEPS, extra=lambda t, g: {}):
  """Parameters after `steps` steps of gradients tree(1), tree(2), ..., and the state."""
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, tree(0))
    state = tx.init(params)
    for t in range(1, steps + 1):
      grads = jax.tree.map(jnp.asarray, tree(t))
      updates, state = tx.update(grads, state, params, value=1.0, grad=grads)
      params = optax.apply_updates(params, updates)
    return jax.device_get(params), state


def by_equation(rule, steps=STEPS, decay=0.0):
  """The same by `rule(memory, g, t) -> direction`, of each array alone; decay on matrices and tables, not biases."""
  def one(path, p):
    memory = {}
    for t in range(1, steps + 1):
      g = tree(t)
      for key in path:
        g = g[key.key]
      p = p - RATE * (rule(memory, g, t) + (decay * p if path[-1].key == 'w' else 0))
    return p
  return jax.tree_util.tree_map_with_path(one, tree(0))


def close(got, expected, rtol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, expected)


def mean(memory, name, value, decay):
  memory[name] = decay * memory.get(name, 0.0) + (1 - decay) * value
  return memory[name]


def adam(b1, b2, eps=1e-8, nesterov=False):
  def rule(memory, g, t):
    m, v = mean(memory, 'm', g, b1), mean(memory, 'v', g * g, b2)
    m_hat = m / (1 - b1**t)
    if nesterov:
      m_hat = b1 * m / (1 - b1**(t + 1)) + (1 - b1) * g / (1 - b1**t)
    return m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
  return rule


def momentum(beta, nesterov):
  def rule(memory, g, t):
    memory['m'] = beta * memory.get('m', 0.0) + g
    return g + beta * memory['m'] if nesterov else memory['m']
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
def test_optimizers_are_their_equations(name, settings, rule, decay):
  got, _ = descend(optimizer(name, **{name: settings}))
  close(got, by_equation(rule, decay=decay), rtol=3e-6)  # first moments are kept in float32


def test_what_warms_up_in_ademamix_ends_at_its_settings():
  slow, _ = descend(optimizer('ademamix', ademamix={'b3': 0.99, 'alpha': 3.0, 'slow_steps': 3}))
  close(slow, by_equation(warming_ademamix(3, 0.9, 0.999, 0.99, 3.0), decay=0.1), rtol=1e-5)


def warming_ademamix(T, b1, b2, b3, alpha):
  """Schedules of arXiv 2409.03137, appendix: alpha in a line, b3 so that its half-life grows in a line."""
  def rule(memory, g, t):
    done = min(1.0, (t - 1) / T)
    log = np.log
    b = min(np.exp(log(b1) * log(b3) / ((1 - done) * log(b3) + done * log(b1))), b3)
    m1, m2, v = mean(memory, 'm1', g, b1), mean(memory, 'm2', g, b), mean(memory, 'v', g * g, b2)
    return (m1 / (1 - b1**t) + alpha * done * m2) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
  return rule


def test_adafactor_factors_the_second_moment_of_large_sides():
  """arXiv 1804.04235, algorithm 4, on one matrix: row and column means, their product over the rows' mean."""
  tx = make_optimizer(build(OptimConfig, {
      'learning_rate': RATE, 'schedule': 'constant', 'chain': ['adafactor'],
      'adafactor': {'min_dim_size_to_factor': 2, 'multiply_by_parameter_scale': False}}), 100, {'w': ('embed', 'mlp')})
  rng = np.random.default_rng(0)
  p = expected = rng.standard_normal((4, 3))
  rows, columns = np.zeros(4), np.zeros(3)
  with jax.enable_x64(True):
    state = tx.init({'w': jnp.asarray(p)})
    for t in range(1, 6):
      g = rng.standard_normal((4, 3))
      updates, state = tx.update({'w': jnp.asarray(g)}, state, {'w': jnp.asarray(p)}, value=1.0, grad=None)
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


def test_muon_orthogonalises_each_layers_matrix_alone_and_leaves_the_rest_to_adam():
  """Of q [D, N, H] the matrix is D x NH, of out [N, H, D] it is NH x D."""
  got, _ = descend(optimizer('muon', muon={'weight_decay': 0.2, 'beta': 0.9, 'nesterov': False}))

  def rule(memory, g, t):
    return adam(0.9, 0.95)(memory, g, t)

  expected = by_equation(rule, decay=0.2)
  for name, shape in (('q', (6, 8)), ('out', (8, 6))):
    for layer in range(2):
      p, m = tree(0)['blocks'][name]['w'][layer], 0.0
      for t in range(1, STEPS + 1):
        m = 0.9 * m + 0.1 * tree(t)['blocks'][name]['w'][layer]
        o = newton_schulz((m / (1 - 0.9**t)).reshape(shape)).reshape(p.shape)
        p = p - RATE * (0.2 * np.sqrt(8) * o + 0.2 * p)
      expected['blocks'][name]['w'][layer] = p
  close(got, expected, rtol=2e-4)  # the polynomial magnifies the float32 moments' rounding


def test_a_matrix_has_its_inputs_first_whatever_its_axes():
  dims = matrix_dims(AXES)
  assert dims['embed']['w'] is None and dims['blocks']['q']['b'] is None
  x = jnp.arange(96.0).reshape(2, 2, 4, 6)
  m = as_matrices(x, dims['blocks']['out']['w'])
  np.testing.assert_array_equal(m, x.reshape(2, 8, 6))
  for name in ('q', 'out'):
    x = jnp.asarray(tree(0)['blocks'][name]['w'])
    d = dims['blocks'][name]['w']
    np.testing.assert_array_equal(from_matrices(as_matrices(x, d), x, d), x)
  assert matrix_dims({'w': ('patch', 'byte_embed', 'embed')})['w'] == ((0, 1), (2,))


def test_soap_is_adam_in_the_eigenbasis():
  """Algorithm 3 of arXiv 2409.11321 on each layer's matrix; sign and order of eigenvectors do not matter."""
  b1, b2, every = 0.9, 0.8, 2
  tx = optimizer('soap', soap={'b1': b1, 'b2': b2, 'weight_decay': 0.2, 'precondition_every': every})
  (got, _), (_, first) = descend(tx), descend(tx, 1)
  expected = by_equation(adam(b1, b2), decay=0.2)
  for name, shape in (('q', (6, 8)), ('out', (8, 6))):
    for layer in range(2):
      p, m, v, left, right = tree(0)['blocks'][name]['w'][layer].reshape(shape), 0.0, 0.0, 0.0, 0.0
      for t in range(1, STEPS + 1):
        g = tree(t)['blocks'][name]['w'][layer].reshape(shape)
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if t == 1:
          # Of one gradient's null space any basis will do: it is the one that was taken.
          basis = first[0][0].inner_states['soap'].inner_state.bases['blocks'][name]['w']
          ql, qr = np.asarray(basis.q_SMA[layer]), np.asarray(basis.q_SNC[layer])
          for q, side in ((ql, left), (qr, right)):
            np.testing.assert_allclose(q.T @ side @ q, np.diag(np.linalg.eigvalsh(side)), atol=1e-6)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (ql.T @ g @ qr) ** 2
        n = (ql.T @ m @ qr) / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        p = p - RATE * (ql @ n @ qr.T + 0.2 * p)
        if t % every == 0:
          ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]
      expected['blocks'][name]['w'][layer] = p.reshape(tree(0)['blocks'][name]['w'][layer].shape)
  close(got, expected, rtol=1e-5)


def test_prodigy_is_its_equations():
  """Algorithm 4 of arXiv 2306.06101, over all parameters together."""
  got, state = descend(optimizer('prodigy', learning_rate=1.0, prodigy={'b1': 0.8, 'b2': 0.9, 'estim_lr0': 1e-3,
                                                                          'safeguard_warmup': False}))
  flat = lambda t: np.concatenate([x.ravel() for x in jax.tree.leaves(tree(t))])  # noqa: E731
  x = x0 = flat(0)
  d, d0, r, s, m, v, b3 = 1e-3, 1e-3, 0.0, 0.0, 0.0, 0.0, 0.9**0.5
  for t in range(1, STEPS + 1):
    g = flat(t)
    rate = d * np.sqrt(1 - 0.9**t) / (1 - 0.8**t)
    m, v = 0.8 * m + 0.2 * d * g, 0.9 * v + 0.1 * d * d * g * g
    r = b3 * r + d / d0 * rate * g @ (x0 - x)
    s = b3 * s + rate * d / d0 * g
    step = max(d, r / np.abs(s).sum())
    x = x - rate * m / (np.sqrt(v) + step * 1e-8)
    d = step
  np.testing.assert_allclose(np.concatenate([p.ravel() for p in jax.tree.leaves(got)]), x, rtol=1e-5)
  assert state[0].estim_lr == pytest.approx(d, rel=1e-5)


def test_prodigy_decays_matrices_alone_and_outlives_a_gradient_of_zero():
  decayed, _ = descend(optimizer('prodigy', learning_rate=1.0, prodigy={'weight_decay': 0.5, 'estim_lr0': 1e-3}), 1)
  plain, _ = descend(optimizer('prodigy', learning_rate=1.0, prodigy={'estim_lr0': 1e-3}), 1)
  np.testing.assert_array_equal(decayed['blocks']['q']['b'], plain['blocks']['q']['b'])
  np.testing.assert_allclose(decayed['embed']['w'], plain['embed']['w'] - 5e-4 * tree(0)['embed']['w'], rtol=1e-6)
  tx, params = optimizer('prodigy', learning_rate=1.0), {'w': jnp.ones(3)}
  state = tx.init(params)
  for g in (0.0, 0.0, 1.0, 1.0):
    grads = {'w': jnp.full(3, g)}
    updates, state = tx.update(grads, state, params, value=1.0, grad=grads)
    params = optax.apply_updates(params, updates)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))
  assert (params['w'] < 1).all()


def test_schedule_free_trains_one_point_and_evaluates_another():
  """Algorithm 1 of arXiv 2405.15682: z by Adam without momentum, x its mean, gradients at y between them."""
  b1, b2 = 0.7, 0.9
  tx = optimizer('schedule_free', schedule_free={'b1': b1, 'b2': b2, 'weight_decay': 0.2})
  y, state = descend(tx)

  def one(path, z):
    x = y = z
    v = 0.0
    for t in range(1, STEPS + 1):
      g = tree(t)
      for key in path:
        g = g[key.key]
      v = b2 * v + (1 - b2) * g * g
      z = z - RATE * (g / (np.sqrt(v / (1 - b2**t)) + 1e-8) + (0.2 * y if path[-1].key == 'w' else 0))
      x = (1 - 1 / t) * x + z / t
      y = (1 - b1) * z + b1 * x
    return x, y

  both = jax.tree_util.tree_map_with_path(one, tree(0))
  pick = lambda i: jax.tree.map(lambda pair: pair[i], both, is_leaf=lambda x: isinstance(x, tuple))  # noqa: E731
  close(y, pick(1), 1e-5)
  assert tx.averages
  with jax.enable_x64(True):
    close(tx.evaluated(state, jax.tree.map(jnp.asarray, y)), pick(0), 1e-5)


def test_an_average_of_weights_is_what_is_evaluated():
  tx = optimizer('sgd', controls=['ema'], sgd={'momentum': 0.0}, ema={'decay': 0.5})
  last, state = descend(tx)
  plain, _ = descend(optimizer('sgd', sgd={'momentum': 0.0}))
  close(last, plain)
  average = tree(0)
  for t in range(1, STEPS + 1):
    d = min(0.5, t / (9 + t))
    average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, descend(tx, t)[0])  # noqa: B023
  close(tx.evaluated(state, last), average, 1e-5)


# Filters.




def ema(alpha, lamb):
  def rule(memory, g, t):
    memory['m'] = g if t == 1 else alpha * memory['m'] + (1 - alpha) * g
    return g + (lamb(t) if callable(lamb) else lamb) * memory['m']
  return rule


def moving(window, lamb):
  def rule(memory, g, t):
    memory['last'] = [*memory.get('last', []), g][-window:]
    return g + (lamb * np.mean(memory['last'], 0) if len(memory['last']) == window else 0)
  return rule


@pytest.mark.parametrize(('name', 'settings', 'rule'), [
    ('grokfast_ema', {'alpha': 0.7, 'lamb': 3.0}, ema(0.7, 3.0)),
    ('grokfast_ma', {'window': 3, 'lamb': 4.0}, moving(3, 4.0)),
    ('grokfast_ema', {'alpha': 0.7, 'lamb': 3.0, 'phases': [0.0, 1.0, 0.5], 'until': ['2', '5']},
     ema(0.7, lambda t: 0.0 if t <= 2 else 3.0 if t <= 5 else 1.5)),
])
def test_grokfast_is_its_equations(name, settings, rule):
  got, _ = descend(optimizer('sgd', filters=[name], sgd={'momentum': 0.0}, **{name: settings}))
  close(got, by_equation(rule))


def test_a_phase_ends_when_something_is_mastered():
  tx = optimizer('sgd', filters=['grokfast_ema'], sgd={'momentum': 0.0}, grokfast_ema={
      'phases': [0.0, 1.0, 2.0], 'until': ['val/accuracy > 0.5', 'val/accuracy > 0.9']})
  state = tx.init({'w': jnp.ones(3)})
  at = lambda state: int(tx.report(state)['grokfast_phase'])  # noqa: E731
  for accuracy, phase in ((0.4, 0), (0.6, 1), (0.3, 1), (0.95, 2), (0.1, 2)):
    state = tx.hear(state, {'val/accuracy': accuracy})
    assert at(state) == phase
  assert at(tx.hear(tx.init({'w': jnp.ones(3)}), {'val/accuracy': 1.0})) == 2
  with pytest.raises(ConfigError, match=r'config.optim: val/accuracy is no result.*val/loss'):
    tx.hear(tx.init({'w': jnp.ones(3)}), {'val/loss': 1.0})


def test_decay_in_the_gradient_is_part_of_it():
  got, _ = descend(optimizer('sgd', filters=['l2'], sgd={'momentum': 0.7}, l2={'weight_decay': 0.3}))

  def one(path, p):
    m = 0.0
    for t in range(1, STEPS + 1):
      g = tree(t)
      for key in path:
        g = g[key.key]
      m = 0.7 * m + g + (0.3 * p if path[-1].key == 'w' else 0)
      p = p - RATE * m
    return p

  close(got, jax.tree_util.tree_map_with_path(one, tree(0)))


# Learning rates that follow what is seen.


def test_updates_shrink_when_a_metric_has_stopped_falling():
  tx = optimizer('sgd', controls=['reduce_on_plateau'], sgd={'momentum': 0.0},
                 reduce_on_plateau={'factor': 0.5, 'patience': 2})
  state, params = tx.init({'w': jnp.zeros(3)}), {'w': jnp.zeros(3)}
  sizes = []
  for loss in (3.0, 2.0, 2.0, 2.5, 1.0, 1.0, 1.0):
    state = tx.hear(state, {'val/loss': loss})
    updates, state = tx.update({'w': jnp.ones(3)}, state, params, value=9.0, grad=None)
    sizes.append(float(updates['w'][0]) / -RATE)
  np.testing.assert_allclose(sizes, [1, 1, 1, 0.5, 0.5, 0.5, 0.25], rtol=1e-6)


def test_a_metric_that_grows_below_zero_is_no_plateau():
  tx = optimizer('sgd', controls=['reduce_on_plateau'],
                 reduce_on_plateau={'metric': 'val/r2', 'mode': 'max', 'patience': 1})
  state = tx.init({'w': jnp.zeros(3)})
  for value, scale in ((-3.0, 1.0), (-2.0, 1.0), (-1.0, 1.0), (-1.0, 0.5)):
    state = tx.hear(state, {'val/r2': value})
    assert tx.report(state)['plateau_scale'] == scale


def test_updates_shrink_with_the_loss_of_training():
  tx = optimizer('sgd', controls=['reduce_on_plateau'], sgd={'momentum': 0.0},
                 reduce_on_plateau={'metric': 'train/loss', 'factor': 0.1, 'patience': 1, 'accumulation_size': 2})
  state, params = tx.init({'w': jnp.zeros(3)}), {'w': jnp.zeros(3)}
  scales = []
  for loss in (3.0, 1.0, 1.5, 1.5, 3.0, 1.0):
    _, state = tx.update({'w': jnp.ones(3)}, state, params, value=loss, grad=None)
    scales.append(float(tx.report(state)['plateau_scale']))
  np.testing.assert_allclose(scales, [1, 1, 1, 1, 1, 0.1], rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, tx.hear(state, {}), state)  # asks for nothing


def test_noise_lowers_updates_and_a_steady_gradient_does_not():
  def scale(gradients):
    tx = optimizer('sgd', controls=['noise_adaptive'], sgd={'momentum': 0.0},
                   noise_adaptive={'decay': 0.9, 'target': 0.5, 'power': 1.0, 'min_scale': 0.01})
    state = tx.init({'w': jnp.zeros(1000)})
    for g in gradients:
      updates, state = tx.update({'w': g}, state, {'w': jnp.zeros(1000)}, value=1.0, grad={'w': g})
      np.testing.assert_allclose(updates['w'], -RATE * float(tx.report(state)['noise_scale']) * g, rtol=1e-5)
    return float(tx.report(state)['noise_scale'])

  rng = np.random.default_rng(0)
  noise = [jnp.asarray(rng.standard_normal(1000)) for _ in range(100)]
  assert scale([jnp.ones(1000)] * 100) == 1.0
  # Of independent gradients the mean's energy is the share (1 - b) / (1 + b) of theirs.
  assert scale(noise) == pytest.approx(0.1 / 1.9 / 0.5, rel=0.2)


# Groups of parameters.


def test_groups_have_their_own_rate_and_decay_and_frozen_ones_stay():
  groups = {'tables': {'pattern': 'embed', 'learning_rate': 0.1, 'weight_decay': 3.0},
            'outs': {'pattern': r'out/w$', 'frozen': True}, 'biases': {'pattern': '/b$', 'learning_rate': 2.0}}
  for name, settings in (('adamw', {'weight_decay': 0.3}), ('sgd', {'momentum': 0.7, 'weight_decay': 0.3}),
                         ('muon', {}), ('soap', {})):
    tx = optimizer(name, groups=groups, controls=['ema'], **{name: settings})
    got, state = descend(tx)
    np.testing.assert_array_equal(got['blocks']['out']['w'], tree(0)['blocks']['out']['w'])
    assert np.abs(got['blocks']['q']['w'] - tree(0)['blocks']['q']['w']).min() > 0
    with jax.enable_x64(True):
      evaluated = tx.evaluated(state, jax.tree.map(jnp.asarray, got))
    np.testing.assert_array_equal(evaluated['blocks']['out']['w'], tree(0)['blocks']['out']['w'])
    assert np.abs(evaluated['embed']['w'] - got['embed']['w']).max() > 0
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state) if "'out'" in jax.tree_util.keystr(path)]
    if name == 'sgd':
      plain = by_equation(momentum(0.7, False), decay=0.3)
      np.testing.assert_allclose(got['blocks']['q']['w'], plain['blocks']['q']['w'], rtol=1e-5)
      moved = by_equation(lambda memory, g, t: 0.1 * momentum(0.7, False)(memory, g, t), decay=0.1 * 0.9)
      np.testing.assert_allclose(got['embed']['w'], moved['embed']['w'], rtol=1e-5)
      moved = by_equation(lambda memory, g, t: 2 * momentum(0.7, False)(memory, g, t))
      np.testing.assert_allclose(got['blocks']['q']['b'], moved['blocks']['q']['b'], rtol=1e-5)


def test_averaged_steps_of_frozen_groups_leave_them_alone():
  tx = optimizer('schedule_free', groups={'outs': {'pattern': r'out/w$', 'frozen': True}})
  got, state = descend(tx)
  with jax.enable_x64(True):
    evaluated = tx.evaluated(state, jax.tree.map(jnp.asarray, got))
  free, _ = descend(optimizer('schedule_free'))
  for params in (got, evaluated):
    np.testing.assert_array_equal(params['blocks']['out']['w'], tree(0)['blocks']['out']['w'])
  np.testing.assert_allclose(got['embed']['w'], free['embed']['w'], rtol=1e-6)


def test_a_group_without_parameters_is_told_with_those_there_are():
  with pytest.raises(ConfigError, match=r"groups\.x\.pattern: 'attn' matches no parameter.*blocks/q/w"):
    optimizer('adamw', groups={'x': {'pattern': 'attn'}})


@pytest.mark.parametrize('name', [name for name, cls in TRANSFORMS.items() if any(
    field.name in ('mu_dtype', 'accumulator_dtype') for field in dataclasses.fields(cls))])
def test_moments_can_be_kept_in_bfloat16(name):
  field = 'accumulator_dtype' if name == 'sgd' else 'mu_dtype'
  def sizes(dtype):
    state = jax.eval_shape(optimizer(name, **{name: {field: dtype}}).init, jax.tree.map(jnp.float32, tree(0)))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  num_params = sum(x.size for x in jax.tree.leaves(tree(0)))
  assert sizes('float32') - sizes('bfloat16') >= 2 * num_params - 200


@pytest.mark.parametrize(('values', 'words'), [
    ({'chain': ['clip_by_global_norm']}, ['one optimizer', 'adamw', 'got clip_by_global_norm']),
    ({'chain': ['adamw', 'lion']}, ['one optimizer']),
    ({'chain': ['adamw', 'grokfast_ema']}, ['filters (', 'grokfast_ema', 'and then controls']),
    ({'chain': ['adamw', 'ema', 'reduce_on_plateau']}, ['ema at its end']),
    ({'chain': ['schedule_free', 'ema']}, ['average weights once']),
    ({'chain': ['clip_by_global_norm', 'clip_by_global_norm', 'adamw']}, ['twice']),
    ({'groups': {'x': {'pattern': '('}}}, ["'('", 'regular expression']),
    ({'groups': {'x': {}}}, ['pattern', 'which parameters']),
    ({'chain': ['grokfast_ema', 'adamw'], 'grokfast_ema': {'phases': [1.0, 2.0]}}, ['until', '1', 'got 0']),
    ({'chain': ['grokfast_ema', 'adamw'], 'grokfast_ema': {'phases': [1.0, 2.0], 'until': ['soon']}},
     ["'soon' is no condition", 'val/accuracy > 0.5']),
    ({'chain': ['sgd'], 'sgd': {'nesterov': True, 'momentum': 0.0}}, ['nesterov']),
    ({'chain': ['adamw', 'reduce_on_plateau'], 'reduce_on_plateau': {'factor': 1.0}}, ['factor', '1.0']),
    ({'chain': ['schedule_free']}, ['schedule must be constant']),
    ({'chain': ['schedule_free', 'noise_adaptive'], 'schedule': 'constant'}, ['nothing may scale']),
    ({'chain': ['prodigy']}, ['learning_rate multiplies it', '0.0006']),
    ({'chain': ['prodigy'], 'learning_rate': 1.0, 'groups': {'x': {'pattern': 'b', 'weight_decay': 0.0}}}, ['groups']),
    ({'chain': ['adam'], 'groups': {'x': {'pattern': 'b', 'weight_decay': 0.0}}}, ['x.weight_decay', 'no effect']),
])
def test_settings_that_cannot_be_are_told(values, words):
  with pytest.raises(ConfigError) as e:
    build(OptimConfig, values)
  assert all(word in str(e.value) for word in words), e.value
