"""Properties of all shapes of the decoder: causality, segments, windows, cache, FLOPs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.batch import Batch
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model

TINY = DecoderConfig(vocab_size=17, max_len=16, num_layers=2, embed_dim=16, num_heads=4, dtype='float32')
SHAPES = {
    'gpt2': dataclasses.replace(TINY, use_bias=True),
    'nanogpt': dataclasses.replace(TINY, mlp='gelu'),
    'llama': dataclasses.replace(TINY, positions='rope', norm='rms_norm', mlp='swiglu', num_kv_heads=2,
                                 tie_embeddings=False, mlp_dim=40),
    'qwen3': dataclasses.replace(TINY, positions='rope', norm='rms_norm', mlp='swiglu', num_kv_heads=2, qk_norm=True,
                                 tie_embeddings=False, head_dim=6, mlp_dim=40),
    'gemma': dataclasses.replace(TINY, positions='rope', norm='rms_norm', mlp='geglu', num_kv_heads=1, windows=(4, 0),
                                 logit_soft_cap=3.0),
}
# The parts of nanogpt are in gpt2 too, and those of llama in qwen3.
every_shape = pytest.mark.parametrize('cfg', [
    pytest.param(cfg, marks=pytest.mark.slow if name in ('nanogpt', 'llama') else (), id=name)
    for name, cfg in SHAPES.items()])


def batch(tokens, segment_ids=None, positions=None, prefix_mask=None):
  tokens = np.asarray(tokens, np.int32)
  return Batch(tokens=tokens, targets=tokens, loss_mask=np.ones(tokens.shape, np.float32), segment_ids=segment_ids,
               positions=positions, prefix_mask=prefix_mask)


TOKENS = np.random.default_rng(0).integers(0, 17, (2, 16))


@functools.lru_cache
def init(cfg):
  """The model with random parameters, away from the init's symmetry (zero biases, unit scales)."""
  model, rng = make_model(cfg), np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch(TOKENS))['params'])
  return model, jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@functools.lru_cache
def compiled(cfg):
  """batch -> logits."""
  model, params = init(cfg)
  return jax.jit(lambda batch: model.apply({'params': params}, batch))


def cached(model, params):
  """(prefill, decode) with these parameters."""
  return (jax.jit(lambda t, n, c: model.apply({'params': params}, t, n, c, method='prefill')),
          jax.jit(lambda t, c: model.apply({'params': params}, t, c, method='decode')))


def dependence(model, params, **features):
  """bool [T, S]: whether the logit at t depends on the embedding at s, by gradient (exactly 0 if it does not)."""
  x = params['embed']['w'][TOKENS[:1]]
  gradient = jax.jit(jax.grad(lambda x, t: logits_of_embedding(model, params, x, features)[t].sum()))
  return np.stack([np.abs(gradient(x, t)).sum((0, 2)) > 0 for t in range(16)])


def logits_of_embedding(model, params, x, features):
  """Logits [T, 3] of a forward pass whose embedding lookup is replaced by x [1, T, D]."""
  def swap(next_fn, args, kwargs, context):
    if context.method_name == 'encode' and context.module.name == 'embed':
      return x
    return next_fn(*args, **kwargs)
  with nn.intercept_methods(swap):
    return model.apply({'params': params}, dataclasses.replace(batch(TOKENS[:1]), **features))[0, :, :3]


@every_shape
def test_each_logit_depends_on_exactly_the_earlier_tokens(cfg):
  model, params = init(cfg)
  seen = dependence(model, params)
  np.testing.assert_array_equal(seen, np.tril(np.ones((16, 16), bool)))


def test_windows_limit_attention():
  """Two layers of window 3 reach back 2 + 2 tokens."""
  model, params = init(dataclasses.replace(TINY, windows=(3,)))
  t, s = np.indices((16, 16))
  np.testing.assert_array_equal(dependence(model, params), (s <= t) & (t - s <= 4))


@every_shape
def test_segments_are_independent(cfg):
  model, params = init(cfg)
  segment_ids = np.array([[1] * 5 + [2] * 7 + [0] * 4])
  seen = dependence(model, params, segment_ids=segment_ids)
  assert not seen[np.asarray(segment_ids)[0][:, None] != np.asarray(segment_ids)[0][None, :]].any()


@every_shape
def test_packing_does_not_change_logits(cfg):
  tokens, length = TOKENS[:1], 6
  packed = batch(tokens, segment_ids=np.array([[1] * 10 + [2] * 6]),
                 positions=np.array([[*range(10), *range(6)]]))
  alone = batch(np.pad(tokens[:, 10:], ((0, 0), (0, 10))))
  np.testing.assert_allclose(compiled(cfg)(packed)[0, 10:], compiled(cfg)(alone)[0, :length], rtol=1e-4, atol=1e-4)


