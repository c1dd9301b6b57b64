"""Sampling follows its distribution; cached generation equals the full forward pass."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.base.batch import Batch
from llm_jax.infer import sampling
from llm_jax.infer.sampling import beam_search, generate, sample
from llm_jax.models.decoder import Decoder
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.protocol import ModelConfig, as_language_model
from llm_jax.training.state import init_state

NUM_DRAWS = 20000
LOGITS = np.random.default_rng(0).normal(size=12).astype(np.float32) * 1.5


@functools.partial(jax.jit, static_argnames=('temperature', 'top_k', 'top_p'))
def compiled_sample(logits_BV, seed, **options):
  return sample(logits_BV, jax.random.key(seed), **options)


def draws(logits, seed=0, **options):
  rows = np.broadcast_to(logits, (NUM_DRAWS, len(LOGITS)))
  return np.asarray(compiled_sample(rows, seed, **options))


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def reference(logits, temperature=1.0, top_k=0, top_p=1.0):
  """The distribution that should be drawn from, by the plain definition."""
  probs = softmax(np.asarray(logits, np.float64) / temperature)
  order = np.argsort(-probs)
  kept = order[:top_k] if top_k else order
  probs[np.setdiff1d(order, kept)] = 0
  probs /= probs.sum()
  smallest = next(n for n in range(1, len(kept) + 1) if probs[order[:n]].sum() >= top_p - 1e-9)
  probs[order[smallest:]] = 0
  return probs / probs.sum()


@pytest.mark.parametrize('options', [
    {}, {'temperature': 0.5}, {'temperature': 3.0}, {'top_k': 1}, {'top_k': 4}, {'top_k': 12}, {'top_k': 100},
    {'top_p': 0.1}, {'top_p': 0.5}, {'top_p': 0.9}, {'top_p': 0.999}, {'top_p': 1e-9}, {'top_k': 5, 'top_p': 0.8},
    {'temperature': 2.0, 'top_k': 6, 'top_p': 0.7}], ids=str)
def test_samples_follow_the_renormalized_softmax(options):
  expected = reference(LOGITS, **options)
  counts = np.bincount(draws(LOGITS, **options), minlength=len(LOGITS))
  assert not counts[expected == 0].any()
  allowed = expected > 0
  chi_square = np.sum((counts - NUM_DRAWS * expected)[allowed] ** 2 / (NUM_DRAWS * expected[allowed]))
  assert chi_square < 4 * len(LOGITS)  # its mean is the number of allowed tokens less 1


def test_top_p_keeps_the_smallest_sufficient_set():
  logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625, *[1e-9] * 7], np.float32))
  for top_p, allowed in ((0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (0.9, {0, 1, 2, 3})):
    assert set(draws(logits, top_p=top_p).tolist()) == allowed  # of the last two, which are equal, the first


@pytest.mark.parametrize('top_k', [1, 3])
def test_top_k_keeps_k_of_equal_logits(top_k):
  assert set(draws(np.zeros(12, np.float32), top_k=top_k).tolist()) == set(range(top_k))


# Rows with many equal logits, zeros of both signs, and neighbours that a temperature makes equal.
ODD = [0.0, -0.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), 1.0, -3.5, 2.25]
odd_rows = st.lists(st.sampled_from(ODD), min_size=12, max_size=12).map(lambda x: np.array(x, np.float32))
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def allowed_by(row, top_k, top_p, temperature):
  """The ids that may be drawn, by the plain definition: sorted by logit, then by id."""
  order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k or None]
  probs = softmax(row[order].astype(np.float64) / temperature)
  return {i for i, before in zip(order, np.cumsum(probs) - probs, strict=True) if before < top_p + 1e-6}


@functools.partial(jax.jit, static_argnames='top_k')
def odd_sample(rows, top_k, top_p, temperature):
  return sample(rows, jax.random.key(0), top_k=top_k, top_p=top_p, temperature=temperature)


@property_test
@given(odd_rows, st.sampled_from([0, 1, 3, 12, 100]), st.sampled_from([None, 1e-6, 0.2, 0.5, 0.9, 0.999]),
       st.sampled_from([0.3, 1.0, 7.0]))
def test_no_token_beyond_the_cut_is_drawn_whatever_is_equal(row, top_k, top_p, temperature):
  tokens = set(np.asarray(odd_sample(np.broadcast_to(row, (400, 12)), top_k, top_p, temperature)).tolist())
  allowed = allowed_by(row, top_k, top_p or 2.0, temperature)
  assert tokens <= allowed and len(allowed) <= (top_k or 12)
  if top_k == 1 or top_p == 1e-6:
    assert tokens == {int(np.argmax(row))}


def test_top_k_without_top_p_leaves_out_none_of_the_k():
  row = np.full(12, -20, np.float32)
  row[:2] = 0  # the first two have all of the probability that float32 can add up
  noise = jax.random.gumbel(jax.random.key(0), (4, 12))
  expected = np.asarray(jnp.argmax(row[None] * 1e-6 + noise, axis=-1))
  found = sample(jnp.broadcast_to(row, (4, 12)), jax.random.key(0), temperature=1e6, top_k=12)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('scale', [0.01, 1.0, 8.0])
def test_top_p_of_a_large_vocabulary_is_that_of_all_its_tokens(scale, monkeypatch):
  """Whether the head suffices changes neither what may be drawn nor what is drawn."""
  logits = (scale * np.random.default_rng(0).normal(size=(64, 3000))).astype(np.float32)
  options = {'top_p': 0.6, 'temperature': 1.0}
  found = sample(logits, jax.random.key(3), **options)
  for row, token in zip(logits, np.asarray(found), strict=True):
    assert int(token) in allowed_by(row, 0, 0.6, 1.0)
  suffices = np.array([np.sort(softmax(row.astype(np.float64)))[-1024:].sum() > 0.61 for row in logits])
  assert suffices.all() == (scale > 0.1) and suffices.any() == (scale > 0.1)
  flat = np.zeros((1, 3000), np.float32)  # needs more than the head, and so sorts all rows
  together = sample(np.concatenate([logits, flat]), jax.random.key(3), **options)
  alone = sample(np.concatenate([logits, logits[:1]]), jax.random.key(3), **options)
  np.testing.assert_array_equal(together[:64], alone[:64])


def test_temperature_0_is_argmax():
  logits = np.random.default_rng(1).normal(size=(64, 50)).astype(np.float32)
  for seed in range(3):
    tokens = compiled_sample(logits, seed, temperature=None, top_k=3, top_p=0.5)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_each_row_is_sampled_from_its_own_logits():
  expected = np.random.default_rng(2).integers(0, len(LOGITS), NUM_DRAWS)
  logits = np.where(np.arange(len(LOGITS)) == expected[:, None], 0, -40).astype(np.float32)
  for options in ({}, {'top_k': 2}, {'top_p': 0.5}):
    np.testing.assert_array_equal(draws(logits, **options), expected)


def test_the_same_seed_gives_the_same_tokens():
  np.testing.assert_array_equal(draws(LOGITS, seed=5), draws(LOGITS, seed=5))
  assert (draws(LOGITS, seed=5) != draws(LOGITS, seed=6)).any()


def test_bfloat16_logits_follow_the_same_distribution():
  logits = jnp.asarray(LOGITS, jnp.bfloat16)
  counts = np.bincount(draws(logits, top_p=0.9), minlength=len(LOGITS))
  expected = reference(np.asarray(logits, np.float64), top_p=0.9)
  assert not counts[expected == 0].any()
  np.testing.assert_allclose(counts / NUM_DRAWS, expected, atol=0.02)


# Generation with a cache.

MAX_LEN = 24
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [3, 1, 4, 1, 5, 9, 2, 6]]


CONFIGS = {
    'gpt2': {'use_bias': True},
    'llama': {'num_kv_heads': 2, 'mlp': 'swiglu', 'norm': 'rms_norm', 'positions': 'rope', 'qk_norm': True,
              'windows': (0, 4)},
}


@functools.cache
def model_and_params(name):
  """A tiny decoder whose likeliest token changes from place to place: large weights, and a head of its own."""
  model = Decoder(DecoderConfig(vocab_size=61, max_len=MAX_LEN, num_layers=2, embed_dim=32, num_heads=4,
                                dtype='float32', tie_embeddings=False, **CONFIGS[name]))
  abstract = jax.eval_shape(functools.partial(init_state, model=model, tx=optax.identity()), jax.random.key(0),
                            full_batch([[0]])).params
  rng = np.random.default_rng(0)
  spread = {'w': 0.4, 'b': 0.1, 'scale': 0.1}

  def fill(path, x):
    kind = path[-1].key
    return ((kind == 'scale') + rng.normal(size=x.shape, scale=spread[kind])).astype(np.float32)

  return model, jax.tree_util.tree_map_with_path(fill, abstract)


def full_batch(rows):
  tokens = np.zeros((len(rows), MAX_LEN), np.int32)
  for padded, row in zip(tokens, rows, strict=True):
    padded[:len(row)] = row
  return Batch(tokens=tokens, targets=tokens, loss_mask=np.ones(tokens.shape, np.float32))


def run(name, prompts, num_tokens, **options):
  columns = list(generate(*model_and_params(name), prompts, max_len=MAX_LEN, num_tokens=num_tokens, **options))
  return np.stack(columns, axis=1) if columns else np.zeros((len(prompts), 0), np.int32)


@pytest.mark.parametrize('name', list(CONFIGS))
def test_greedy_generation_matches_the_full_forward_pass(name):
  model, params = model_and_params(name)
  forward = jax.jit(lambda batch: model.apply({'params': params}, batch))
  generated = run(name, PROMPTS, 12, temperature=0.0)
  rows = [list(prompt) for prompt in PROMPTS]
  for i in range(12):
    logits_BTV = np.asarray(forward(full_batch(rows)))
    for b, row in enumerate(rows):
      row.append(int(logits_BTV[b, len(row) - 1].argmax()))
      assert generated[b, i] == row[-1], (b, i)
  assert all(len(set(row.tolist())) > 3 for row in generated)  # else equal rows would prove little


@pytest.mark.parametrize('name', list(CONFIGS))
def test_a_cache_that_grows_changes_no_token(name, monkeypatch):
  expected = run(name, PROMPTS, 12, temperature=0.0)
  monkeypatch.setattr(sampling, 'FIRST_TOKENS', 1)
  sizes = []
  grow = sampling._grow
  monkeypatch.setattr(sampling, '_grow', lambda cache, **options: sizes.append(options['num_slots']) or grow(
      cache, **options))
  np.testing.assert_array_equal(run(name, PROMPTS, 12, temperature=0.0), expected)
  assert sizes and sizes[-1] <= MAX_LEN


def test_decoding_in_bfloat16_matches_the_full_forward_pass():
  """The layers and the readout are cast once, in `decode_variables`."""
  model, params = model_and_params('gpt2')
  model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, dtype='bfloat16'))
  variables, tokens = model.decode_variables(params), np.array([[3, 1, 4, 1, 5, 9]])
  casts = {x.dtype for x in jax.tree.leaves(variables['copies'])}
  assert casts == {jnp.dtype('bfloat16')}
  full = jax.jit(lambda batch: model.apply({'params': params}, batch))(full_batch(tokens.tolist()))[0, :6]
  decode = jax.jit(functools.partial(model.apply, variables, method='decode'))
  logits, cache = jax.jit(functools.partial(model.apply, variables, method='prefill'))(
      tokens[:, :3], np.array([3]), model.init_cache(1, 8))
  found = [logits]
  for token in tokens[0, 3:]:
    logits, cache = decode(np.array([token]), cache)
    found.append(logits)
  np.testing.assert_allclose(np.concatenate(found), full[2:], atol=0.02 * np.abs(full).max())


@pytest.mark.parametrize(('num_rows', 'kv_heads'), [
    (2, 4), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_bfloat16_generates_and_searches(num_rows, kv_heads):
  model, params = model_and_params('gpt2')
  cfg = dataclasses.replace(model.cfg, dtype='bfloat16', num_heads=4, num_kv_heads=kv_heads)
  model, batch = Decoder(cfg), full_batch([[1]])
  params = jax.jit(lambda key: init_state(key, batch, model=model, tx=optax.identity()).params)(jax.random.key(0))
  prompts = PROMPTS[:num_rows]
  greedy = np.stack(list(generate(model, params, prompts, max_len=MAX_LEN, num_tokens=4, temperature=0.0)), axis=1)
  found = beam_search(model, params, prompts, max_len=MAX_LEN, num_tokens=4, eos_id=cfg.vocab_size - 1, num_beams=1)
  np.testing.assert_array_equal(greedy, found)


class Positions(nn.Module):
  """Has a parameter for each position of a row, so it needs rows of one length; it has no cache."""

  @nn.compact
  def __call__(self, tokens):
    table = self.param('table', nn.initializers.normal(1.0), (tokens.shape[1], 12))
    return nn.Embed(12, 12)(tokens) + table[None]


def test_a_module_without_a_cache_gets_rows_of_the_whole_length(monkeypatch):
  monkeypatch.setattr(sampling, 'FIRST_TOKENS', 1)
  model = as_language_model(Positions(), ModelConfig(max_len=MAX_LEN, vocab_size=12))
  params = model.init(jax.random.key(0), full_batch([[1]]))['params']
  forward = jax.jit(lambda batch: model.apply({'params': params}, batch))
  rows = [list(prompt) for prompt in PROMPTS]
  for column in generate(model, params, PROMPTS, max_len=MAX_LEN, num_tokens=6, temperature=0.0):
    logits = forward(full_batch(rows))
    assert column.tolist() == [int(logits[b, len(row) - 1].argmax()) for b, row in enumerate(rows)]
    rows = [[*row, int(token)] for row, token in zip(rows, column, strict=True)]


class Recent(nn.Module):
  """A language model of a user's own, with a cache of its own form: the last tokens of a row, no `length_B`."""

  cfg: ModelConfig
  reads = frozenset({'tokens', 'targets', 'loss_mask'})
  needs = frozenset()
  prompt_in_row = True

  def setup(self):
    self.embed = nn.Embed(12, 12)

  def __call__(self, batch, *, train=False):
    return self.embed(batch.tokens)

  readout = __call__

  def init_cache(self, batch_size, max_len):
    return {'ring': jnp.zeros((batch_size, max_len // 2), jnp.int32)}

  def prefill(self, tokens_BT, lengths_B, cache):
    last = jnp.take_along_axis(tokens_BT, lengths_B[:, None] - 1, axis=1)
    return self.embed(last)[:, 0], {'ring': jnp.roll(cache['ring'], -1, 1).at[:, -1:].set(last)}

  def decode(self, tokens_B, cache):
    return self.embed(tokens_B), {'ring': jnp.roll(cache['ring'], -1, 1).at[:, -1].set(tokens_B)}


def test_a_users_cache_of_another_form_is_never_resized(monkeypatch):
  monkeypatch.setattr(sampling, 'FIRST_TOKENS', 1)
  model = Recent(ModelConfig(max_len=MAX_LEN, vocab_size=12))
  params = model.init(jax.random.key(0), full_batch([[1]]))['params']
  assert len(list(generate(model, params, PROMPTS, max_len=MAX_LEN, num_tokens=12))) == 12


def test_sampled_generation_follows_its_seed():
  # So hot that all tokens are alike: what is drawn is the key's doing.
  first, same, other = (run('gpt2', [PROMPTS[1]] * 4, 10, seed=seed, temperature=1e6) for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, same)
  assert (first != other).any()
  assert len({tuple(row) for row in first.tolist()}) == 4  # one prompt goes four ways
  assert len({tuple(column) for column in first.T.tolist()}) == 10  # and each token has a key of its own


def test_other_temperatures_and_top_p_use_the_compiled_programs():
  run('gpt2', PROMPTS, 3, temperature=0.5, top_p=0.9)
  sizes = [program._cache_size() for program in (sampling._prefill, sampling._decode)]
  tokens = [run('gpt2', PROMPTS, 3, temperature=t, top_p=p) for t, p in ((0.6, 0.8), (50.0, 0.99))]
  assert [program._cache_size() for program in (sampling._prefill, sampling._decode)] == sizes
  assert (tokens[0] != tokens[1]).any()


def test_generation_stops_at_max_len():
  longest = max(map(len, PROMPTS))
  greedy = run('gpt2', PROMPTS, 1000, temperature=0.0)
  assert greedy.shape == (4, MAX_LEN - longest)
  np.testing.assert_array_equal(run('gpt2', PROMPTS, 3, temperature=0.0), greedy[:, :3])
  # A prompt that fills it gives nothing; one token less gives one.
  full = [[*PROMPTS[3], *greedy[3].tolist()]] * 4
  assert run('gpt2', full, 5, temperature=0.0).shape == (4, 0)
  last = run('gpt2', [row[:-1] for row in full], 5, temperature=0.0)
  assert last.tolist() == [[full[0][-1]]] * 4
