"""BitNet's matrices against the papers' equations in NumPy; training with them; the packed form."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import train_on
from test_step import OPTIM, features

from llm_jax.base.batch import Batch
from llm_jax.base.builder import Sections, build
from llm_jax.base.params import ParamInfo
from llm_jax.extras.bitnet import BitEinsum, BitNet, PackedEinsum, pack, unpack, weight_codes
from llm_jax.extras.bitnet_hf import pack_hf, unpack_hf
from llm_jax.layers.clock import clock_at, progress
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import OptimConfig, make_optimizer

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32), RNG.standard_normal((4, 5, 6)).astype(np.float32)
EQN = 'BTNH,NHD->BTD'
CFG = DecoderConfig(vocab_size=32, max_len=16, num_layers=2, embed_dim=16, num_heads=4, dtype='float32',
                    positions='rope', norm='rms_norm', mlp='swiglu', einsum='bitnet')


def einsum(dtype=jnp.float32, kind=BitEinsum, **settings):
  return kind(shape=W.shape, axes=('heads', 'head_dim', 'embed'), initializer=nn.initializers.normal(1.0), dtype=dtype,
              bitnet=BitNet(**settings))


def run(x, w, dtype=jnp.float32, rngs=None, **settings):
  product = einsum(dtype, **settings)
  return jax.jit(lambda x, w, rngs: product.apply({'params': {'w': w}}, EQN, x, rngs=rngs))(x, w, rngs)


def quantized(x, w, bits='1.58', activation_bits=8, sub_norm=False):
  """Equations 1 to 3 of arXiv 2402.17764 (absmean, absmax per token), and of 2310.11453 (sign, mean).

  Scales are at least 1e-5, as in transformers/integrations/bitnet.py, instead of 1e-5 more.
  """
  x, w = x.astype(np.float64), w.astype(np.float64)
  if sub_norm:
    x = x / np.sqrt((x**2).mean((2, 3), keepdims=True) + 1e-5)
  gamma = max(np.abs(w).mean(), 1e-5)
  w_q = np.clip(np.round(w / gamma), -1, 1) if bits == '1.58' else np.where(w >= w.mean(), 1, -1)
  q = 2 ** (activation_bits - 1) - 1
  largest = np.abs(x).max((2, 3), keepdims=True)
  x_q = np.clip(np.round(x * q / largest), -q, q) * largest / q
  return x_q, gamma * w_q


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('settings', [{}, {'bits': '1'}, {'activation_bits': 4}, {'sub_norm': True}], ids=str)
def test_products_match_the_papers(dtype, settings):
  """Also with bfloat16 operands, which represent the codes exactly."""
  x_q, w_q = quantized(X, W, **settings)
  settings = {{'bits': 'weight_bits'}.get(k, k): v for k, v in settings.items()}
  np.testing.assert_allclose(run(X, W, dtype, **settings), np.einsum('BTNH,NHD->BTD', x_q, w_q), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('std', [1.0, 4e-3, 1e-5, 0.0])
def test_small_weights_are_scaled_by_their_mean(std):
  """A number added to the mean of |w| would change outputs by a share that grows as weights become small."""
  w = (std * W).astype(np.float32)
  codes, scale = weight_codes(jnp.asarray(w), '1.58')
  mean = max(np.abs(w).mean(dtype=np.float64), 1e-5)
  assert scale == pytest.approx(mean, rel=1e-6)
  np.testing.assert_array_equal(codes, np.clip(np.round(w / np.float32(mean)), -1, 1))


@pytest.mark.parametrize('num_outputs', [4, 8, 20])
def test_the_format_of_transformers(num_outputs):
  """Four outputs a byte, a quarter of all outputs apart, two bits each, the first in the lowest bits."""
  codes = np.random.default_rng(num_outputs).integers(-1, 2, (num_outputs, 6))
  packed = pack_hf(codes)
  assert packed.dtype == np.uint8 and packed.shape == (num_outputs // 4, 6)
  for row, column in np.ndindex(packed.shape):
    quarter = num_outputs // 4
    assert packed[row, column] == sum((codes[row + i * quarter, column] + 1) * 4**i for i in range(4))
  np.testing.assert_array_equal(unpack_hf(packed), codes)
  assert unpack_hf(packed).dtype == np.int8


def test_the_example_of_transformers_is_unpacked():
  """From the docstring of unpack_weights in transformers/integrations/bitnet.py."""
  got = unpack_hf(np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8))
  np.testing.assert_array_equal(got, [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]])


@pytest.mark.parametrize('codes', [np.zeros((6, 3)), np.full((4, 3), 2), np.zeros((4, 3)) + 0.5], ids=[
    'outputs', 'values', 'fractions'])
def test_what_the_format_cannot_hold_is_refused(codes):
  with pytest.raises(ValueError, match='outputs must be a multiple of 4' if len(codes) == 6 else '-1, 0 and 1'):
    pack_hf(codes)


@pytest.mark.parametrize('scale', [1.0, 0.25])
def test_gradients_are_straight_through(scale):
  """The gradients are those of a product of the quantized operands."""
  x_q, w_q = quantized(X, W)
  dy = RNG.standard_normal((2, 3, 6)).astype(np.float32)
  dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(run(x, w, gradient_scale=scale) * dy), argnums=(0, 1)))(X, W)
  np.testing.assert_allclose(dx, np.einsum('BTD,NHD->BTNH', dy, w_q), rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(dw, scale * np.einsum('BTNH,BTD->NHD', x_q, dy), rtol=1e-3, atol=1e-4)


def test_warmup_blends_in_quantization_except_in_evaluation():
  exact = np.einsum('BTNH,NHD->BTD', X, W)
  full = run(X, W)

  def at(step):
    with clock_at(jnp.int32(step)):
      return run(X, W, warmup_steps=10)

  np.testing.assert_allclose(at(0), exact, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(at(10), full, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(at(99), full, rtol=1e-5, atol=1e-5)
  assert 0 < np.abs(at(5) - exact).max() < np.abs(full - exact).max()
  np.testing.assert_allclose(run(X, W, warmup_steps=10), full, rtol=1e-5, atol=1e-5)
  assert progress(10) == 1.0, 'outside training the warm-up is over'


def test_stochastic_rounding_keeps_the_mean():
  settings = {'rounding': 'stochastic'}
  np.testing.assert_array_equal(run(X, W, **settings), run(X, W))
  runs = jax.vmap(lambda key: run(X, W, rngs={'dropout': key}, **settings))(jax.random.split(jax.random.key(0), 4000))
  assert np.abs(runs[0] - runs[1]).max() > 0.1
  gamma = np.abs(W).mean()  # beyond which there is no code
  np.testing.assert_allclose(runs.mean(0), np.einsum('BTNH,NHD->BTD', X, np.clip(W, -gamma, gamma)), atol=0.1)


def test_sown_metrics_and_penalties_of_a_matrix():
  _, sown = einsum(penalty=2.0, sparsity_target=0.5, sparsity_weight=3.0).apply(
      {'params': {'w': W}}, EQN, X, mutable=['losses', 'metrics'])
  units = W / np.abs(W).mean()
  codes = np.clip(np.round(units), -1, 1)
  assert sown['metrics']['sparsity'][0] == pytest.approx(np.mean(codes == 0))
  error = np.linalg.norm(units - codes) / np.linalg.norm(units)
  assert sown['metrics']['quantization_error'][0] == pytest.approx(error, rel=1e-4)
  zeros = np.mean(1 / (1 + np.exp(-20 * (0.5 - np.abs(units)))))
  expected = 2 * np.mean((units - codes) ** 2) + 3 * (zeros - 0.5) ** 2
  assert sown['losses']['bitnet'][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('num_inputs', [1, 4, 7])
def test_packing_is_lossless(num_inputs):
  codes = np.random.default_rng(num_inputs).integers(-1, 2, (num_inputs, 6))
  packed = pack(jnp.asarray(codes))
  assert packed.dtype == jnp.uint8 and packed.shape == (-(-num_inputs // 4), 6)
  np.testing.assert_array_equal(unpack(packed, num_inputs), codes)


@pytest.mark.parametrize('settings', [{}, {'weight_bits': '1'}], ids=str)
def test_packed_matrices_compute_the_same(settings):
  codes, scale = weight_codes(jnp.asarray(W), settings.get('weight_bits', '1.58'))
  params = {'packed': pack(codes.reshape(20, 6)), 'scale': scale}
  got = einsum(kind=PackedEinsum, **settings).apply({'params': params}, EQN, X)
  np.testing.assert_allclose(got, run(X, W, **settings), rtol=1e-5, atol=1e-5)


def trained(cfg, num_steps=15, **parts):
  history, state, _ = train_on((1, 1, 1), make_model(cfg), make_optimizer(OPTIM, 20), features, num_steps=num_steps,
                               **parts)
  return history, state


@pytest.mark.slow
def test_a_bitnet_model_learns_and_logs_each_layer():
  history, state = trained(CFG)
  assert history[-1]['loss'] < 0.8 * history[0]['loss']
  names = [f'blocks/{name}/{kind}/{layer:02}' for name in ('attn/q', 'attn/o', 'mlp/down') for layer in (0, 1)
           for kind in ('sparsity', 'quantization_error')]
  assert set(names) <= history[0].keys() and 0.2 < history[-1]['blocks/attn/q/sparsity/00'] < 0.6
  plain = make_model(dataclasses.replace(CFG, einsum='full'))
  shapes = nn.unbox(jax.eval_shape(plain.init, jax.random.key(0), Batch(**features(0)))['params'])
  assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, shapes), 'so that runs can be converted'


def test_changed_codes_are_counted_by_layer():
  config = build(OptimConfig, {'learning_rate': 1.0, 'schedule': 'constant', 'chain': ['sgd', 'bitnet_flips'],
                               'sgd': {'momentum': 0.0}})
  info = ParamInfo(('layers', 'embed', 'mlp'), (2, 8, 8), ('batch', 'in', 'out'))
  tx = make_optimizer(config, 20, {'q': {'w': info}})
  before, step = RNG.standard_normal((2, 2, 8, 8)).astype(np.float32)
  step[1] = 0
  _, state = tx.update({'q': {'w': -step}}, tx.init({'q': {'w': before}}), {'q': {'w': before}}, value=1.0, grad=None)
  code = lambda w: np.clip(np.round(w / np.abs(w).mean((1, 2), keepdims=True)), -1, 1)  # noqa: E731
  report = tx.report(state)
  assert report['q/flipped/00'] == pytest.approx(np.mean(code(before) != code(before + step), (1, 2))[0])
  assert report['q/flipped/00'] > 0.2 and report['q/flipped/01'] == 0


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(2, 2, 2), (2, 1, 2, 2), {'fsdp': 2, 'context': 4}], ids=str)
def test_losses_do_not_depend_on_mesh_or_microbatches(sizes):
  alone, _ = trained(CFG, 5)
  sharded, _, _ = train_on(sizes, make_model(CFG), make_optimizer(OPTIM, 20), features, num_steps=5,
                           num_microbatches=2)
  np.testing.assert_allclose([m['loss'] for m in sharded], [m['loss'] for m in alone], atol=2e-3)


@pytest.mark.slow
def test_a_sparsity_target_raises_sparsity():
  target = dataclasses.replace(CFG, sections=Sections({'bitnet': BitNet(sparsity_target=0.8, sparsity_weight=100.0)}))
  share = [trained(cfg, 15)[0][-1]['blocks/mlp/up/sparsity/00'] for cfg in (CFG, target)]
  assert share[1] > share[0] + 0.05


@pytest.mark.slow
def test_cached_decoding_equals_the_full_forward_pass():
  cfg = dataclasses.replace(CFG, sections=Sections({'bitnet': BitNet(rounding='stochastic')}))
  model, batch = make_model(cfg), Batch(**features(0, 2)).replace(segment_ids=None)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), batch)['params'])
  full = jax.jit(partial(model.apply))({'params': params}, batch)
  logits, cache = model.apply({'params': params}, batch.tokens[:, :5], np.array([5, 3]), model.init_cache(2, 16),
                              method='prefill')
  for i in range(4):
    np.testing.assert_allclose(logits, full[np.arange(2), np.array([5, 3]) + i - 1], atol=1e-3)
    logits, cache = model.apply({'params': params}, batch.tokens[np.arange(2), np.array([5, 3]) + i], cache,
                                method='decode')


@pytest.mark.parametrize(('values', 'word'), [
    ({'activation_bits': 9}, 'activation_bits'), ({'sparsity_target': 1.0}, 'sparsity_target'),
    ({'sparsity_target': 0.5, 'weight_bits': '1'}, 'no zero'), ({'gradient_scale': 0.0}, 'gradient_scale')])
def test_invalid_settings_are_reported(values, word):
  with pytest.raises(ValueError, match=word):
    BitNet(**values)
  with pytest.raises(ValueError, match='no effect'):
    DecoderConfig(sections=Sections({'bitnet': BitNet(penalty=1.0)}))
  with pytest.raises(ValueError, match='known: full, bitnet'):
    DecoderConfig(einsum='ternary')
