"""Checks of the tokens that training would use: too few, unknown ids, white space alone, one kind alone."""

from __future__ import annotations

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.sources.documents import SourceConfig, shown
from llm_jax.data.sources.filters import Report
from llm_jax.data.stores.store import TokenStore
from llm_jax.data.stores.writer import beyond_vocabulary
from llm_jax.data.tokenizers.tokenizer import Tokenizer

_STEP = 1 << 20  # tokens checked at once
_BLOCKS, _BLOCK = 16, 1 << 13  # of tokens that are counted
ONE_KIND, AT_LEAST = 0.99, 200  # share of one token, and number of tokens, for a warning


def check_size(config: DataConfig, source: SourceConfig, split: str, store: TokenStore | None,
               report: dict | None) -> None:
  """Raises DataError for a split of fewer than two tokens."""
  num_tokens = len(store.tokens) if store is not None else 0
  if num_tokens < 2:
    counts = f'; {", ".join(map(str.strip, Report.from_dict(report).lines()))}' if report is not None else ''
    copies = '' if split == 'train' else '; all copies of a document are in one split'
    raise DataError(f'config.data.path: {shown(source.path)} gives {num_tokens} token(s) for {split}, which needs 2 or '
                    f'more (config.data.split {config.split}, val_fraction {config.val_fraction}{counts}{copies})')


def max_id(tokens: TokenStore) -> int:
  """The highest id. Raises DataError for an id below 0."""
  most = 0
  for begin in range(0, len(tokens.tokens), _STEP):
    part = tokens.tokens[begin:begin + _STEP]
    if part.dtype.kind == 'i' and part.min() < 0:
      raise DataError(f'{tokens.tokens.files[0].path}: holds the token id {part.min()}; ids must be 0 or '
                      f'more; is config.data.dtype {part.dtype} right?')
    most = max(most, int(part.max()))
  return most


def check_ids(store: TokenStore, tokenizer: Tokenizer) -> None:
  """Raises DataError for ids of a .bin, which were not checked before, beyond the vocabulary."""
  if (most := max_id(store)) >= len(tokenizer.token_bytes):
    raise DataError(f'{store.tokens.files[0].path}: {beyond_vocabulary(most, tokenizer)}')


def check_white_space(source: SourceConfig, name: str, split: str, store: TokenStore, tokenizer: Tokenizer,
                      encoder_tokenizer: Tokenizer | None) -> None:
  """Raises DataError for a training part that is white space alone, and warns of another such part."""
  blank, blank_prompt = (np.array([not b.strip() for b in t.token_bytes])
                         for t in (tokenizer, encoder_tokenizer or tokenizer))
  for begin in range(0, len(store.tokens), _STEP):
    ids = store.tokens[begin:begin + _STEP]
    is_prompt = np.zeros(len(ids), bool) if encoder_tokenizer is None else _in_prompts(store, begin, begin + len(ids))
    if not (blank[ids[~is_prompt]].all() and blank_prompt[ids[is_prompt]].all()):
      return
  if split == 'train':
    raise DataError(f'config.data.path: the training part of {shown(source.path)} holds nothing but white space')
  print(f'data: {name}: warning: the {split} part holds nothing but white space, so its loss says nothing; give more '
        f'text, or set config.data.{split}_path or {split}_fraction', flush=True)


def _in_prompts(tokens: TokenStore, begin: int, end: int) -> np.ndarray:
  """bool [end - begin]: whether each token in [begin, end) belongs to a prompt; bos does not."""
  assert tokens.answers is not None, '_tokenizers checks for pairs'
  positions = np.arange(begin, end)
  documents = np.searchsorted(tokens.starts, positions, 'right') - 1
  places = positions - tokens.starts[documents]
  return (places > 0) & (places < tokens.answers[documents])


def warn_of_one_kind(name: str, split: str, store: TokenStore, tokenizer: Tokenizer | None) -> None:
  """Prints a warning if nearly all tokens are the same."""
  num_tokens = len(store.tokens)
  begins = np.linspace(0, max(0, num_tokens - _BLOCK), _BLOCKS if num_tokens > _BLOCK else 1, dtype=np.int64)
  ids = np.concatenate([store.tokens[begin:begin + _BLOCK] for begin in begins.tolist()])
  values, counts = np.unique(ids, return_counts=True)
  most = int(counts.argmax())
  share, token = counts[most] / len(ids), int(values[most])
  if len(ids) < AT_LEAST or share < ONE_KIND:
    return
  if tokenizer is None:
    meant = 'if the ids were written with another width, set config.data.dtype'
  else:
    text = tokenizer.token_bytes[token].decode(errors='replace')
    meant = f'it is {text!r}' if text else 'it is a special or unknown token: is config.data.tokenizer for such text?'
  print(f'data: {name}: warning: {share:.1%} of the tokens for {split} are {token}; {meant}', flush=True)
