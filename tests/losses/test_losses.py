"""The chunked cross-entropy against its equation, autodiff and itself on a mesh, and its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.base.sharding import MeshConfig, batch_sharding, make_mesh
from llm_jax.layers.product import mixed_einsum
from llm_jax.losses import readout as readouts
from llm_jax.losses.readout import Readout, cross_entropy, score
from llm_jax.models.blocks import project

B, T, D, V = 4, 10, 6, 13


def some(soft_cap=0.0, T=T):
  """A readout, targets, and weights some of which are zero."""
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((B, T, D), np.float32), rng.standard_normal((V, D), np.float32)
  weights = rng.uniform(0, 1, (B, T)).astype(np.float32) * rng.integers(0, 2, (B, T))
  readout = Readout(x, w, partial(project, 'BTD,VD->BTV', jnp.float32, 1.0, soft_cap, w.shape[0]))
  return readout, rng.integers(0, V, (B, T)), weights.astype(np.float32)


def in_chunks(monkeypatch, num_tokens):
  """Chunks of num_tokens of each row."""
  monkeypatch.setitem(readouts.CHUNK_BYTES, 'cpu', 4 * B * num_tokens * V)


def equation(readout, targets, weights, z_loss, smoothing, soft_cap):
  """((objective, nll), gradients by (x, w, weights) of the objective), in float64."""
  x, w = np.asarray(readout.x_BTD, np.float64), np.asarray(readout.w, np.float64)
  u = x @ w.T
  logits = soft_cap * np.tanh(u / soft_cap) if soft_cap else u
  log_z = np.log(np.exp(logits).sum(-1))
  log_p = logits - log_z[..., None]
  nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  objective = (1 - smoothing) * nll - smoothing * log_p.mean(-1) + z_loss * log_z**2
  wanted = (1 - smoothing) * np.eye(V)[targets] + smoothing / V
  slope = np.exp(log_p) * (1 + 2 * z_loss * log_z)[..., None] - wanted
  du = slope * weights[..., None] * ((1 - np.tanh(u / soft_cap) ** 2) if soft_cap else 1)
  return ((objective * weights).sum(), (nll * weights).sum()), (du @ w, np.einsum('BTV,BTD->VD', du, x), objective)


@pytest.mark.parametrize(('num_tokens', 'z_loss', 'smoothing', 'soft_cap'), [
    (10, 0.0, 0.0, 0.0), (5, 0.1, 0.0, 0.0), (4, 0.1, 0.2, 3.0)])
def test_cross_entropy_and_gradients_match_the_equations(monkeypatch, num_tokens, z_loss, smoothing, soft_cap):
  """In one chunk, in two, in three of 4 with padding; the gradient scales with what is asked of the sum."""
  in_chunks(monkeypatch, num_tokens)
  readout, targets, weights = some(soft_cap)

  def loss(x, w, weights):
    objective, nll = cross_entropy(readout.replace(x_BTD=x, w=w), targets, weights, z_loss, smoothing)
    return 3 * objective + 5 * nll, (objective, nll)  # 5 * nll has no gradient

  arguments = readout.x_BTD, readout.w, weights
  sums, expected = equation(readout, targets, weights, z_loss, smoothing, soft_cap)
  (_, got), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arguments)
  np.testing.assert_allclose(got, sums, rtol=1e-5)
  np.testing.assert_allclose(jax.jit(loss)(*arguments)[1], sums, rtol=1e-5)  # by the rule that takes no gradient
  for grad, expected_grad in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, 3 * expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('num_tokens', [10, 3])
def test_score_gives_nll_and_rank_of_each_token(monkeypatch, num_tokens):
  in_chunks(monkeypatch, num_tokens)
  readout, targets, _ = some()
  logits = np.asarray(readout.x_BTD, np.float64) @ np.asarray(readout.w, np.float64).T
  nll, rank = jax.jit(score)(readout, targets)
  expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
  places = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
  np.testing.assert_array_equal(rank, np.take_along_axis(places, targets[..., None], -1)[..., 0])
  assert (rank == 0).any() and (rank > 2).any()
  assert readouts.rank(jnp.zeros((1, 3)), jnp.array([1])) == 1  # of equals the first comes first: ties are no hits


def test_chunks_add_no_rounding_in_bfloat16(monkeypatch):
  """The weight's gradient is added up in float32, over chunks too."""
  in_chunks(monkeypatch, 2)
  readout, targets, weights = some()
  exact = equation(readout, targets, weights, 0.0, 0.0, 0.0)[1][1]

  def plain(w):
    logits = mixed_einsum('BTD,VD->BTV', jnp.bfloat16, readout.x_BTD, w)
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights)

  def chunked(w):
    fn = partial(project, 'BTD,VD->BTV', jnp.bfloat16, 1.0, 0.0, w.shape[0])
    return cross_entropy(Readout(readout.x_BTD, w, fn), targets, weights)[0]

  dw = {f: jax.jit(jax.grad(f))(readout.w) for f in (plain, chunked)}
  error = {f: np.abs(dw[f] - exact).max() for f in dw}
  assert dw[chunked].dtype == jnp.float32
  assert 0 < error[chunked] < 1.5 * error[plain]


