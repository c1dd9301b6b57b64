"""Losses other than next_token against their equations in NumPy, for any split of the data."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.batch import Batch
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.extras.balances import BALANCES
from llm_jax.extras.contrastive import Contrastive
from llm_jax.extras.distillation import Distillation
from llm_jax.extras.labels import Classification, Regression, macro_means, pool
from llm_jax.losses import readout as readouts
from llm_jax.losses.config import LossConfig
from llm_jax.losses.readout import Readout
from llm_jax.losses.term import TermInputs

B, T, D, C, V = 8, 6, 5, 4, 11
RNG = np.random.default_rng(0)
LENGTHS = np.array([6, 1, 3, 0, 4, 2, 5, 6])  # row 3 only fills the batch up


def normal(*shape):
  return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def look(labels=None, num_outputs=C, **parts):
  """TermInputs with random hidden states and a head of `num_outputs` outputs."""
  segments = (np.arange(T)[None] < LENGTHS[:, None]).astype(np.int32)
  batch = Batch(tokens=np.zeros((B, T), np.int32), targets=np.arange(B * T).reshape(B, T) % V, labels=labels,
                loss_mask=segments.astype(np.float32), segment_ids=segments, encoder_segment_ids=segments)
  head = {'w': normal(D, num_outputs), 'b': normal(num_outputs)}
  readout = Readout(normal(B, T, D), normal(D, V), lambda w, x: jnp.einsum('BTD,DV->BTV', x, w))
  return TermInputs(batch, readout, head, parts.get('other'), parts.get('teacher'), jnp.float32)


def pooled(x_BTD, how):
  rows = [x[:n] if n else x[:1] * 0 for x, n in zip(np.asarray(x_BTD, np.float64), LENGTHS, strict=True)]
  return np.stack([row[-1] if how == 'last' else row.mean(0) for row in rows])


def logsumexp(x, axis=-1, keepdims=False):
  return np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))


def log_softmax(x):
  return x - logsumexp(np.asarray(x), axis=-1, keepdims=True)


@pytest.mark.parametrize('how', ['last', 'mean'])
def test_pooling_ignores_padding(how):
  seen = look()
  pooling = jax.jit(pool, static_argnums=2)
  got = pooling(seen.readout.x_BTD, seen.batch.segment_ids, how)
  real = LENGTHS > 0
  np.testing.assert_allclose(got[real], pooled(seen.readout.x_BTD, how)[real], rtol=1e-5)
  other = np.where(seen.batch.segment_ids[..., None] > 0, seen.readout.x_BTD, 1e3)
  np.testing.assert_array_equal(pooling(other, seen.batch.segment_ids, how)[real], got[real])


@pytest.mark.parametrize('settings', [{}, {'focal_gamma': 2.0}, {'label_smoothing': 0.2, 'z_loss': 0.1},
                                      {'focal_gamma': 0.5, 'label_smoothing': 0.1, 'pooling': 'mean'}], ids=str)
def test_classification_matches_its_equation(settings):
  term = Classification(num_classes=C, **settings)
  labels = RNG.integers(0, C, B).astype(np.int32)
  seen, count = look(labels), 5.0
  logits = pooled(seen.readout.x_BTD, term.pooling) @ seen.head['w'] + seen.head['b']
  log_p, real = np.asarray(log_softmax(logits)), LENGTHS > 0
  nll = -log_p[np.arange(B), labels]
  smooth = term.label_smoothing
  expected = ((1 - np.exp(-nll)) ** term.focal_gamma * ((1 - smooth) * nll - smooth * log_p.mean(-1))
              + term.z_loss * np.asarray(logsumexp(logits, axis=-1)) ** 2)
  objective, loss = jax.jit(lambda head: term.loss(seen._replace(head=head), count))(seen.head)
  assert objective == pytest.approx((expected * real).sum() / count, rel=1e-4)
  assert loss == pytest.approx((nll * real).sum() / count, rel=1e-4)
  slopes = jax.jit(jax.grad(lambda head: term.loss(seen._replace(head=head), count)[0]))(seen.head)
  assert all(np.isfinite(slope).all() and np.abs(slope).max() > 0 for slope in jax.tree.leaves(slopes))


def test_a_certain_class_has_a_finite_gradient():
  """The gradient of (1 - p)^0.5 is infinite at p = 1."""
  term = Classification(num_classes=2, focal_gamma=0.5)
  seen = look(np.zeros(B, np.int32), 2)
  head = {'w': jnp.zeros((D, 2)), 'b': jnp.array([200.0, -200.0])}
  slope = jax.jit(jax.grad(lambda head: term.loss(seen._replace(head=head), 1.0)[0]))(head)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_class_metrics_do_not_depend_on_batches():
  term, labels = Classification(num_classes=C), np.random.default_rng(1).integers(0, C, B).astype(np.int32)
  seen = look(labels)
  guesses = np.argmax(pooled(seen.readout.x_BTD, 'last') @ seen.head['w'] + seen.head['b'], axis=1)
  real = LENGTHS > 0
  sums = jax.device_get(jax.jit(lambda: term.score(seen, None))())
  confusion = np.array([[np.sum((labels == c) & (guesses == d) & real) for d in range(C)] for c in range(C)])
  np.testing.assert_array_equal(sums['confusion'], confusion)
  results = term.summarize(sums)
  assert results['documents'] == real.sum() == 7
  assert results['accuracy'] == pytest.approx(np.mean((labels == guesses)[real]))
  assert results['top5_accuracy'] == 1  # of four classes
  means = []
  for c in range(C):
    hit, said, true = (np.sum(x & real) for x in ((labels == c) & (guesses == c), guesses == c, labels == c))
    if said + true:
      precision, recall = hit / max(said, 1), hit / max(true, 1)
      means.append((precision, recall, 0.0 if not hit else 2 * precision * recall / (precision + recall)))
  names = ('macro_precision', 'macro_recall', 'macro_f1')
  assert [results[name] for name in names] == pytest.approx(np.mean(means, 0))


@pytest.mark.parametrize(('confusion', 'means'), [
    ([[3, 0, 0], [0, 0, 0], [0, 0, 2]], (1, 1, 1)),  # a class that neither occurs nor is predicted does not count
    ([[0, 0], [0, 0]], (0, 0, 0)),
    ([[2, 1], [0, 0]], (1 / 2, 1 / 3, 2 / 5)),  # a class that is predicted, but does not occur: recall 0
    ([[1, 3], [1, 5]], ((1 / 2 + 5 / 8) / 2, (1 / 4 + 5 / 6) / 2, (1 / 3 + 5 / 7) / 2))])
def test_macro_means_by_hand(confusion, means):
  assert tuple(macro_means(np.array(confusion, float)).values()) == pytest.approx(means)


@pytest.mark.parametrize('delta', [0.0, 0.7])
def test_regression_matches_its_equation(delta):
  labels = (1000 + 50 * normal(B, 2)).astype(np.float32)
  term = Regression(huber_delta=delta).with_labels(labels.astype(np.float64), ())
  seen, real = look(labels, 2), LENGTHS > 0
  mean, std = labels.astype(np.float64).mean(0), labels.astype(np.float64).std(0)
  given = (pooled(seen.readout.x_BTD, 'last') @ seen.head['w'] + seen.head['b']) * std + mean
  errors = ((given - labels) / std)[real]
  far = np.abs(errors) > delta
  expected = np.where(far & (delta > 0), delta * (np.abs(errors) - delta / 2), errors**2 / 2)
  assert jax.jit(lambda: term.loss(seen, 3.0)[0])() == pytest.approx(expected.sum() / 3, rel=1e-4)
  results = term.summarize({k: np.asarray(v, np.float64) for k, v in jax.jit(lambda: term.score(seen, None))().items()})
  assert results['loss'] == pytest.approx(expected.mean(), rel=1e-4)
  assert results['mae'] == pytest.approx(np.abs(given - labels)[real].mean(), rel=1e-4)
  assert results['rmse'] == pytest.approx(np.sqrt(((given - labels)[real] ** 2).mean()), rel=1e-4)
  r2 = 1 - ((given - labels)[real] ** 2).sum(0) / ((labels[real] - labels[real].mean(0)) ** 2).sum(0)
  assert results['r2'] == pytest.approx(r2.mean(), rel=1e-3)


def test_contrastive_is_info_nce_over_real_rows():
  term = Contrastive(embedding_dim=C, temperature=0.3)
  other = Readout(normal(B, T, D) + normal(D), None, None)
  seen, real = look(other=other), LENGTHS > 0
  units = []
  for x in (seen.readout.x_BTD, other.x_BTD):
    e = pooled(x, 'mean') @ seen.head['w'] + seen.head['b']
    units.append((e / np.linalg.norm(e, axis=1, keepdims=True))[real])
  sims = units[0] @ units[1].T / 0.3
  nll = -(np.diag(log_softmax(sims)) + np.diag(log_softmax(sims.T))) / 2
  assert jax.jit(lambda: term.loss(seen, 1.0)[0])() == pytest.approx(nll.sum(), rel=1e-4)
  results = term.summarize({k: float(v) for k, v in jax.jit(lambda: term.score(seen, None))().items()})
  places = np.argsort(np.argsort(-sims, axis=1), axis=1).diagonal()
  assert results['loss'] == pytest.approx(nll.mean(), rel=1e-4)
  assert results['accuracy'] == pytest.approx(np.mean(places == 0))
  assert results['top5_accuracy'] == pytest.approx(np.mean(places < 5))
  assert results['mrr'] == pytest.approx(np.mean(1 / (1 + places)))


@pytest.mark.parametrize('chunk_tokens', [1000, 2])
def test_distillation_matches_its_equation_in_any_chunks(monkeypatch, chunk_tokens):
  monkeypatch.setitem(readouts.CHUNK_BYTES, 'cpu', 2 * 4 * B * chunk_tokens * V)
  theirs = Readout(normal(B, T, 3), normal(3, V), lambda w, x: jnp.einsum('BTD,DV->BTV', x, w))
  term = Distillation(teacher='x', temperature=3.0, logits=0.5, hidden=2.0, hidden_dim=3)
  seen, count = look(num_outputs=3, teacher=theirs), 7.0

  def loss(x, w):
    return term.loss(seen._replace(readout=seen.readout.replace(x_BTD=x, w=w)), count)[0]

  p, q = (np.asarray(log_softmax(r.project(r.w, r.x_BTD) / 3), np.float64) for r in (theirs, seen.readout))
  mask = seen.batch.loss_mask
  kl = 9 * (np.exp(p) * (p - q)).sum(-1)
  hidden = ((np.asarray(seen.readout.x_BTD) @ seen.head['w'] + seen.head['b'] - theirs.x_BTD) ** 2).mean(-1)
  arguments = jnp.asarray(seen.readout.x_BTD), jnp.asarray(seen.readout.w)
  assert jax.jit(loss)(*arguments) == pytest.approx(((0.5 * kl + 2 * hidden) * mask).sum() / count, rel=1e-4)
  dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(*arguments)
  du = 0.5 * 3 * (np.exp(q) - np.exp(p)) * mask[..., None] / count  # Hinton's: T^2 times the slope over T
  np.testing.assert_allclose(dw, np.einsum('BTD,BTV->DV', seen.readout.x_BTD, du), rtol=1e-3, atol=1e-5)
  far = np.asarray(seen.readout.x_BTD) @ seen.head['w'] + seen.head['b'] - theirs.x_BTD
  dhidden = 2 * 2 / 3 * (far * mask[..., None] / count) @ seen.head['w'].T
  np.testing.assert_allclose(dx, du @ np.asarray(seen.readout.w).T + dhidden, rtol=1e-3, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_no_loss():
  readout = look().readout
  term = Distillation(teacher='x')
  slope = jax.jit(jax.grad(
      lambda x: term.loss(look(teacher=readout)._replace(readout=readout.replace(x_BTD=x)), 1.0)[0]))
  np.testing.assert_allclose(slope(jnp.asarray(readout.x_BTD)), 0, atol=1e-5)


def test_uncertainty_matches_its_equation():
  losses, s = jnp.array([2.0, 0.5]), jnp.array([0.3, -0.4])
  objective, weights = BALANCES['uncertainty']()(losses, s, 1.0, None, None)
  assert objective == pytest.approx(float(np.sum(np.exp(-s) * losses + s / 2)))
  np.testing.assert_allclose(weights, np.exp(-s), rtol=1e-6)
  slope = jax.grad(lambda s: BALANCES['uncertainty']()(losses, s, 1.0, None, None)[0])(s)
  np.testing.assert_allclose(slope, -np.exp(-s) * losses + 0.5, rtol=1e-5)


def test_grad_norm_reaches_its_target_norms():
  """Gradient descent on its loss moves G_i to mean(G) r_i^alpha and keeps the sum of the weights."""
  losses, norms, first = jnp.array([2.0, 0.5, 1.0]), jnp.array([10.0, 0.2, 1.0]), jnp.array([4.0, 0.5, 4.0])
  balance = BALANCES['grad_norm'](1.5)

  @jax.jit
  def objective(s, losses):
    return balance(losses, s, 1.0, lambda: norms, first)

  s = jnp.zeros(3)
  def wanted(w):
    return np.mean(w * norms) * ((losses / first) / np.mean(losses / first)) ** 1.5

  before = np.abs(objective(s, losses)[1] * norms - wanted(objective(s, losses)[1])).sum()
  slope = jax.grad(lambda s: objective(s, losses)[0])
  s = jax.lax.fori_loop(0, 4000, lambda _, s: s - 1e-3 * slope(s), s)
  weights = objective(s, losses)[1]
  assert weights.sum() == pytest.approx(3)
  assert np.abs(weights * norms - wanted(weights)).sum() < 0.1 * before
  slope = jax.grad(lambda losses: objective(s, losses)[0])(losses)
  np.testing.assert_allclose(slope, weights, rtol=1e-5)


@pytest.mark.parametrize(('values', 'words'), [
    ({'terms': ['classfication']}, ['classfication', 'next_token', "did you mean 'classification'?"]),
    ({'terms': []}, ['at least one loss']),
    ({'terms': ['next_token', 'next_token']}, ['each once']),
    ({'balance': 'uncertainty'}, ['two terms']),
    ({'classification': {'focal_gamma': 1.0}}, ['classification is set', 'no effect']),
    ({'terms': ['distillation']}, ['distillation.teacher', 'workdir']),
    ({'terms': ['classification'], 'classification': {'num_classes': 1}}, ['num_classes', 'at least 2', '1']),
    ({'terms': ['regression'], 'regression': {'mean': [1.0]}}, ['mean and std']),
    ({'terms': ['contrastive'], 'contrastive': {'temperature': 0.0}}, ['temperature', '0.0']),
    ({'next_token': {'weight': 0.0}}, ['weight', '0.0', 'remove it from terms']),
    ({'next_token': {'weight': 0.5}}, ['lone term', '0.5']),
    ({'terms': ['next_token', 'regression'], 'balance': 'grad_norm', 'regression': {'weight': 2.0}}, ['must be 1']),
    ({'terms': ['next_token', 'contrastive'], 'balance': 'grad_norm'}, ['grad_norm', 'contrastive']),
    ({'alpha': 1.0}, ['alpha 1.0', 'grad_norm']),
    ({'terms': ['distillation'], 'distillation': {'teacher': 'x', 'logits': 0.0, 'hidden': 1.0}}, ['hidden alone']),
])
def test_invalid_settings_are_reported(values, words):
  with pytest.raises(ConfigError) as e:
    build(LossConfig, values)
  assert all(word in str(e.value) for word in words), e.value