@every_shape
def test_cached_decoding_equals_the_full_forward_pass(cfg):
  """Prompts of different lengths, then token by token, against one pass over the whole rows."""
  model, params = init(cfg)
  full = np.asarray(compiled(cfg)(batch(TOKENS)))
  lengths = np.array([3, 7])
  prefill, decode = cached(model, params)
  logits, cache = prefill(TOKENS[:, :8], lengths, model.init_cache(2, 16))
  for i in range(9):
    np.testing.assert_allclose(logits, full[np.arange(2), lengths + i - 1], rtol=2e-4, atol=2e-4)
    logits, cache = decode(TOKENS[np.arange(2), lengths + i], cache)


def test_only_the_prefix_is_attended_to_bidirectionally():
  model, params = init(dataclasses.replace(TINY, prefix_attention=True, num_layers=1, windows=(0,)))
  prefix = np.array([[1] * 6 + [0] * 10])
  t, s = np.indices((16, 16))
  np.testing.assert_array_equal(dependence(model, params, prefix_mask=prefix), (s <= t) | (s < 6))
  plain, _ = init(dataclasses.replace(TINY, num_layers=1))  # the same shapes; this one ignores the mask
  np.testing.assert_array_equal(dependence(plain, params, prefix_mask=prefix), s <= t)


@pytest.mark.parametrize('windows', [pytest.param((0,), marks=pytest.mark.slow), (2,)])
def test_a_prompt_is_treated_as_prefix(windows):
  """A token sees the whole prompt, also where a window ends before it."""
  cfg = dataclasses.replace(TINY, prefix_attention=True, windows=windows)
  model, params = init(cfg)
  lengths = np.array([3, 7])
  prefill, decode = cached(model, params)
  logits, cache = prefill(TOKENS[:, :8], lengths, model.init_cache(2, 16))
  full = np.asarray(compiled(cfg)(batch(TOKENS, prefix_mask=np.arange(16)[None] < lengths[:, None])))
  for i in range(8):
    np.testing.assert_allclose(logits, full[np.arange(2), lengths + i - 1], rtol=2e-4, atol=2e-4)
    logits, cache = decode(TOKENS[np.arange(2), lengths + i], cache)


def test_dropout_is_seeded_and_off_in_evaluation():
  model, params = init(dataclasses.replace(TINY, dropout=0.1))

  @functools.partial(jax.jit, static_argnums=0)
  def logits(train, seed=0):
    return model.apply({'params': params}, batch(TOKENS), train=train, rngs={'dropout': jax.random.key(seed)})

  np.testing.assert_array_equal(logits(False), logits(False, 1))
  np.testing.assert_array_equal(logits(True), logits(True))
  assert not np.allclose(logits(True), logits(True, 1))
  mean = np.mean([logits(True, seed) for seed in range(64)], axis=0)
  assert np.corrcoef(mean.ravel(), logits(False).ravel())[0, 1] > 0.95


def test_logits_are_capped():
  model, params = init(SHAPES['gemma'])
  large = jax.tree.map(lambda p: 10 * p, params)
  logits = jax.jit(lambda params: model.apply({'params': params}, batch(TOKENS)))(large)
  assert 2.9 < float(np.abs(logits).max()) <= 3.0


def test_bfloat16_logits_are_within_rounding():
  cfg = SHAPES['qwen3']
  exact = compiled(cfg)(batch(TOKENS))
  rounded = compiled(dataclasses.replace(cfg, dtype='bfloat16'))(batch(TOKENS))  # of the same parameters
  assert rounded.dtype == jnp.float32
  assert 0 < float(np.abs(rounded - exact).max()) < 0.05 * float(np.abs(exact).max())


@pytest.mark.parametrize('cfg', [SHAPES['nanogpt'], SHAPES['llama']], ids=['nanogpt', 'llama'])
def test_flops_agree_with_xla(cfg):
  """For the whole gradient; XLA computes all T x T scores, of which we do not count the masked half, 11% here."""
  cfg = dataclasses.replace(cfg, max_len=512, embed_dim=256, mlp_dim=1024, vocab_size=1024, attention='xla',
                            scan_unroll=2)
  model, example = make_model(cfg), batch(np.zeros((1, 512)))
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply({'params': params}, example) ** 2)))
  hidden = 6 * cfg.num_layers * cfg.num_heads * cfg.H * 512
  assert hidden > 0.1 * cfg.flops_per_token(512)
  ours = (cfg.flops_per_token(512) + hidden) * 512
  assert gradient.lower(params).cost_analysis()['flops'] == pytest.approx(ours, rel=0.05)


def test_attention_flops_count_attended_tokens():
  """Against multiply-adds counted one by one, with alternating windows of 3 and of all tokens."""
  cfg = dataclasses.replace(TINY, windows=(3, 0))
  keys = [sum(min(t + 1, window or 512) for t in range(512)) for window in cfg.windows]
  without = dataclasses.replace(cfg, windows=(1,)).flops_per_token(512)
  pairs = 12 * cfg.num_heads * cfg.H * (sum(keys) - 2 * 512) / 512
  assert cfg.flops_per_token(512) - without == pytest.approx(pairs, rel=0.01)