@pytest.mark.parametrize(('length', 'most_bytes', 'expected'), [(8, 8, 1), (8, 4, 2), (10, 4, 5), (11, 4, 3), (3, 1, 3),
                                                                 (1, 0.1, 1)])
def test_chunks_stay_within_the_limit_of_bytes(monkeypatch, length, most_bytes, expected):
  """A token is a byte here. 10 tokens in threes or fours need padding, in twos they do not; 11 have no good divisor."""
  monkeypatch.setitem(readouts.CHUNK_BYTES, 'cpu', most_bytes)
  num_chunks = readouts.num_chunks(length, length)
  assert num_chunks == expected
  assert -(-length // num_chunks) <= max(1, most_bytes)


def test_the_full_logits_are_never_in_memory(monkeypatch):
  """Neither for the gradient nor for the score. The plain way does hold them."""
  T, D, V = 256, 4, 512
  monkeypatch.setitem(readouts.CHUNK_BYTES, 'cpu', B * T * V * 4 // 16)
  x, w, y, m = (jax.ShapeDtypeStruct(s, d) for s, d in [((B, T, D), 'float32'), ((V, D), 'float32'), ((B, T), 'int32'),
                                                        ((B, T), 'float32')])
  fn = partial(project, 'BTD,VD->BTV', jnp.float32, 1.0, 0.0, w.shape[0])

  def plain(x, w, y, m):
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(fn(w, x), y) * m)

  def held(f):
    return jax.jit(f).lower(x, w, y, m).compile().memory_analysis().temp_size_in_bytes / (4 * B * T * V)

  assert held(jax.grad(plain, argnums=(0, 1))) > 1
  assert held(jax.grad(lambda x, w, y, m: cross_entropy(Readout(x, w, fn), y, m)[0], argnums=(0, 1))) < 0.4
  assert held(lambda x, w, y, m: score(Readout(x, w, fn), y)) < 0.4


def test_a_mesh_gives_the_same_and_keeps_vocabulary_sharded(monkeypatch):
  """One gather of the weight and one sum of its gradient, however many chunks; no logits leave their device."""
  V, T, D = 64, 12, 8
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((8, T, D), np.float32), rng.standard_normal((V, D), np.float32)
  y, m = rng.integers(0, V, (8, T)), rng.uniform(0, 1, (8, T)).astype(np.float32)
  fn = partial(project, 'BTD,VD->BTV', jnp.float32, 1.0, 0.0, w.shape[0])

  def run(sizes):
    monkeypatch.setitem(readouts.CHUNK_BYTES, 'cpu', 4 * 8 * T * V // np.prod(sizes) // 4)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
    rows, table = batch_sharding(mesh), NamedSharding(mesh, P('tensor', 'fsdp'))
    with jax.set_mesh(mesh):
      f = jax.jit(jax.value_and_grad(lambda x, w, y, m: cross_entropy(Readout(x, w, fn), y, m)[0], argnums=(0, 1)),
                  in_shardings=(rows, table, rows, rows), out_shardings=(None, (rows, table)))
      compiled = f.lower(x, w, y, m).compile()
      return compiled(*jax.device_put((x, w, y, m), (rows, table, rows, rows))), compiled.as_text()

  (expected, _), (got, text) = run((1, 1, 1)), run((2, 2, 2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jax.device_get(got),
               jax.device_get(expected))
  gathered = [line for line in text.splitlines() if ' all-gather(' in line]
  assert len(gathered) == 1 and f'f32[{V // 2},{D}]' in gathered[0]
  assert 'while(' in text and f'{V}]' not in text.split('ENTRY')[0]  # the loop sees half the vocabulary
