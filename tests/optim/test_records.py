"""NorMuon, SOAP-Muon, floors of updates, cautious decay and tail averages against their equations in NumPy.

The sources are arXiv 2510.05491 and 2510.12402, and records 9, 44, 45 and 46 of modded-nanogpt's track 3.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chains import INFO, RATE, by_equation, close, descend, descended, mean, momentum, optimizer, tree

from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.base.params import ParamInfo
from llm_jax.optim.chain import OptimConfig, make_optimizer

STEPS = 12
PLAIN = {'sgd': {'momentum': 0.7}}


def adam(memory, g, t, b1=0.9, b2=0.95):
  m, v = mean(memory, 'm', g, b1), mean(memory, 'v', g * g, b2)
  return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)


def orthogonal(x, coefficients, steps, norm):
  """Newton-Schulz as in kellerjordan.github.io/posts/muon."""
  a, b, c = coefficients
  tall = x.shape[0] > x.shape[1]
  x = x.T if tall else x
  x = x / (norm(x) + 1e-7)
  for _ in range(steps):
    x = a * x + (b * x @ x.T + c * (x @ x.T) @ (x @ x.T)) @ x
  return x.T if tall else x


def with_matrices(direction, decay=0.2):
  """The parameters by Adam, but matrices by `direction(memory, g, t)` of [inputs, outputs], in place of Adam."""
  expected = by_equation(adam, steps=STEPS, decay=decay)
  for name, shape in (('q', (6, 8)), ('out', (8, 6))):
    for layer in range(2):
      p, memory = tree(0)['blocks'][name]['w'][layer], {}
      for t in range(1, STEPS + 1):
        g = tree(t)['blocks'][name]['w'][layer].reshape(shape)
        p = p - RATE * (direction(memory, g, t).reshape(p.shape) + decay * p)
      expected['blocks'][name]['w'][layer] = p
  return expected


@pytest.mark.parametrize(('scale', 'nesterov'), [('moonshot', False), ('jordan', True)], ids=['paper', 'code'])
def test_normuon_equals_its_paper_and_its_authors_code(scale, nesterov):
  """Algorithm 1 of arXiv 2510.05491; github.com/zichongli5/NorMuon has Nesterov's momentum and another scale."""
  def direction(memory, g, t):
    m = mean(memory, 'm', g, 0.95)
    o = orthogonal(0.95 * m + 0.05 * g if nesterov else m, (3.4445, -4.775, 2.0315), 5, np.linalg.norm)
    v = mean(memory, 'v', (o * o).mean(0), 0.8)  # one for each output
    even = o / (np.sqrt(v) + 1e-10)
    size = 0.2 * np.sqrt(o.size) if scale == 'moonshot' else max(1, g.shape[1] / g.shape[0])**0.5 * np.linalg.norm(o)
    return even * size / np.linalg.norm(even)

  got, _ = descend(optimizer('normuon', normuon={'weight_decay': 0.2, 'b2': 0.8, 'scale': scale,
                                                 'nesterov': nesterov}), STEPS)
  close(got, with_matrices(direction), rtol=2e-4)  # momenta are kept in float32, which the polynomial magnifies


SQUARE = {'q': {'w': ParamInfo(('layers', 'embed', 'mlp'), (2, 6, 6), ('batch', 'in', 'out'))}}


@pytest.mark.parametrize('every', [1, 3])
def test_soap_muon_equals_the_record(every):
  """Record 44; square matrices, so that the first gradient has no null space, in which any basis would do."""
  b1, b2 = 0.95, 0.9
  array = lambda seed: np.random.default_rng(seed).standard_normal((2, 6, 6))  # noqa: E731
  tx = make_optimizer(build(OptimConfig, {
      'learning_rate': RATE, 'schedule': 'constant', 'chain': ['soap_muon'],
      'soap_muon': {'weight_decay': 0.0, 'precondition_every': every}}), 100, SQUARE)
  with jax.enable_x64(True):
    params = {'q': {'w': jnp.asarray(array(0))}}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, STEPS + 1):
      updates, state = update({'q': {'w': jnp.asarray(array(t))}}, state, params)
      params = jax.tree.map(jnp.add, params, updates)
  for layer in range(2):
    p, m, v, left, right, bases = array(0)[layer], 0.0, np.zeros((6, 6)), 0.0, 0.0, None
    for t in range(STEPS):
      g = array(t + 1)[layer]
      m = b1 * m + (1 - b1) * g
      u = (1 - b1) * g + b1 * m
      if bases:
        inside = bases[0].T @ u @ bases[1]
        v = b2 * v + (1 - b2) * inside**2
        u = bases[0] @ (inside / np.sqrt(np.maximum(v, 1e-16))) @ bases[1].T
      p = p - RATE * orthogonal(u, (2, -1.5, 0.5), 12, lambda x: np.linalg.norm(x @ x.T) ** 0.5)
      left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
      if t == 0:
        bases = [np.linalg.eigh(side)[1][:, ::-1] for side in (left, right)]
      elif t % every == 0:
        orders = [np.argsort(-np.diag(q.T @ side @ q)) for q, side in zip(bases, (left, right), strict=True)]
        v = v[orders[0]][:, orders[1]]
        bases = [np.linalg.qr(side @ q[:, order])[0]
                 for q, side, order in zip(bases, (left, right), orders, strict=True)]
    np.testing.assert_allclose(params['q']['w'][layer], p, rtol=0, atol=2e-5)  # momenta are kept in float32


