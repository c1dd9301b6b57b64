"""SOAP against the authors' algorithm (github.com/nikhilvyas/SOAP, soap.py), written in NumPy."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chains import RATE

from llm_jax.base.builder import build
from llm_jax.base.params import ParamInfo
from llm_jax.extras.soap import Basis, iterated
from llm_jax.optim.chain import OptimConfig, make_optimizer

STEPS, B1, B2, EPS = 20, 0.9, 0.8, 1e-8
# Square matrices, so that the first gradient has no null space, in which any basis would do.
INFO = {'q': {'w': ParamInfo(('layers', 'embed', 'heads', 'head_dim'), (2, 6, 2, 3), ('batch', 'in', 'out', 'out'))}}


def array(seed):
  return np.random.default_rng(seed).standard_normal((2, 6, 2, 3))


def descend(every, weight_decay=0.0):
  """The parameter after each step of gradients array(1), array(2), ..."""
  tx = make_optimizer(build(OptimConfig, {
      'learning_rate': RATE, 'schedule': 'constant', 'chain': ['soap'],
      'soap': {'b1': B1, 'b2': B2, 'eps': EPS, 'weight_decay': weight_decay, 'precondition_every': every}}), 100, INFO)
  with jax.enable_x64(True):
    params = {'q': {'w': jnp.asarray(array(0))}}
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for t in range(1, STEPS + 1):
      updates, state = update({'q': {'w': jnp.asarray(array(t))}}, state, params)
      params = optax.apply_updates(params, updates)
      seen.append(np.asarray(params['q']['w']))
  return seen


def by_the_authors(layer, every, weight_decay=0.0):
  """One matrix after each step. The first gradient makes the bases only; each update uses the bases before it."""
  p, seen = array(0)[layer].reshape(6, 6), []
  m, v, sides, bases = np.zeros((6, 6)), np.zeros((6, 6)), [np.zeros((6, 6)), np.zeros((6, 6))], None
  for t in range(STEPS):
    g = array(t + 1)[layer].reshape(6, 6)
    if t:
      left, right = bases
      turned = left.T @ g @ right
      m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * turned**2
      size = RATE * np.sqrt(1 - B2**t) / (1 - B1**t)
      p = p - size * left @ ((left.T @ m @ right) / (np.sqrt(v) + EPS)) @ right.T - RATE * weight_decay * p
    else:
      p = p - RATE * weight_decay * p  # theirs decays from the second step on
    sides = [B2 * side + (1 - B2) * new for side, new in zip(sides, (g @ g.T, g.T @ g), strict=True)]
    if t == 0:
      bases = [np.linalg.eigh(side)[1][:, ::-1] for side in sides]
    elif t % every == 0:
      orders = [np.argsort(-np.diag(q.T @ side @ q)) for side, q in zip(sides, bases, strict=True)]
      v = v[orders[0]][:, orders[1]]
      bases = [np.linalg.qr(side @ q[:, order])[0] for side, q, order in zip(sides, bases, orders, strict=True)]
    seen.append(p.reshape(6, 2, 3))
  return seen


@pytest.mark.parametrize('every', [1, 3, 10])
def test_twenty_steps_equal_the_authors(every):
  got = descend(every)
  for layer in range(2):
    for t, expected in enumerate(by_the_authors(layer, every)):
      np.testing.assert_allclose(got[t][layer], expected, rtol=0, atol=1e-9, err_msg=f'step {t + 1}')


def test_decay_is_decoupled_and_begins_at_the_first_step():
  got, expected = descend(3, 0.2), by_the_authors(1, 3, 0.2)
  np.testing.assert_allclose(got[-1][1], expected[-1], rtol=0, atol=1e-9)
  np.testing.assert_allclose(got[0], (1 - 0.2 * RATE) * array(0), rtol=1e-12)


def test_cpus_decompose_one_matrix_at_a_time():
  """In jaxlib 0.10 stacks of QR wait for each other's threads; with two cores, runs stood still at a renewal."""
  basis, v = Basis(*(jnp.zeros((2, n, n)) for n in (4, 6, 4, 6))), jnp.zeros((2, 4, 6))
  calls = re.findall(r'lapack_\w*geqrf.*', jax.jit(iterated).lower(basis, v).as_text())
  assert len(calls) == 2
  for call in calls:
    assert re.search(r'\(tensor<(4x4|6x6)xf32>\)', call), call


def test_updates_keep_the_size_of_adams():
  """The root mean square of an update, relative to the rate, is near 1 also after the bases are renewed."""
  seen = descend(3)
  sizes = [np.sqrt(np.mean((new - old) ** 2)) / RATE for old, new in itertools.pairwise(seen)]
  assert max(sizes) < 1.5 and min(sizes) > 0.2, sizes
