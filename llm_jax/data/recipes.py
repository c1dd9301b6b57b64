"""The recipe of a source's token store: what determines it, and its folder in the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.data.config import DataConfig, cache_dir
from llm_jax.data.loaders import LOADERS
from llm_jax.data.sources.corpus import Corpus, key_of, make_store
from llm_jax.data.sources.documents import SourceConfig, shown
from llm_jax.data.sources.filters import Report
from llm_jax.data.stores import store
from llm_jax.data.stores.cache import lease, prune
from llm_jax.data.stores.store import TokenStore
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, Tokenizer


@dataclasses.dataclass(frozen=True)
class StoreRecipe:
  """Everything that determines a store, and its folder in the cache."""

  corpus: Corpus
  tokenizer: Tokenizer | None
  encoder_tokenizer: Tokenizer | None
  folder: Path
  dtype: str
  takes_ids: bool
  about: dict[str, Any]

  def make(self, corpus: Corpus, folder: Path, shard_tokens: int, notes: Callable[[], list[str]]) -> bool:
    """Writes the store of a corpus, or of a part of it, and returns True if the folder is missing.

    `notes` makes those of the report. Raises DataError, StorageError.
    """
    return make_store(corpus, self.tokenizer, folder, self.dtype, shard_tokens, self.takes_ids, self.about,
                      self.encoder_tokenizer, notes=notes)


def recipe_of(config: DataConfig, source: SourceConfig, corpus: Corpus, tokenizer: Tokenizer | None,
              encoder_tokenizer: Tokenizer | None, tokenizer_key: str) -> StoreRecipe:
  """The recipe of a source's store. `tokenizer_key` identifies both tokenizers."""
  if tokenizer is None:
    dtype = source.dtype or 'uint32'
  else:
    most = max(len(t.token_bytes) for t in (tokenizer, encoder_tokenizer) if t is not None)
    dtype = 'uint16' if most <= 1 << 16 else 'uint32'
  key = key_of([corpus.fingerprint(), tokenizer_key, dtype, config.shard_tokens, store.VERSION])
  kind = config.tokenizer if tokenizer else 'ids'
  folder = cache_dir(config) / 'stores' / f'{_slug(shown(source.path))}-{_slug(kind)}-{key}'
  about: dict[str, Any] = {'path': shown(source.path), 'tokenizer': kind}
  if encoder_tokenizer is not None:
    about |= {'encoder_tokenizer': config.encoder_tokenizer, 'encoder_vocab_size': len(encoder_tokenizer.token_bytes)}
  return StoreRecipe(corpus, tokenizer, encoder_tokenizer, folder, dtype, takes_ids(config), about)


def open_recipe(config: DataConfig, recipe: StoreRecipe) -> dict[str, TokenStore]:
  """The store of a recipe by split; makes it, or merges its shards, if it is not in the cache.

  Raises DataError, StorageError.
  """
  folder = recipe.folder
  in_use = lease(folder)
  if not folder.exists() and next(folder.parent.glob(f'{folder.name}.shard-*'), None):
    LOADERS['shards'].merge(folder, recipe.corpus.notes())
  is_new = recipe.make(recipe.corpus, folder, config.shard_tokens, recipe.corpus.notes)
  opened = store.open_store(folder, 'all' if config.verify else 'nothing' if is_new else 'some', in_use)
  if not is_new and (report := opened['train'].report):
    for line in Report.from_dict(report).findings():
      print(f'data: {recipe.corpus.name}: {line}', flush=True)
  return opened


def prune_cache(config: DataConfig) -> None:
  """Keeps the cache within its bounds."""
  if config.cache_max_gb is None and config.cache_max_days is None:
    return
  max_bytes = None if config.cache_max_gb is None else config.cache_max_gb * 1e9
  if deleted := prune(cache_dir(config), max_bytes, config.cache_max_days):
    print(f'data: {sum(entry.num_bytes for entry in deleted) / 1e6:,.1f} MB deleted from the cache, used least: '
          f'{", ".join(entry.path.name for entry in deleted[:5])}'
          f'{f" and {len(deleted) - 5} more" if len(deleted) > 5 else ""}', flush=True)


def takes_ids(config: DataConfig) -> bool:
  """Whether documents of token ids can use the tokenizer's ids: not if it is fitted here, or there are two."""
  return (config.tokenizer not in TOKENIZERS or config.tokenizer == 'byte') and config.encoder_tokenizer is None


def _slug(path: str) -> str:
  return ''.join(c if c.isalnum() else '_' for c in path.rstrip('/').rsplit('/', 1)[-1])[:32] or 'data'

