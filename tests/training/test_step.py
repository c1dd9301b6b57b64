"""The step: equal over meshes and microbatches, really sharded, never non-finite."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import train_on

from llm_jax.base.batch import Batch
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import (
  MeshConfig,
  constrain,
  local_rows,
  logical_to_spec,
  make_mesh,
  num_batch_shards,
  put_batch,
)
from llm_jax.infer.score import add_up
from llm_jax.losses.readout import Readout
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import OptimConfig, make_optimizer
from llm_jax.optim.groups import trainable_paths
from llm_jax.training.shardings import abstract_state, boxed_params, param_info, shardings_of
from llm_jax.training.state import NEXT_TOKEN, eval_step, init_state, train_step

CFG = DecoderConfig(vocab_size=32, max_len=16, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, dtype='float32',
                    positions='rope', norm='rms_norm', mlp='swiglu')
OPTIM = build(OptimConfig, {'learning_rate': 1e-2, 'warmup_cosine': {'warmup_steps': 2}})


def features(n, num_rows=16):
  """Batch n: sequences that count up from a random start, with ragged ends, so there is something to learn."""
  rng = np.random.default_rng(n)
  tokens = (rng.integers(0, 32, (num_rows, 1)) + np.arange(17)) % 32
  mask = np.arange(16)[None] < rng.integers(4, 17, (num_rows, 1))
  return {'tokens': tokens[:, :-1].astype(np.int32), 'targets': tokens[:, 1:].astype(np.int32),
          'loss_mask': mask.astype(np.float32), 'segment_ids': mask.astype(np.int32)}


def train(num_steps, *, mesh=(1, 1, 1), num_microbatches=1, cfg=CFG):
  """Losses, final state and its shardings of a run on a mesh of virtual devices."""
  history, state, shardings = train_on(mesh, make_model(cfg), make_optimizer(OPTIM, 20), features,
                                       num_steps=num_steps, num_microbatches=num_microbatches)
  return np.array([metrics['loss'] for metrics in history]), state, shardings


@pytest.fixture(scope='module')
def alone():
  return train(20)


@pytest.mark.parametrize(('sizes', 'num_microbatches'), [
    ((2, 2, 2), 1), pytest.param((8, 1, 1), 2, marks=pytest.mark.slow)])
def test_losses_do_not_depend_on_the_mesh(alone, sizes, num_microbatches):
  losses, state, _ = train(20, mesh=sizes, num_microbatches=num_microbatches)
  np.testing.assert_allclose(losses, alone[0], atol=1e-5, rtol=0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), jax.device_get(state.params),
               jax.device_get(alone[1].params))


LONG = build(OptimConfig, {
    'learning_rate': 1e-2, 'chain': ['clip_by_global_norm', 'grokfast_ema', 'grokfast_ma', 'muon', 'noise_adaptive',
                                     'reduce_on_plateau', 'ema'],
    'grokfast_ma': {'window': 3},
    'groups': {'norms': {'pattern': 'norm', 'frozen': True}, 'tables': {'pattern': 'embed', 'learning_rate': 2.0},
               'low': {'pattern': 'blocks/mlp@0', 'frozen': True}, 'deep': {'pattern': 'blocks', 'layer_decay': 0.5}}})


def long_chain():
  """(the optimizer, whether a path is trainable)"""
  info = param_info(boxed_params(Batch(**features(0)), model=make_model(CFG)))
  return make_optimizer(LONG, 20, info), trainable_paths(LONG.groups, info)


def test_optimizer_states_are_sharded_like_parameters():
  tx, is_trainable = long_chain()
  boxed = boxed_params(Batch(**features(0)), model=make_model(CFG))
  shardings = shardings_of(abstract_state(boxed, make_mesh(MeshConfig(2, 2, 2)), tx=tx, is_trainable=is_trainable))
  lies = {leaf.spec for leaf in jax.tree.leaves(shardings.params)}
  sharded = [s.spec for s in jax.tree.leaves(shardings.opt_state) if s.spec != P()]
  assert len(sharded) > 2 * sum(s.spec != P() for s in jax.tree.leaves(shardings.params)) - 8
  assert all(spec in lies or P(*spec[1:]) in lies for spec in sharded)
  assert max(map(len, sharded)) == 1 + max(map(len, lies)), 'a window of gradients has one dimension more'


@pytest.mark.slow
def test_a_long_chain_gives_the_same_on_a_mesh():
  (tx, is_trainable), losses, averages = long_chain(), [], []
  for sizes in ((1, 1, 1), (2, 2, 2)):
    history, state, _ = train_on(sizes, make_model(CFG), tx, features, num_steps=8, is_trainable=is_trainable)
    losses.append([metrics['loss'] for metrics in history])
    averages.append(jax.device_get(tx.evaluated(state.opt_state, state.trainable)))
  np.testing.assert_allclose(*losses, atol=1e-4, rtol=0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *averages)
  assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize('count', [4])
def test_losses_do_not_depend_on_the_number_of_microbatches(alone, count):
  """Though rows carry different numbers of tokens: the mean is over tokens, not over rows."""
  losses, _, _ = train(20, num_microbatches=count)
  np.testing.assert_allclose(losses, alone[0], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_losses_match_plain_cross_entropy(alone, monkeypatch):
  def plain(readout, targets, weights, z_loss, label_smoothing):
    nll = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(readout.logits(), targets) * weights)
    return nll, nll

  monkeypatch.setattr('llm_jax.losses.next_token.cross_entropy', plain)
  np.testing.assert_allclose(train(20)[0], alone[0], atol=1e-5, rtol=0)


def test_the_loss_decreases(alone):
  assert alone[0][-1] < 0.7 * alone[0][0]


SHARDS = ('fsdp', 'context')


def test_parameters_and_optimizer_state_are_sharded():
  _, state, _ = train(1, mesh=(2, 2, 2))
  specs = {'q': P('stage', SHARDS, 'tensor', None), 'o': P('stage', 'tensor', None, SHARDS)}
  adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: isinstance(s, optax.ScaleByAdamState))
              if isinstance(s, optax.ScaleByAdamState))
  for params in (state.params, adam.mu, adam.nu):
    for name, spec in specs.items():
      leaf = params['blocks']['attn'][name]['w']
      assert leaf.sharding.spec == spec
      assert leaf.addressable_shards[0].data.size == leaf.size // 4
  held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
  assert held < 0.3 * sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_init_does_not_depend_on_the_mesh():
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(train(0)[1].params),
               jax.device_get(train(0, mesh=(2, 2, 2))[1].params))


def test_the_step_is_pure():
  """Called bare, twice, with the same state and batch: the same bits, dropout included; another seed differs."""
  model = make_model(DecoderConfig(vocab_size=32, max_len=16, num_layers=1, embed_dim=8, num_heads=2, dropout=0.2))
  tx = make_optimizer(OPTIM, 20)
  batch = Batch(**features(0))
  state = jax.jit(partial(init_state, model=model, tx=tx))(jax.random.key(0), batch)
  step = jax.jit(partial(train_step, model=model, tx=tx), static_argnames='seed')
  first, second, other = step(state, batch, seed=1), step(state, batch, seed=1), step(state, batch, seed=2)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert first[1]['loss'] != other[1]['loss']
  assert step(first[0], batch, seed=1)[1]['loss'] != first[1]['loss']


class Odd(nn.Module):
  """A model of one number whose loss gradient is what the batch says, and which sows."""

  def __call__(self, batch):
    return self.readout(batch).logits()

  @nn.compact
  def readout(self, batch, *, train=False):
    w = self.param('w', nn.initializers.ones, (1, 1, 1))
    self.sow('losses', 'penalty', 3.0 * jnp.sum(w))
    self.sow('metrics', 'weight', w)
    x_BTD = w * batch.tokens[..., None].astype(jnp.float32)
    return Readout(x_BTD, jnp.array([[1.0, 0.0]]), lambda w_DV, x_BTD: jnp.einsum('BTD,DV->BTV', x_BTD, w_DV))


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30])
def test_non_finite_gradients_never_reach_the_state(bad):
  tx = make_optimizer(build(OptimConfig, {'chain': ('adamw',)}), 20)
  ones = jnp.ones((2, 3), jnp.int32)
  state = jax.jit(partial(init_state, model=Odd(), tx=tx))(jax.random.key(0), Batch(ones, ones, ones * 1.0))
  step = jax.jit(partial(train_step, model=Odd(), tx=tx, seed=0))
  good, metrics = step(state, Batch(ones, ones, ones * 1.0))
  assert metrics['skipped'] == 0 and good.params['w'] != state.params['w']
  mask = jnp.zeros((2, 3)).at[0, 0].set(bad).at[0, 1].set(-bad)  # of sum 0: the mean does not scale it away
  after, metrics = step(good, Batch(ones.at[0, 0].set(5), ones, mask))
  assert metrics['skipped'] == 1 and after.step == 2
  jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (good.params, good.opt_state))
  assert step(after, Batch(ones, ones, ones * 1.0))[1]['skipped'] == 0


@pytest.mark.parametrize('num_microbatches', [1, 2])
def test_sown_losses_are_added_and_metrics_logged(num_microbatches):
  tx = make_optimizer(build(OptimConfig, {'chain': ('sgd',)}), 20)
  zeros = jnp.zeros((2, 3), jnp.int32)
  batch = Batch(zeros, zeros, jnp.ones((2, 3)))
  state = jax.jit(partial(init_state, model=Odd(), tx=tx))(jax.random.key(0), batch)
  _, metrics = jax.jit(partial(train_step, model=Odd(), tx=tx, seed=0,
                               num_microbatches=num_microbatches))(state, batch)
  assert metrics['extra_loss'] == pytest.approx(3.0) and metrics['grad_norm'] == pytest.approx(3.0)
  assert metrics['loss'] == pytest.approx(np.log(2)) and metrics['weight'] == pytest.approx(1.0)


def test_evaluation_does_not_depend_on_batch_sizes():
  model = make_model(CFG)
  data = features(0, 12)
  params = jax.jit(model.init)(jax.random.key(0), Batch(**data))['params']
  params, token_bytes = nn.unbox(params), jnp.arange(32)
  fn = jax.jit(partial(eval_step, model=model, token_bytes=token_bytes))

  def padded(rows, size):
    return Batch(**{k: np.pad(v[rows], ((0, size - len(v[rows])), (0, 0))) for k, v in data.items()})

  whole = NEXT_TOKEN.summarize(add_up(fn, params, [Batch(**data)]))
  ragged = NEXT_TOKEN.summarize(add_up(fn, params, [padded(slice(i, i + 5), 5) for i in range(0, 12, 5)]))
  assert ragged == pytest.approx(whole, rel=1e-6)
  logits = np.asarray(jax.jit(model.apply)({'params': params}, Batch(**data)), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -(np.take_along_axis(log_p, data['targets'][..., None], -1)[..., 0] * data['loss_mask']).sum()
  tokens, num_bytes = data['loss_mask'].sum(), (data['targets'] * data['loss_mask']).sum()
  assert whole['loss'] == pytest.approx(nll / tokens, rel=1e-5)
  assert whole['perplexity'] == pytest.approx(np.exp(nll / tokens), rel=1e-4)
  assert whole['bits_per_byte'] == pytest.approx(nll / np.log(2) / num_bytes, rel=1e-5)


def test_colliding_and_unknown_logical_axes_raise():
  with pytest.raises(ValueError, match=r'mlp.*heads|heads.*mlp'):
    logical_to_spec(('mlp', 'heads'))
  with pytest.raises(ValueError, match='haeds'):
    logical_to_spec(('embed', 'haeds'))
  with pytest.raises(ValueError, match='haeds'):
    constrain(jnp.zeros(3), 'haeds')


def test_an_indivisible_dimension_is_reported():
  with pytest.raises(ConfigError, match=r'embed/w.*33'):
    train(1, mesh=(1, 1, 2), cfg=DecoderConfig(**{**CFG.__dict__, 'vocab_size': 33}))


def test_a_mesh_must_cover_all_devices():
  with pytest.raises(ConfigError, match='8 device'):
    make_mesh(MeshConfig(data=3))
  assert num_batch_shards(make_mesh(MeshConfig(data=-1, tensor=2))) == 4


def test_put_batch_places_each_row_once():
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  x = {'tokens': np.arange(24).reshape(8, 3)}
  batch = put_batch({**x, 'targets': x['tokens'], 'loss_mask': x['tokens']}, local_rows(mesh, 8), 8, mesh)
  np.testing.assert_array_equal(batch.tokens, x['tokens'])
  assert batch.tokens.addressable_shards[0].data.shape == (2, 3)
