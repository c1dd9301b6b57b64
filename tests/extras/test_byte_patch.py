"""The byte-patch model: causality of bytes, its cache, thinking, and equal losses on any mesh."""

import dataclasses
import functools
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import train_on

from llm_jax.base.batch import Batch
from llm_jax.base.builder import build
from llm_jax.extras.byte_patch import BytePatchConfig
from llm_jax.extras.linear_attention import CHUNK, linear_attention
from llm_jax.extras.thinking import EPSILON, Think
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import OptimConfig, make_optimizer
from llm_jax.training.state import init_state

TINY = BytePatchConfig(vocab_size=17, max_len=64, num_layers=2, embed_dim=16, num_heads=2, window=3, thinking_steps=2,
                       dtype='float32')
SHAPES = {
    'gru': TINY,
    'overlapping': dataclasses.replace(TINY, overlap=True, halting=True, norm='layer_norm', mlp='gelu', use_bias=True),
    'transformer': dataclasses.replace(TINY, decoder='transformer', patch_size=2, thinking_steps=0),
}
OPTIM = build(OptimConfig, {'learning_rate': 1e-2})
most_shapes = pytest.mark.parametrize('cfg', [
    pytest.param(cfg, id=name, marks=[pytest.mark.slow] * (name != 'gru')) for name, cfg in SHAPES.items()])
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 30))  # the last patch of 4 is not complete


def batch(tokens=TOKENS):
  tokens = np.asarray(tokens, np.int32)
  return Batch(tokens=tokens, targets=tokens, loss_mask=np.ones(tokens.shape, np.float32))


@functools.lru_cache
def init(cfg):
  """The model with random parameters, away from the init's symmetry."""
  model, rng = make_model(cfg), np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch())['params'])
  return model, jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@most_shapes
def test_each_byte_depends_on_exactly_the_earlier_bytes(cfg):
  """Tested by gradients through both embedding tables, with a row of distinct bytes; patch borders do not matter."""
  model, params = init(dataclasses.replace(cfg, vocab_size=31))
  tokens = np.random.default_rng(1).permutation(30) + 1  # 0 fills up the last patch

  def logits(shift_V):
    tables = {name: {'w': params[name]['w'] + shift_V[:, None]} for name in ('embed', 'local_embed')}
    return model.apply({'params': params | tables}, batch(tokens[None]))[0, :, :3] @ jnp.array([1.0, 2.0, 4.0])

  jacobian_TS = np.asarray(jax.jit(jax.jacrev(logits))(jnp.zeros(31)))[:, tokens]
  np.testing.assert_array_equal(jacobian_TS != 0, np.tril(np.ones((30, 30), bool)))


@most_shapes
def test_cached_decoding_equals_the_full_forward_pass(cfg):
  """Prompts end inside a patch, at a border, and before the first; the window's ring buffer wraps around."""
  model, params = init(cfg)
  tokens = np.concatenate([TOKENS, TOKENS[:1]])
  full = np.asarray(jax.jit(lambda b: model.apply({'params': params}, b))(batch(tokens)))
  lengths = np.array([3, 16, 1])
  prefill = jax.jit(lambda t, n, c: model.apply({'params': params}, t, n, c, method='prefill'))
  decode = jax.jit(lambda t, c: model.apply({'params': params}, t, c, method='decode'))
  logits, cache = prefill(tokens[:, :18], lengths, model.init_cache(3, 64))
  for i in range(14):
    np.testing.assert_allclose(logits, full[np.arange(3), lengths + i - 1], rtol=2e-4, atol=2e-4)
    logits, cache = decode(tokens[np.arange(3), lengths + i], cache)


def test_cache_size_does_not_depend_on_length():
  """The size of the cache is constant, and so is the work per byte."""
  model, _ = init(SHAPES['gru'])
  short, long = (jax.eval_shape(lambda n=n: model.init_cache(1, n)) for n in (64, 1 << 20))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), short) == jax.tree.map(lambda x: (x.shape, x.dtype), long)
  assert max(x.size for x in jax.tree.leaves(long)) <= TINY.num_layers * TINY.embed_dim * max(TINY.window, 8)


def reference(q, k, v):
  """The sums of arXiv 2006.16236, equation 9, one token after the other in float64."""
  phi = lambda x: np.where(x > 0, x + 1, np.exp(x))  # noqa: E731
  y, s, z = np.zeros_like(v), np.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1])), np.zeros((k.shape[0], *k.shape[2:]))
  for t in range(q.shape[1]):
    s += phi(k[:, t])[..., :, None] * v[:, t][..., None, :]
    z += phi(k[:, t])
    y[:, t] = np.einsum('bnh,bnhi->bni', phi(q[:, t]), s) / np.einsum('bnh,bnh->bn', phi(q[:, t]), z)[..., None]
  return y


@pytest.mark.parametrize(('length', 'shift'), [(1, 0), (CHUNK, -20), (2 * CHUNK + 5, 0)])
def test_linear_attention_matches_its_equation_and_resumes(length, shift):
  """Also if all features are tiny."""
  q, k, v = np.random.default_rng(0).normal(size=(3, 2, length, 2, 4))
  q, k = q + shift, k + shift
  attend = jax.jit(linear_attention)
  y, _ = attend(*(jnp.float32(x) for x in (q, k, v)))
  np.testing.assert_allclose(y, reference(q, k, v), rtol=1e-4, atol=1e-5)
  cut = length // 2
  if cut:
    first, state = attend(*(jnp.float32(x[:, :cut]) for x in (q, k, v)))
    second, _ = attend(*(jnp.float32(x[:, cut:]) for x in (q, k, v)), state)
    np.testing.assert_allclose(np.concatenate([first, second], 1), y, rtol=1e-4, atol=1e-5)


