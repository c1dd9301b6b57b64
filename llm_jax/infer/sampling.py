"""Sampling and beam search with a cache, on token ids."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.batch import Params
from llm_jax.base.sharding import constrain, weights_in_shards
from llm_jax.models.protocol import LanguageModel


def sample(logits_BV: jax.Array, key: jax.Array, *, temperature: jax.Array | float | None = 1.0, top_k: int = 0,
           top_p: jax.Array | float | None = None, num_ids: int | None = None) -> jax.Array:
  """Samples one token per row, int32 [B]. top_p: nucleus (arXiv 1904.09751); top_k 0 and top_p None: all tokens.

  temperature None or 0: argmax. Only the first `num_ids` ids are sampled, as the model's vocabulary may be padded. Of
  equal logits the lower id counts as the more likely one, as in argmax: top_k lets at most k tokens through, top_p the
  fewest that reach it. top_p applies to the probabilities of what top_k leaves.
  """
  logits_BV = constrain(logits_BV[:, :num_ids], None, None)  # all processes get all tokens
  if temperature is None or (isinstance(temperature, int | float) and not temperature):
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV.astype(jnp.float32)
  if not top_k and top_p is None:
    return jax.random.categorical(key, logits_BV / temperature, axis=-1).astype(jnp.int32)
  logits_BV = jnp.where(logits_BV == 0, 0.0, logits_BV)  # lax.top_k ranks -0.0 below 0.0, argmax does not
  V = logits_BV.shape[-1]
  logits_BK, ids_BK = jax.lax.top_k(logits_BV, K := min(top_k or HEAD, V))  # in descending order, equal ones by id
  logits_BK /= temperature  # afterwards, as it can make different logits equal
  noise_BK = jax.random.gumbel(key, logits_BK.shape)
  if top_p is None:
    return draw(logits_BK, ids_BK, noise_BK)
  if top_k or K == V:
    return draw(jnp.where(nucleus(jax.nn.softmax(logits_BK), top_p), logits_BK, -jnp.inf), ids_BK, noise_BK)
  log_z_B1 = jax.nn.logsumexp(logits_BV / temperature, axis=-1, keepdims=True)

  def of_head() -> jax.Array:
    kept_BK = nucleus(jnp.exp(logits_BK - log_z_B1), top_p)
    return draw(jnp.where(kept_BK, logits_BK, -jnp.inf), ids_BK, noise_BK)

  def of_all() -> jax.Array:
    sorted_BV, ids_BV = jax.lax.top_k(logits_BV, V)
    sorted_BV /= temperature
    noise_BV = jnp.concatenate([noise_BK, jax.random.gumbel(jax.random.fold_in(key, 1), (len(ids_BV), V - K))], axis=1)
    return draw(jnp.where(nucleus(jnp.exp(sorted_BV - log_z_B1), top_p), sorted_BV, -jnp.inf), ids_BV, noise_BV)

  suffices = jnp.all(jnp.sum(jnp.exp(logits_BK - log_z_B1), axis=-1) >= top_p)
  return jax.lax.cond(suffices, of_head, of_all)


HEAD = 1024  # top_p looks at so many tokens first: sorting 50,000 takes a CPU 29 ms a row, finding these 0.6 ms


def nucleus(probs_BK: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """bool [B, K]: the shortest prefix of the probabilities, which descend, that sums to top_p; at least the first."""
  before_BK = jnp.pad(jnp.cumsum(probs_BK, axis=-1)[:, :-1], ((0, 0), (1, 0)))
  return jax.lax.cummax(before_BK, axis=1) < top_p  # the sums of parallel additions need not ascend


def draw(logits_BK: jax.Array, ids_BK: jax.Array, noise_BK: jax.Array) -> jax.Array:
  """One of the ids per row, int32 [B], by the Gumbel-max trick."""
  choice_B1 = jnp.argmax(logits_BK + noise_BK, axis=-1, keepdims=True)
  return jnp.take_along_axis(ids_BK, choice_B1, axis=-1)[:, 0].astype(jnp.int32)


@partial(jax.jit, static_argnums=0)
def decode_variables(model: LanguageModel, params: Params) -> Any:
  """The variables for `generate` and `beam_search`, which they make for each call if they are not given."""
  own = getattr(model, 'decode_variables', None)
  return {'params': params} if own is None else own(params)


@partial(jax.jit, static_argnames=('model', 'num_slots', 'top_k', 'num_ids'))
def _prefill(variables, tokens_BT, lengths_B, key, *, model, num_slots, **options):
  cache = model.init_cache(tokens_BT.shape[0], num_slots)
  logits_BV, cache = model.apply(variables, tokens_BT, lengths_B, cache, method='prefill')
  return sample(logits_BV, key, **options), cache


@partial(jax.jit, static_argnames=('model', 'top_k', 'num_ids'), donate_argnames='cache')
def _decode(variables, tokens_B, cache, key, *, model, **options):
  with weights_in_shards():
    logits_BV, cache = model.apply(variables, tokens_B, cache, method='decode')
  return sample(logits_BV, key, **options), cache


@partial(jax.jit, static_argnames=('model', 'num_slots'))
def _grow(cache, *, model, num_slots):
  larger = model.init_cache(jax.tree.leaves(cache)[0].shape[0], num_slots)
  return jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim), larger, cache)


def generate(model: LanguageModel, params: Params, prompts: list[list[int]], *, max_len: int, num_tokens: int,
             seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             num_ids: int | None = None, variables: Any = None) -> Iterator[np.ndarray]:
  """Yields int32 [B], the next token of each prompt, `num_tokens` times or until a row has `max_len` tokens.

  Prompts must not be empty. The computation of token i+1 starts before token i is yielded.
  """
  tokens_BT, lengths_B = pad(model, prompts, max_len)
  # One program serves all temperatures above 0, and with them all top_p below 1; temperature 0 ignores top_k and top_p.
  options = {'temperature': temperature or None, 'top_k': top_k if temperature else 0,
             'top_p': top_p if temperature and top_p < 1 else None, 'num_ids': num_ids}
  num_tokens = min(num_tokens, room(model, lengths_B, max_len))
  keys = jax.random.split(jax.random.key(seed), max(num_tokens, 1))
  variables, filled = variables or decode_variables(model, params), slots_filled(model, lengths_B)
  num_slots = slots_for(model, filled + min(num_tokens, FIRST_TOKENS), tokens_BT.shape[1], max_len)
  tokens_B, cache = _prefill(variables, tokens_BT, lengths_B, keys[0], model=model, num_slots=num_slots, **options)
  for i in range(1, num_tokens + 1):
    current = tokens_B
    if i < num_tokens:
      if filled + i > num_slots:
        num_slots = slots_for(model, filled + i, num_slots, max_len)
        cache = _grow(cache, model=model, num_slots=num_slots)
      tokens_B, cache = _decode(variables, tokens_B, cache, keys[i], model=model, **options)
    yield np.asarray(current)


FIRST_TOKENS = 256  # the cache has room for that many generated tokens at first; its size is doubled when it is full


def slots_filled(model: LanguageModel, lengths_B: np.ndarray) -> int:
  """The number of slots that the longest prompt fills; where an encoder reads it, its start token fills one."""
  return int(lengths_B.max()) if model.prompt_in_row else 1


def slots_for(model: LanguageModel, length: int, least: int, max_len: int) -> int:
  """The number of slots of a cache for `length` tokens: a power of two, to compile few sizes, but at most max_len.

  It is max_len for models whose cache cannot grow.
  """
  if not getattr(model, 'cache_grows', False):
    return max_len
  return min(max_len, max(least if model.prompt_in_row else 1, 1 << (length - 1).bit_length()))


def pad(model: LanguageModel, prompts: list[list[int]], max_len: int) -> tuple[np.ndarray, np.ndarray]:
  """Padded prompts int32 [B, T] and their lengths [B]; T is a power of two if that fits, to compile few lengths."""
  lengths = [len(p) for p in prompts]
  tokens_BT = np.zeros((len(prompts), min(max_len if model.prompt_in_row else model.cfg.longest_prompt,
                                          1 << (max(lengths) - 1).bit_length())), np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[:len(prompt)] = prompt
  return tokens_BT, np.asarray(lengths, np.int32)


def room(model: LanguageModel, lengths_B: np.ndarray, max_len: int) -> int:
  """The number of tokens that can be generated for all of the prompts."""
  return max_len - int(lengths_B.max()) * model.prompt_in_row


def beam_search(model: LanguageModel, params: Params, prompts: list[list[int]], *, max_len: int, num_tokens: int,
                eos_id: int, num_beams: int = 4, alpha: float = 0.6, num_ids: int | None = None,
                variables: Any = None) -> np.ndarray:
  """The best of `num_beams` hypotheses per row, int32 [B, up to num_tokens], padded with eos_id after the end.

  The score is log p / ((5 + length) / 6)^alpha (Wu et al., arXiv 1609.08144, equation 14). One beam is greedy decoding.
  """
  tokens_BT, lengths_B = pad(model, prompts, max_len)
  num_tokens = min(num_tokens, room(model, lengths_B, max_len))
  num_slots = slots_for(model, slots_filled(model, lengths_B) + num_tokens, tokens_BT.shape[1], max_len)
  return np.asarray(_beam_search(variables or decode_variables(model, params), tokens_BT, lengths_B, model=model,
                                 num_slots=num_slots, num_tokens=num_tokens, eos_id=eos_id, num_beams=num_beams,
                                 alpha=alpha, num_ids=num_ids))


@partial(jax.jit, static_argnames=('model', 'num_slots', 'num_tokens', 'eos_id', 'num_beams', 'alpha', 'num_ids'))
def _beam_search(variables, tokens_BT, lengths_B, *, model, num_slots, num_tokens, eos_id, num_beams, alpha, num_ids):
  B, W = tokens_BT.shape[0], num_beams

  def log_p(logits_RV):
    return jax.nn.log_softmax(constrain(logits_RV[:, :num_ids], None, None).astype(jnp.float32))

  logits_BV, cache = model.apply(variables, tokens_BT, lengths_B, model.init_cache(B, num_slots), method='prefill')
  V = log_p(logits_BV).shape[1]
  only_eos_V = jnp.where(jnp.arange(V) == eos_id, 0.0, -jnp.inf)  # the continuation of a finished hypothesis

  def extend(logits_BWV, scores_BW, ended_BW, hyps_BWT, t):
    """The best W of all continuations, with the indices of the hypotheses that they continue."""
    next_BWV = jnp.where(ended_BW[..., None], only_eos_V, log_p(logits_BWV.reshape(B * W, -1)).reshape(B, W, V))
    scores_BW, flat_BW = jax.lax.top_k((scores_BW[..., None] + next_BWV).reshape(B, W * V), W)
    parents_BW, token_BW = flat_BW // V, flat_BW % V
    hyps_BWT = jnp.take_along_axis(hyps_BWT, parents_BW[..., None], axis=1).at[..., t].set(token_BW)
    return scores_BW, token_BW == eos_id, hyps_BWT, parents_BW

  def body(carry):
    t, scores_BW, ended_BW, hyps_BWT, cache = carry
    with weights_in_shards():
      logits_RV, cache = model.apply(variables, hyps_BWT[..., t - 1].reshape(-1), cache, method='decode')
    scores_BW, ended_BW, hyps_BWT, parents_BW = extend(logits_RV.reshape(B, W, -1), scores_BW, ended_BW, hyps_BWT, t)
    parents_R = (parents_BW + W * jnp.arange(B)[:, None]).reshape(-1)
    return t + 1, scores_BW, ended_BW, hyps_BWT, jax.tree.map(lambda x: x[parents_R], cache)

  # All hypotheses of a row are equal at first, so only one of them may be continued.
  scores_BW = jnp.tile(jnp.where(jnp.arange(W) == 0, 0.0, -jnp.inf), (B, 1))
  hyps_BWT = jnp.full((B, W, num_tokens), eos_id, jnp.int32)
  scores_BW, ended_BW, hyps_BWT, _ = extend(jnp.repeat(logits_BV[:, None], W, 1), scores_BW, jnp.zeros((B, W), bool),
                                            hyps_BWT, 0)
  cache = jax.tree.map(lambda x: jnp.repeat(x, W, axis=0), cache)
  _, scores_BW, _, hyps_BWT, _ = jax.lax.while_loop(
      lambda carry: (carry[0] < num_tokens) & ~carry[2].all(), body,
      (jnp.int32(1), scores_BW, ended_BW, hyps_BWT, cache))
  length_BW = jnp.minimum((hyps_BWT != eos_id).sum(-1) + 1, num_tokens)  # including eos
  best_B = jnp.argmax(scores_BW / ((5 + length_BW) / 6) ** alpha, axis=1)
  best_BT = jnp.take_along_axis(hyps_BWT, best_B[:, None, None], axis=1)[:, 0]
  return constrain(best_BT, None, None)  # all processes get all tokens
