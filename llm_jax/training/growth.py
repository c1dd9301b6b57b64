"""Warm starts with a larger vocabulary: the new rows of embedding and head are the mean of the old ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.base.errors import ConfigError
from llm_jax.base.storage import read_start
from llm_jax.config import Config
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.open import Data
from llm_jax.data.tokenizers.tokenizer import Tokenizer
from llm_jax.infer.load import Loaded, tokenizers_of


def check_tokenizers(config: Config, data: Data, run: Loaded) -> None:
  """Raises ConfigError unless the other run has the same tokenizers, without the tokens that a chat template adds."""
  begins = [getattr(tokenizer, 'original', tokenizer) for tokenizer in (data.tokenizer, data.prompt_tokenizer)]
  names = ('tokenizer', 'encoder_tokenizer')
  for name, mine, begin, theirs in zip(names, tokenizers_of(data), begins, tokenizers_of(run), strict=True):
    if theirs != mine and (begin is None or theirs != begin.to_json()) and not extends(data.tokenizer, run.tokenizer):
      path = read_start(config.start.run) / f'{name}.json'
      raise ConfigError(f'config.start.run: {config.start.run} has another {name}; set '
                        f'--config.data.{name}={path if path.is_file() else "none"}')


def extends(mine: Tokenizer | None, theirs: Tokenizer | None) -> bool:
  """Whether a tokenizer with a chat template has the other's vocabulary and, after it, special tokens."""
  if not isinstance(mine, ChatTokenizer) or theirs is None:
    return False
  known = len(theirs.token_bytes)
  return mine.token_bytes[:known] == theirs.token_bytes and not any(mine.token_bytes[known:])


def grow(arrays: dict[str, jax.Array], like: dict[str, jax.Array], run: Loaded, model: Any,
         axes_of: Callable[[str], tuple]) -> list[str]:
  """Fits the arrays of `run` that have its vocabulary as a dimension to the vocabulary of `model`, a model's config.

  `axes_of` gives the logical axes of a parameter. Returns the names of those that got more tokens, and not only another
  padding.
  """
  old, new, grown = run.config.model.vocab_size, model.vocab_size, []
  rows = tuple(getattr(config, 'V', config.vocab_size) for config in (run.config.model, model))  # with padding
  known = old if new == old or run.tokenizer is None else min(old, len(run.tokenizer.token_bytes))
  for name in sorted(arrays.keys() & like.keys()):
    have, need = arrays[name].shape, like[name].shape
    named = [axis for axis, logical in enumerate(axes_of(name)) if logical == 'vocab']
    axes = named or [axis for axis, sizes in enumerate(zip(have, need, strict=False)) if sizes == rows]
    fits = len(have) == len(need) and len(axes) == 1 and (have[axes[0]], need[axes[0]]) == rows
    if fits and old <= new and (have != need or (named and new > old)):
      arrays[name] = _extended(arrays[name], axes[0], known, rows[1])
      grown.append(name)
  return grown if new > old else []


def _extended(array: jax.Array, axis: int, known: int, size: int) -> jax.Array:
  """The first `known` rows, and their mean as the others."""
  rows = jax.lax.slice_in_dim(array, 0, known, axis=axis)
  mean = jnp.mean(rows.astype(jnp.float32), axis=axis, keepdims=True).astype(array.dtype)
  return jnp.concatenate([rows, jnp.repeat(mean, size - known, axis=axis)], axis=axis)
