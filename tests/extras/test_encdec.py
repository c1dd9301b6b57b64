"""The encoder-decoder: dependencies, cache, FLOPs, equal losses on any mesh, and beam search."""

import dataclasses
import functools
import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import train_on

from llm_jax.base.batch import Batch
from llm_jax.base.builder import build
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.extras.encdec import EncDecConfig
from llm_jax.infer import sampling
from llm_jax.infer.sampling import _beam_search, beam_search, generate, pad
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import OptimConfig, make_optimizer
from llm_jax.training.state import init_state

TINY = EncDecConfig(vocab_size=17, max_len=12, encoder_len=8, num_layers=2, num_encoder_layers=1, embed_dim=16,
                    num_heads=4, dtype='float32', start_id=1)
SHAPES = {
    'vaswani': dataclasses.replace(TINY, use_bias=True, mlp='gelu'),
    't5': dataclasses.replace(TINY, positions='rope', norm='rms_norm', mlp='geglu', num_kv_heads=2, qk_norm=True,
                              tie_embeddings=False),
    'two_vocabularies': dataclasses.replace(TINY, encoder_vocab_size=23, windows=(4, 0)),
}
OPTIM = build(OptimConfig, {'learning_rate': 1e-2})
every_shape = pytest.mark.parametrize('cfg', [
    pytest.param(cfg, id=name, marks=[pytest.mark.slow] * (name != 't5')) for name, cfg in SHAPES.items()])
RNG = np.random.default_rng(0)
TOKENS, READ = RNG.integers(0, 17, (2, 12)), RNG.integers(0, 17, (2, 8))


def batch(tokens=TOKENS, read=READ, lengths=(8, 8)):
  tokens, read = np.asarray(tokens, np.int32), np.asarray(read, np.int32)
  return Batch(tokens=tokens, targets=tokens, loss_mask=np.ones(tokens.shape, np.float32), encoder_tokens=read,
               segment_ids=np.ones_like(tokens),
               encoder_segment_ids=(np.arange(read.shape[1])[None] < np.asarray(lengths)[:, None]).astype(np.int32))


@functools.lru_cache
def init(cfg):
  """The model with random parameters, away from the init's symmetry."""
  model, rng = make_model(cfg), np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), batch())['params'])
  return model, jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


@every_shape
def test_logits_depend_on_the_encoder_and_earlier_tokens(cfg):
  """By gradients with respect to both sides' embeddings; padding of the encoder's input has none."""
  model, params = init(cfg)
  example = batch(lengths=(5, 8))
  table = 'encoder_embed' if cfg.encoder_vocab_size else 'embed'
  x_BSD, x_BTD = params[table]['w'][example.encoder_tokens], params['embed']['w'][example.tokens]

  def logits(read, own):
    def swap(next_fn, args, kwargs, context):
      if context.method_name != 'encode' or 'embed' not in (context.module.name or ''):
        return next_fn(*args, **kwargs)
      return read if args[0].shape == example.encoder_tokens.shape else own
    with nn.intercept_methods(swap):
      return model.apply({'params': params}, example)[0, :, :3].sum(-1)

  read, own = jax.jit(jax.jacrev(logits, argnums=(0, 1)))(x_BSD, x_BTD)  # [T, B, S or T, D]
  np.testing.assert_array_equal(np.abs(own[:, 0]).sum(-1) > 0, np.tril(np.ones((12, 12), bool)))
  np.testing.assert_array_equal(np.abs(read[:, 0]).sum(-1) > 0, np.arange(8)[None] < np.full((12, 1), 5))


