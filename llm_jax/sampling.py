"""Sampling from a model with a cache. Tokens in, tokens out; text is the caller's affair."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.sharding import constrain
from llm_jax.types import Params


def sample(logits_BV: jax.Array, key: jax.Array, *, temperature: float = 1.0, top_k: int = 0,
           top_p: float = 1.0, num_ids: int | None = None) -> jax.Array:
  """One token a row, int32 [B]. temperature 0: the likeliest. top_k 0: all. top_p: nucleus (arXiv 1904.09751).

  Only the first `num_ids` can be drawn: a vocabulary may be padded beyond its tokenizer's.
  """
  logits_BV = constrain(logits_BV[:, :num_ids], None, None)  # every process gets every token
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV.astype(jnp.float32) / temperature
  if top_k:
    least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p  # always keeps the first
    least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames=('model', 'max_len', 'temperature', 'top_k', 'top_p', 'num_ids'))
def _prefill(params, tokens_BT, lengths_B, key, *, model, max_len, **options):
  cache = model.init_cache(tokens_BT.shape[0], max_len)
  logits_BV, cache = model.apply({'params': params}, tokens_BT, lengths_B, cache, method='prefill')
  return sample(logits_BV, key, **options), cache


@partial(jax.jit, static_argnames=('model', 'temperature', 'top_k', 'top_p', 'num_ids'), donate_argnames='cache')
def _decode(params, tokens_B, cache, key, *, model, **options):
  logits_BV, cache = model.apply({'params': params}, tokens_B, cache, method='decode')
  return sample(logits_BV, key, **options), cache


def generate(model: nn.Module, params: Params, prompts: list[list[int]], *, max_len: int, num_tokens: int,
             seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             num_ids: int | None = None) -> Iterator[np.ndarray]:
  """Yields int32 [B]: the next token of every prompt, `num_tokens` times or until a row would pass `max_len`.

  Prompts need one token or more; the computation for token i+1 starts before token i is handed out.
  """
  lengths = [len(p) for p in prompts]
  # Prompts are padded to a power of two, so that few lengths are ever compiled.
  width = min(max_len, 1 << (max(lengths) - 1).bit_length())
  tokens_BT = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[:len(prompt)] = prompt
  options = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p, 'num_ids': num_ids}
  num_tokens = min(num_tokens, max_len - max(lengths))
  keys = jax.random.split(jax.random.key(seed), max(num_tokens, 1))
  tokens_B, cache = _prefill(params, tokens_BT, np.asarray(lengths, np.int32), keys[0],
                             model=model, max_len=max_len, **options)
  for i in range(1, num_tokens + 1):
    current = tokens_B
    if i < num_tokens:
      tokens_B, cache = _decode(params, tokens_B, cache, keys[i], model=model, **options)
    yield np.asarray(current)
