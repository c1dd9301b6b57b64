"""Stores that config.data.path names directly: folders that `data prepare` wrote, here or in object storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_jax.base.errors import ConfigError
from llm_jax.data.config import DataConfig
from llm_jax.data.loaders import LOADERS
from llm_jax.data.sources.documents import SourceConfig, is_url, shown
from llm_jax.data.sources.splits import SPLITS
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
    return load_tokenizer(path) if path.exists() else None


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
  return found


def prepared_tokenizers(sources: dict[str, Prepared], template: Any) -> tuple[Tokenizer | None, Tokenizer | None]:
  """(tokenizer, the prompts' own tokenizer or None), the same for all stores. Raises ConfigError.

  `template`: the identity of the chat template, as of JSON, or None.
  """
  for name, source in sources.items():
    if (made := read_manifest(source.folder, with_tokens=False).get('template')) != template:
      raise ConfigError(f'config.data.task: the store {name} was prepared {"with another" if made else "without a"} '
                        'chat template; set task and template as when it was prepared')
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