@every_shape
def test_cached_decoding_equals_the_full_forward_pass(cfg):
  """Prompts of two lengths, padded to less than encoder_len, then token by token."""
  model, params = init(cfg)
  tokens = np.concatenate([np.full((2, 1), cfg.start_id), TOKENS[:, 1:]], axis=1)
  full = np.asarray(forward(model)(params, batch(tokens, lengths=(3, 6))))
  prefill = jax.jit(lambda t, n, c: model.apply({'params': params}, t, n, c, method='prefill'))
  logits, cache = prefill(READ[:, :6], np.array([3, 6]), model.init_cache(2, 12))
  decode = jax.jit(lambda t, c: model.apply({'params': params}, t, c, method='decode'))
  for t in range(12):
    np.testing.assert_allclose(logits, full[:, t], rtol=2e-4, atol=2e-4)
    logits, cache = decode(tokens[:, min(t + 1, 11)], cache)


@pytest.mark.parametrize('cfg', [
    pytest.param(SHAPES['vaswani'], id='vaswani', marks=pytest.mark.slow), pytest.param(SHAPES['t5'], id='t5')])
def test_flops_agree_with_xla(cfg):
  cfg = dataclasses.replace(cfg, max_len=256, encoder_len=128, embed_dim=256, mlp_dim=1024, vocab_size=1024,
                            attention='xla', scan_unroll=2)
  model, example = make_model(cfg), batch(np.zeros((1, 256)), np.zeros((1, 128)), (128,))
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example)['params'])
  gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply({'params': params}, example) ** 2)))
  hidden = 6 * cfg.num_layers * cfg.num_heads * cfg.H * 256  # the masked half of self-attention, which we do not count
  ours = (cfg.flops_per_token(256) + hidden) * 256
  assert gradient.lower(params).cost_analysis()['flops'] == pytest.approx(ours, rel=0.05)


@functools.lru_cache
def first_state(cfg):
  tx = make_optimizer(OPTIM, 20)
  example = Batch(*np.zeros((3, 1, 8), np.int32), encoder_tokens=np.zeros((1, 8), np.int32))
  return jax.device_get(jax.jit(partial(init_state, model=make_model(cfg), tx=tx))(jax.random.key(0), example))


def train(sizes, num_microbatches, num_steps=5):
  """Losses and parameters of a run that learns to copy its input, on a mesh of virtual devices."""
  cfg = dataclasses.replace(SHAPES['t5'], vocab_size=16, max_len=8, num_encoder_layers=2)

  def features(n):
    read = np.random.default_rng(n).integers(2, 16, (8, 8)).astype(np.int32)
    mask = (np.arange(8)[None] < np.random.default_rng(n).integers(3, 9, (8, 1)))
    return {'tokens': np.roll(read, 1, 1), 'targets': read, 'loss_mask': mask.astype(np.float32),
            'segment_ids': mask.astype(np.int32), 'encoder_tokens': read, 'encoder_segment_ids': mask.astype(np.int32)}

  history, state, _ = train_on(sizes, make_model(cfg), make_optimizer(OPTIM, 20), features, num_steps=num_steps,
                               state=first_state(cfg), num_microbatches=num_microbatches)
  return np.array([metrics['loss'] for metrics in history]), jax.device_get(state.params)


@pytest.mark.slow
def test_losses_do_not_depend_on_mesh_or_microbatches():
  losses, params = train((1, 1, 1), 1)
  assert losses[-1] < losses[0]
  # With stages and split rows too, for encoder and decoder.
  for sizes in ((2, 2, 2), (2, 1, 2, 2), {'fsdp': 2, 'context': 4}):
    others, other_params = train(sizes, 2)
    np.testing.assert_allclose(others, losses, atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), other_params, params)


def sequence_log_p(model, params, prompt, answer, num_ids):
  """log p of an answer's tokens, by the full forward pass."""
  tokens, read = np.zeros((1, 12), np.int64), np.zeros((1, 8), np.int64)
  tokens[0, :len(answer)] = [1, *answer[:-1]]
  read[0, :len(prompt)] = prompt
  logits = np.asarray(forward(model)(params, batch(tokens, read, (len(prompt),))))[0, :, :num_ids]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return sum(log_p[t, token] for t, token in enumerate(answer))