@pytest.mark.parametrize('per', ['matrix', 'output'])
def test_floors_raise_small_updates_of_matrices(per):
  """Record 9 for a matrix as a whole, record 46 for the weights of an output."""
  inputs = {'q': (1,), 'out': (1, 2)}
  raised = []

  def change(path, p, u):
    name = path[-2].key
    if name in inputs and path[-1].key == 'w':
      axes = inputs[name] if per == 'output' else (1, 2, 3)
      norm = lambda x: np.sqrt((x * x).sum(axes, keepdims=True))  # noqa: E731
      raised.append(np.mean(1.3 * norm(p) > norm(u)))
      u = u * np.maximum(1, 1.3 * norm(p) / norm(u))
    return p - RATE * u

  got, _ = descend(optimizer('sgd', controls=['update_floor'], update_floor={'ratio': 1.3, 'per': per}, **PLAIN), STEPS)
  close(got, descended(momentum(0.7, False), change, STEPS))
  assert 0 < np.mean(raised) < 1


def test_cautious_decay_only_shrinks_what_the_update_shrinks():
  masks = []

  def change(path, p, u):
    if path[-1].key == 'w':
      masks.append(np.mean(u * p >= 0))
      u = u + 0.3 * (u * p >= 0) * p
    return p - RATE * u

  got, _ = descend(optimizer('sgd', controls=['cautious_decay'], cautious_decay={'weight_decay': 0.3}, **PLAIN), STEPS)
  close(got, descended(momentum(0.7, False), change, STEPS))
  assert 0 < min(masks) < max(masks) < 1


def test_the_tail_average_is_evaluated_in_part():
  """Record 45: the average begins with the weights after step 3, and leaves out the table of tokens."""
  tx = optimizer('sgd', controls=['tail_ema'], tail_ema={'start': 3, 'horizon': 4.0, 'share': 0.6}, **PLAIN)
  seen = [descend(tx, t)[0] for t in range(STEPS + 1)]
  for a, b in itertools.pairwise(seen[:4]):
    assert np.abs(a['embed']['w'] - b['embed']['w']).max() > 0
  average = seen[3]
  for t in range(1, STEPS + 1):
    last, state = descend(tx, t)
    if t > 3:
      average = jax.tree.map(lambda a, w: a + (w - a) / 4, average, last)
    with jax.enable_x64(True):
      got = tx.evaluated(state, jax.tree.map(jnp.asarray, last))
    expected = jax.tree.map(lambda w, a: 0.4 * w + 0.6 * a, last, average) if t > 3 else last
    close(got['blocks'], expected['blocks'], 1e-6)
    np.testing.assert_array_equal(got['embed']['w'], last['embed']['w'])


@pytest.mark.parametrize(('values', 'words'), [
    ({'chain': ['adamw', 'cautious_decay']}, ['weight_decay', 'set that to 0', '0.1']),
    ({'chain': ['muon', 'update_floor']}, ['weight_decay to 0', '0.1']),
    ({'chain': ['adam', 'update_floor'], 'groups': {'x': {'pattern': 'q', 'learning_rate': 0.5}}}, ['groups']),
    ({'chain': ['adamw', 'tail_ema', 'noise_adaptive']}, ['tail_ema must be the last link']),
    ({'chain': ['adamw', 'ema', 'tail_ema']}, ['one link that averages weights']),
    ({'chain': ['adamw', 'tail_ema'], 'tail_ema': {'start': 0}}, ['start', 'at least 1']),
])
def test_chains_that_do_not_fit_are_reported(values, words):
  with pytest.raises(ConfigError) as e:
    build(OptimConfig, values)
  assert all(word in str(e.value) for word in words), e.value


def test_the_records_links_train_together():
  """The chain of record 46 in its order, with a frozen group."""
  groups = {'outs': {'pattern': r'out/w$', 'frozen': True}}
  tx = optimizer('soap_muon', controls=['update_floor', 'cautious_decay', 'tail_ema'], groups=groups,
                 soap_muon={'weight_decay': 0.0}, update_floor={'ratio': 0.3825, 'per': 'output'},
                 tail_ema={'start': 2})
  got, _ = descend(tx, 4, groups)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
  np.testing.assert_array_equal(got['blocks']['out']['w'], tree(0)['blocks']['out']['w'])
  assert jax.tree.structure(INFO) == jax.tree.structure(got)
