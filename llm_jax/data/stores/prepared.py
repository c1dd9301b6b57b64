"""Stores that config.data.path names directly: folders that `data prepare` wrote, here or in object storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.base.errors import ConfigError
from llm_jax.data.chat.find import folder_template
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.config import DataConfig, cache_dir
from llm_jax.data.loaders import LOADERS
from llm_jax.data.sources.documents import SourceConfig, is_url, shown
from llm_jax.data.sources.splits import SPLITS
from llm_jax.data.stores.cache import hold
from llm_jax.data.stores.store import TokenStore, open_split, open_store, read_manifest
from llm_jax.data.stores.token_files import TokenFile
from llm_jax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A store whose manifest, tokenizers and columns are in `folder`; its tokens may be elsewhere."""

  folder: Path
  token_file: Callable[[Path, str, int], Any] = TokenFile
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # of TokenStore

  def splits(self, verify: bool) -> dict[str, TokenStore]:
    """Raises DataError."""
    if self.token_file is TokenFile:
      return open_store(self.folder, 'all' if verify else 'some')
    return {split: open_split(self.folder, split, self.token_file, **self.fields) for split in SPLITS}

  def tokenizer(self, name: str = 'tokenizer') -> Tokenizer | None:
    path = self.folder / f'{name}.json'
    tokenizer = load_tokenizer(path) if path.exists() else None
    template = folder_template(self.folder) if name == 'tokenizer' else None
    return tokenizer if tokenizer is None or template is None else ChatTokenizer(tokenizer, template)


def find_prepared(config: DataConfig, source: SourceConfig) -> Prepared | None:
  """The store at the source's path; None if there is something else. Raises ConfigError, DataError, StorageError."""
  if is_url(source.path):
    scheme = source.path.partition('://')[0]
    found = None if scheme in ('http', 'https', 'ftp') else LOADERS['remote'](source.path, config)
  else:
    folder = Path(source.path).expanduser()
    found = Prepared(folder) if (folder / 'manifest.json').is_file() and list(folder.glob('*-00000.tokens')) else None
  if found and (source.val_path or source.test_path):
    raise ConfigError(f'config.data.val_path: {shown(source.path)} is a prepared store with validation and test parts; '
                      'set val_path and test_path to None')
  if found:
    hold([found.folder / 'manifest.json'], cache_dir(config))  # it may be in the cache
  return found


def check_columns(config: DataConfig, sources: dict[str, Prepared]) -> None:
  """Raises ConfigError for a store of conversations, or of pairs of them, if the task reads none, or vice versa."""
  for name, source in sources.items():
    files = read_manifest(source.folder, with_tokens=False)['files']
    holds = 'preference' if 'train.seconds' in files else 'chat' if 'train-00000.learnt' in files else 'text'
    needs = {'seconds': 'preference', 'learnt': 'chat'}.get(config.task_settings.needs, 'text')
    if holds != needs:
      raise ConfigError(f'config.data.task: {config.task} does not fit the prepared store {shown(name)}, which holds '
                        f'{"documents" if holds == "text" else "conversations for task " + holds}; set another task')


def prepared_tokenizers(sources: dict[str, Prepared]) -> tuple[Tokenizer | None, Tokenizer | None]:
  """(tokenizer, the prompts' own tokenizer or None), the same for all stores. Raises ConfigError."""
  first, *rest = sources
  result = []
  for kind in ('tokenizer', 'encoder_tokenizer'):
    tokenizer = sources[first].tokenizer(kind)
    for other in rest:
      found = sources[other].tokenizer(kind)
      if (found and found.to_json()) != (tokenizer and tokenizer.to_json()):
        raise ConfigError(f'config.data.sources: the stores {first} and {other} were made with different tokenizers; '
                          'prepare one of them with the tokenizer.json of the other')
    result.append(tokenizer)
  return result[0], result[1]