@functools.lru_cache
def forward(model):
  return jax.jit(lambda params, batch: model.apply({'params': params}, batch))


@pytest.mark.slow
def test_a_wide_beam_finds_the_best_answer():
  model, params = init(SHAPES['vaswani'])
  eos, num_ids, length = 2, 4, 3
  ended = [[*first, eos] for n in range(length) for first in itertools.product((0, 1, 3), repeat=n)]
  answers = ended + [list(a) for a in itertools.product((0, 1, 3), repeat=length)]
  for prompt in ([5, 6, 7], [3, 4, 9]):
    score = {tuple(a): sequence_log_p(model, params, prompt, a, num_ids) / ((5 + len(a)) / 6) ** 0.6 for a in answers}
    best = max(score, key=score.get)
    [found] = beam_search(model, params, [prompt], max_len=12, num_tokens=length, eos_id=eos, num_beams=32,
                          num_ids=num_ids)
    assert tuple(found) == best + (eos,) * (length - len(best))


@pytest.mark.slow
def test_a_cache_that_grows_changes_no_answer(monkeypatch):
  """The start token fills the first slot of the decoder's cache."""
  model, params = init(SHAPES['t5'])
  prompts, options = [[3, 4, 8], [5, 6, 7, 2]], {'max_len': 12, 'num_tokens': 12, 'temperature': 0}
  whole = np.stack(list(generate(model, params, prompts, **options)), axis=1)
  monkeypatch.setattr(sampling, 'FIRST_TOKENS', 2)
  np.testing.assert_array_equal(np.stack(list(generate(model, params, prompts, **options)), axis=1), whole)
  rows = [sequence_log_p(model, params, prompt, row.tolist(), None) for prompt, row in zip(prompts, whole, strict=True)]
  worse = [sequence_log_p(model, params, prompt, [*row[:-1].tolist(), (row[-1] + 1) % 5], None)
           for prompt, row in zip(prompts, whole, strict=True)]
  assert all(a > b for a, b in zip(rows, worse, strict=True))  # the last token too is the likeliest


@pytest.mark.slow
def test_one_beam_is_greedy_and_rows_are_independent():
  model, params = init(SHAPES['t5'])
  prompts, options = [[3, 4, 8], [5, 6, 7, 2]], {'max_len': 12, 'num_tokens': 6}
  greedy = np.stack(list(generate(model, params, prompts, temperature=0, **options)), axis=1)
  np.testing.assert_array_equal(beam_search(model, params, prompts, eos_id=99, num_beams=1, **options), greedy)
  together = beam_search(model, params, prompts, eos_id=2, num_beams=3, **options)
  for prompt, row in zip(prompts, together, strict=True):
    np.testing.assert_array_equal(beam_search(model, params, [prompt], eos_id=2, num_beams=3, **options)[0], row)


@pytest.mark.slow
def test_beam_search_results_are_replicated_on_a_mesh():
  model, params = init(SHAPES['t5'])
  prompts, options = [[3, 4, 8], [5, 6, 7, 2]] * 4, {'max_len': 12, 'num_tokens': 6, 'eos_id': 2, 'num_beams': 3}
  with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
    found = {name: x for name, x in options.items() if name != 'max_len'}
    sharded = _beam_search({'params': params}, *pad(model, prompts, 12), model=model, alpha=0.6, num_ids=None,
                           num_slots=12, **found)
  assert sharded.is_fully_replicated
  np.testing.assert_array_equal(sharded, beam_search(model, params, prompts, **options))


@pytest.mark.parametrize(('values', 'word'), [
    ({'encoder_len': 0}, 'encoder_len'), ({'prefix_attention': True}, 'prefix_attention'),
    ({'num_heads': 3}, 'num_heads')])
def test_invalid_settings_are_reported(values, word):
  with pytest.raises(ValueError, match=word):
    dataclasses.replace(TINY, **values)