def test_linear_attention_keeps_no_state_per_token():
  H = 64

  def temporary(length):
    x = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32)
    gradient = jax.jit(jax.grad(lambda q, k, v: linear_attention(q, k, v)[0].sum(), argnums=(0, 1, 2)))
    return gradient.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

  short, long = temporary(1024), temporary(8192)
  assert long < 10 * short and long < 8192 * H * H * 4 / 4


def test_thinking_matches_its_equations():
  """Steps with shared weights, and the halting of arXiv 1603.08983, section 2, in NumPy."""
  cfg = dataclasses.replace(TINY, thinking_steps=3, halting=True, mlp='gelu', norm='layer_norm')
  z = np.random.default_rng(1).normal(size=(2, 5, 16))
  think = Think(cfg)
  shapes = nn.unbox(jax.eval_shape(think.init, jax.random.key(0), jnp.float32(z))['params'])
  rng = np.random.default_rng(2)
  p = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape), shapes)
  result, sown = jax.jit(lambda p, z: think.apply({'params': p}, z, mutable=['losses', 'metrics']))(
      jax.tree.map(np.float32, p), np.float32(z))

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p['norm']['scale']

  def mlp(x):
    h = x @ p['mlp']['up']['w']
    return h * 0.5 * (1 + np.vectorize(math.erf)(h / 2**0.5)) @ p['mlp']['down']['w']

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  expected, ponder, left = np.zeros_like(z), np.zeros(z.shape[:2]), np.ones(z.shape[:2])
  for n in range(3):
    z = z + sigmoid(norm(z) @ p['gate']['w'] + p['gate']['b']) * mlp(norm(z))
    halt = sigmoid(norm(z) @ p['halt']['w'] + p['halt']['b'])[..., 0]
    running, stops = left > 0, (left - halt < EPSILON) | (n == 2)
    weight = np.where(stops, left, halt)
    ponder += running * (1 + np.where(stops, left, 0))
    expected += weight[..., None] * z
    left = left - weight
  np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(sown['metrics']['ponder'][0], ponder.mean(), rtol=1e-5)
  np.testing.assert_allclose(sown['losses']['ponder'][0], cfg.ponder_cost * ponder.mean(), rtol=1e-5)


def test_zero_thinking_steps_have_no_weights():
  assert 'think' not in init(SHAPES['transformer'])[1]
  assert 'think' in init(SHAPES['gru'])[1]


@functools.lru_cache
def first_state(cfg):
  tx = make_optimizer(OPTIM, 20)
  example = Batch(*np.zeros((3, 1, 8), np.int32))
  return jax.device_get(jax.jit(partial(init_state, model=make_model(cfg), tx=tx))(jax.random.key(0), example))


def train(sizes, num_microbatches, decoder):
  """Losses and parameters of five steps on a mesh of virtual devices."""
  cfg = dataclasses.replace(TINY, vocab_size=16, num_layers=2, patch_size=2, overlap=True, thinking_steps=1,
                            halting=True, decoder=decoder)

  def features(n):
    tokens = ((np.random.default_rng(n).integers(0, 16, (8, 1)) + np.arange(17)) % 16).astype(np.int32)
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_mask': np.ones((8, 16), np.float32)}

  history, state, _ = train_on(sizes, make_model(cfg), make_optimizer(OPTIM, 20), features, num_steps=5,
                               state=first_state(cfg), num_microbatches=num_microbatches)
  return np.array([metrics['loss'] for metrics in history]), jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize('decoder', ['gru', 'transformer'])
def test_losses_do_not_depend_on_mesh_or_microbatches(decoder):
  losses, params = train((1, 1, 1), 1, decoder)
  assert losses[-1] < losses[0]
  for sizes in ((2, 2, 2), (2, 1, 2, 2), {'fsdp': 2, 'context': 4}):
    others, other_params = train(sizes, 2, decoder)
    np.testing.assert_allclose(others, losses, atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), other_params, params)


@pytest.mark.parametrize('decoder', ['gru', 'transformer'])
def test_flops_agree_with_xla(decoder):
  """For the whole gradient; XLA computes all scores of a window as long as the row, of which we count half."""
  cfg = BytePatchConfig(vocab_size=64, num_layers=2, embed_dim=256, num_heads=4, window=64, thinking_steps=2,
                        decoder=decoder, dtype='float32', attention='xla', scan_unroll=2)
  model, example = make_model(cfg), batch(np.zeros((1, 256)))
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply({'params': params}, example) ** 2)))
  counted = gradient.lower(params).cost_analysis()['flops'] / 256
  assert counted == pytest.approx(cfg.flops_per_token(256), rel=0.1)


@pytest.mark.slow
def test_remat_does_not_change_gradients():
  """With blocks that contain a scan with its own jax.checkpoint."""
  cfg = dataclasses.replace(TINY, num_layers=1, thinking_steps=0)
  _, params = init(cfg)

  def gradient(cfg):
    return jax.jit(jax.grad(lambda params: jnp.sum(make_model(cfg).apply({'params': params}, batch()) ** 2)))(params)

  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient(
      dataclasses.replace(cfg, remat='full')), gradient(cfg))


@pytest.mark.parametrize(('values', 'word'), [
    ({'patch_size': 3}, 'patch_size'), ({'num_heads': 16}, 'num_heads'), ({'decoder': 'lstm'}, 'gru, transformer'),
    ({'halting': True, 'thinking_steps': 0}, 'thinking_steps'), ({'window': 0}, 'window')])
def test_invalid_settings_are_reported(values, word):
  with pytest.raises(ValueError, match=word):
    dataclasses.replace(TINY, **values)
