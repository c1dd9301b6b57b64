"""Several losses at once, with heads on models: training over meshes and microbatches, and evaluation."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import train_on
from test_step import OPTIM

from llm_jax.base.batch import Batch
from llm_jax.base.builder import Sections
from llm_jax.extras.byte_patch import BytePatchConfig
from llm_jax.extras.contrastive import Contrastive
from llm_jax.extras.distillation import Distillation, teacher_readout
from llm_jax.extras.encdec import EncDecConfig
from llm_jax.extras.labels import Classification
from llm_jax.infer.score import add_up
from llm_jax.losses.config import LossConfig, make_objective
from llm_jax.losses.objective import Objective
from llm_jax.losses.term import Constants
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import make_optimizer
from llm_jax.training.state import eval_step

CFG = DecoderConfig(vocab_size=32, max_len=16, num_layers=2, embed_dim=16, num_heads=4, dtype='float32',
                    positions='rope', norm='rms_norm', mlp='swiglu')
BOTH = LossConfig(terms=('next_token', 'classification'), sections=Sections(
    {'classification': Classification(weight=0.5, num_classes=4)}))


def features(n, num_rows=16):
  """Documents that count up by 1, 2, 3 or 4, which is their class; and a second one of the same kind."""
  rng = np.random.default_rng(n)
  kinds = rng.integers(0, 4, num_rows)

  def texts():
    lengths = rng.integers(4, 17, (num_rows, 1))
    real = np.arange(16)[None] < lengths
    ids = (rng.integers(0, 32, (num_rows, 1)) + np.arange(17) * (kinds[:, None] + 1)) % 32
    return ids.astype(np.int32), real.astype(np.int32)

  (ids, real), (other, other_real) = texts(), texts()
  return {'tokens': ids[:, :16] * real, 'targets': ids[:, 1:] * real, 'loss_mask': real.astype(np.float32),
          'segment_ids': real, 'labels': kinds.astype(np.int32), 'encoder_tokens': other[:, :16] * other_real,
          'encoder_segment_ids': other_real}


def train(config, num_steps=12, *, cfg=CFG, sizes=(1, 1, 1), num_microbatches=1, constants=None):
  """([loss, extra_loss] of each step, state, metrics of the last one) on a mesh of virtual devices."""
  objective = make_objective(config, constants=constants)
  model = make_model(cfg, objective.heads, objective.num_weights)
  history, state, _ = train_on(sizes, model, make_optimizer(OPTIM, 20), features, num_steps=num_steps,
                               objective=objective, num_microbatches=num_microbatches,
                               constants={name: constant.arrays for name, constant in (constants or {}).items()})
  return np.array([[m['loss'], m['extra_loss']] for m in history]), state, history[-1]


@pytest.mark.parametrize('config', [
    pytest.param(BOTH, marks=pytest.mark.slow, id='next token and class'),
    pytest.param(LossConfig(terms=('contrastive',), sections=Sections({'contrastive': Contrastive(embedding_dim=8)})),
                 marks=pytest.mark.slow, id='contrastive')])
def test_losses_do_not_depend_on_the_mesh(config):
  """Contrastive: the rows of all devices are each other's negatives."""
  alone, sharded = train(config)[0], train(config, sizes=(2, 2, 2))[0]
  np.testing.assert_allclose(sharded, alone, atol=2e-5, rtol=0)
  assert alone[-1, 0] < alone[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize('balance', ['fixed', 'uncertainty'])
def test_losses_do_not_depend_on_the_number_of_microbatches(balance):
  config = LossConfig(terms=BOTH.terms, sections=BOTH.sections, balance=balance)
  alone, cut = train(config), train(config, num_microbatches=4)
  np.testing.assert_allclose(cut[0], alone[0], atol=1e-5, rtol=0)
  assert cut[2] == pytest.approx(alone[2], abs=1e-3)


def test_losses_are_logged_apart_and_summed_by_weight():
  _, state, metrics = train(BOTH, 3)
  both = metrics['next_token/loss'] + 0.5 * metrics['classification/loss']
  assert metrics['loss'] == pytest.approx(both, rel=1e-5) and metrics['extra_loss'] == pytest.approx(0, abs=1e-5)
  assert state.params.keys() == {'embed', 'blocks', 'final_norm', 'heads_classification'}


@pytest.mark.parametrize('balance', [pytest.param('uncertainty', marks=pytest.mark.slow), 'grad_norm'])
@pytest.mark.slow
def test_learned_weights_change_and_are_logged(balance):
  config = LossConfig(terms=BOTH.terms, balance=balance,
                      sections=Sections({'classification': Classification(num_classes=4)}))
  losses, state, metrics = train(config, 12)
  weights = np.array([metrics['next_token/weight'], metrics['classification/weight']])
  s = np.asarray(state.params['loss_weights'])
  assert losses[-1, 0] < losses[0, 0] and np.abs(s).min() > 0.01
  after = np.exp(-s) if balance == 'uncertainty' else 2 * jax.nn.softmax(s)
  np.testing.assert_allclose(weights, after, rtol=0.05)  # what is logged is from before the step


def test_grad_norm_needs_the_whole_batch():
  """Norms of parts do not add up to the whole's."""
  assert make_objective(BOTH).row_wise
  assert not make_objective(LossConfig(terms=BOTH.terms, balance='grad_norm')).row_wise


def test_heads_do_not_move_other_parameters():
  plain = nn.unbox(jax.jit(make_model(CFG).init)(jax.random.key(0), Batch(**features(0)))['params'])
  model = make_model(CFG, (('classification', 4),))
  headed = nn.unbox(jax.jit(model.init)(jax.random.key(0), Batch(**features(0)))['params'])
  assert jax.tree.map(jnp.shape, {k: headed[k] for k in plain}) == jax.tree.map(jnp.shape, plain)
  same = jax.jit(model.apply)({'params': {**headed, **plain}}, Batch(**features(0)))
  np.testing.assert_array_equal(same, jax.jit(make_model(CFG).apply)({'params': plain}, Batch(**features(0))))


@pytest.mark.parametrize('cfg', [
    pytest.param(EncDecConfig(vocab_size=32, max_len=16, encoder_len=16, num_layers=1, embed_dim=16, num_heads=2),
                 marks=pytest.mark.slow, id='encdec'),
    pytest.param(BytePatchConfig(vocab_size=32, max_len=16, num_layers=1, embed_dim=16, num_heads=2, window=8,
                                 thinking_steps=1), marks=pytest.mark.slow, id='byte_patch')])
def test_heads_on_other_models_learn_in_bfloat16(cfg):
  losses, state, metrics = train(BOTH, 12, cfg=dataclasses.replace(cfg, dtype='bfloat16'))
  assert losses[-1, 0] < losses[0, 0] and metrics['skipped'] == 0
  assert np.abs(state.params['heads_classification']['b']).min() > 1e-3


@pytest.mark.slow
def test_a_student_approaches_its_teacher():
  """The same on a mesh, and in microbatches."""
  teacher = jax.device_get(train(LossConfig(), 12)[1].params)
  term = Distillation(teacher='x', hidden=1.0, hidden_dim=16)
  config = LossConfig(terms=('distillation',), sections=Sections({'distillation': term}))
  constants = {'distillation': Constants(teacher, partial(teacher_readout, make_model(CFG)), 0.0, term)}
  losses, state, _ = train(config, 12, constants=constants)
  assert losses[-1, 0] < 0.7 * losses[0, 0]
  assert 'heads_distillation' in state.params
  others, _, _ = train(config, 12, constants=constants, sizes=(2, 2, 2), num_microbatches=2)
  np.testing.assert_allclose(others, losses, atol=2e-5, rtol=0)


def test_num_tokens_excludes_padding():
  """A pair's second text too, whatever is learnt of it."""
  batch = Batch(**features(0))
  first, second = (np.sum(x > 0) for x in (batch.segment_ids, batch.encoder_segment_ids))
  batch = batch.replace(loss_mask=jnp.zeros((16, 16)))
  assert Objective().num_tokens(batch) == first
  assert Objective().num_tokens(batch.replace(segment_ids=None)) == 16 * 16
  assert make_objective(LossConfig(terms=('next_token', 'contrastive'))).num_tokens(batch) == first + second


def test_class_logits_ignore_padding_and_other_rows():
  """Padding after a document, and other rows, do not change its logits."""
  objective = make_objective(LossConfig(
      terms=('classification',), sections=Sections({'classification': Classification(num_classes=4)})))
  model, batch = make_model(CFG, objective.heads), Batch(**features(0))
  params = jax.jit(model.init)(jax.random.key(0), batch)['params']

  def logits(module, batch):
    [given] = objective._inputs(module, batch, None, train=False)
    return objective.terms[0][1].logits(given)

  run = jax.jit(partial(model.apply, method=logits))
  before = run({'params': params}, batch)
  padded = batch.replace(tokens=jnp.where(batch.segment_ids > 0, batch.tokens, 7))
  np.testing.assert_allclose(run({'params': params}, padded), before, atol=1e-6)
  other = batch.replace(tokens=np.concatenate([batch.tokens[:1], np.full_like(batch.tokens[1:], 3)]))
  np.testing.assert_allclose(run({'params': params}, other)[0], before[0], atol=1e-6)
  changed = batch.replace(tokens=(batch.tokens + 1) % 32 * batch.segment_ids)
  assert np.abs(run({'params': params}, changed) - before).min(-1).max() > 1e-3


def test_evaluation_sums_do_not_depend_on_batches():
  objective = make_objective(BOTH)
  model, data = make_model(CFG, objective.heads), features(0, 12)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), Batch(**data))['params'])
  fn = jax.jit(partial(eval_step, model=model, objective=objective, token_bytes=jnp.ones(32, jnp.int32)))

  def padded(rows, size):
    cut = {k: v[rows] for k, v in data.items()}
    return Batch(**{k: np.pad(v, ((0, size - len(v)),) + ((0, 0),) * (v.ndim - 1)) for k, v in cut.items()})

  whole = add_up(fn, params, [Batch(**data)])
  ragged = add_up(fn, params, [padded(slice(i, i + 5), 5) for i in range(0, 12, 5)])
  assert objective.summarize(ragged) == pytest.approx(objective.summarize(whole), rel=1e-6)
  np.testing.assert_array_equal(objective.tables(ragged)['classification'], objective.tables(whole)['classification'])
  results = objective.summarize(whole)
  assert results['loss'] == pytest.approx(results['next_token/loss'] + 0.5 * results['classification/loss'])
  assert objective.tables(whole)['classification'].sum() == 12


def test_distillation_is_evaluated_as_next_token():
  config = LossConfig(terms=('distillation',), sections=Sections({'distillation': Distillation(teacher='x')}))
  assert make_objective(config).eval_objective() == Objective()
