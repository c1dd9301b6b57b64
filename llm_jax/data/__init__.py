"""From files to token stores: DataConfig and `open_data`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np

from llm_jax.data import fetch, store
from llm_jax.data.sources import SOURCES, open_source
from llm_jax.data.store import TokenStore
from llm_jax.data.tasks import TASKS
from llm_jax.data.token_files import open_bin
from llm_jax.data.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from llm_jax.errors import ConfigError, DataError, StorageError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to train on and how it becomes rows of tokens."""

  path: str = 'stdlib'  # 'stdlib', a text file, folder, glob or URL; or a .bin of tokens, or a folder with train.bin
  source: str = 'auto'  # one of SOURCES; 'auto' goes by the path
  sha256: str | None = None  # of the file behind a URL
  val_path: str | None = None  # a .bin for validation; None: split `path`
  split: Literal['auto', 'document', 'tail'] = 'auto'  # see store.split_documents; auto: tail under 20 documents
  val_fraction: float = 0.05
  tokenizer: str = 'bpe'  # one of TOKENIZERS
  vocab_size: int = 8192  # that bpe is trained to
  eot_id: int | None = None  # of a .bin: the token that opens a document
  task: str = 'next_token'  # one of TASKS
  seq_len: int = 1024
  mask_documents: bool = True  # attention and positions stay inside a document
  cache_dir: str | None = None  # None: $LLM_JAX_CACHE, else ~/.cache/llm_jax

  def __post_init__(self):
    for field, table in (('tokenizer', TOKENIZERS), ('task', TASKS), ('source', {'auto': None, **SOURCES})):
      if getattr(self, field) not in table:
        raise ValueError(f'{field} {getattr(self, field)!r} is unknown; known: {", ".join(table)}')
    if not self.path:
      raise ValueError("path must name something: 'stdlib', a file, a folder, a glob or a URL")
    if self.seq_len < 1:
      raise ValueError(f'seq_len must be at least 1; got {self.seq_len}')
    if not 0 < self.val_fraction < 1:
      raise ValueError(f'val_fraction must lie between 0 and 1; got {self.val_fraction}')
    if self.tokenizer == 'bpe' and self.vocab_size < 257:
      raise ValueError(f'vocab_size must be at least 257 (256 bytes and one special token); got {self.vocab_size}')


@dataclasses.dataclass(frozen=True)
class Data:
  """The two splits, and the tokenizer (None for .bin files: their ids have no text here)."""

  train: TokenStore
  val: TokenStore
  tokenizer: Tokenizer | None
  vocab_size: int


def cache_dir(config: DataConfig) -> Path:
  default = os.environ.get('LLM_JAX_CACHE') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'llm_jax'
  return Path(config.cache_dir or default).expanduser()


def open_data(config: DataConfig) -> Data:
  """Opens the stores, first making them if they are not in the cache. Raises DataError, StorageError."""
  path = config.path
  if fetch.is_url(path):
    path = str(fetch.fetch(path, config.sha256, cache_dir(config)))
  if path.endswith('.bin') or (Path(path) / 'train.bin').is_file():
    return _open_bins(config, Path(path).expanduser())
  if config.val_path is not None:
    raise ConfigError('config.data.val_path: only .bin files come with their own validation part; a text is split '
                      '(config.data.split, config.data.val_fraction)')
  source = open_source(config.source, path)
  recipe = {'source': source.fingerprint(), 'tokenizer': config.tokenizer, 'split': config.split,
            'val_fraction': config.val_fraction, 'version': store.VERSION,
            **({'vocab_size': config.vocab_size} if config.tokenizer == 'bpe' else {})}
  key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
  folder = cache_dir(config) / 'stores' / f'{_slug(config.path)}-{config.tokenizer}-{key}'
  with store.locked(folder):
    if not folder.exists():
      try:
        _make_store(config, source, folder)
      except OSError as e:
        raise StorageError(f'{folder}: cannot be written: {e.strerror}') from None
  splits = {split: store.open_split(folder, split) for split in ('train', 'val')}
  tokenizer = load_tokenizer(folder / 'tokenizer.json')
  return Data(**splits, tokenizer=tokenizer, vocab_size=len(tokenizer.token_bytes))


def _make_store(config: DataConfig, source, folder: Path) -> None:
  total_bytes = sum(path.stat().st_size for _, path in source.files)
  print(f'data: {config.path}: {len(source.files)} file(s), {total_bytes / 1e6:.1f} MB; kept in {folder}', flush=True)
  how = config.split
  if how == 'auto':
    how = 'tail' if len(source.files) < 20 else 'document'

  def documents():
    return store.split_documents(source.documents, how, config.val_fraction)

  num_chars = {'train': 0, 'val': 0}
  for split, text in documents():
    num_chars[split] += len(text)
  if not min(num_chars.values()):
    empty = ' and '.join(split for split, n in num_chars.items() if not n)
    raise DataError(f'config.data.path: {config.path} gives no text for {empty} ({len(source.files)} file(s), '
                    f'{total_bytes} bytes, val_fraction {config.val_fraction}, split by {how})')
  start = time.perf_counter()
  # A character that only the validation part has must still have an id; merges are learnt from the training part alone.
  texts = (text for split, text in documents() if split == 'train' or config.tokenizer == 'char')
  tokenizer = TOKENIZERS[config.tokenizer](texts, config.vocab_size)
  print(f'data: {config.tokenizer} tokenizer of {len(tokenizer.token_bytes)} tokens '
        f'made in {time.perf_counter() - start:.1f} s', flush=True)
  store.write_store(folder, tokenizer, documents(), total_bytes,
                    {'source': {'path': config.path, 'files': len(source.files), 'bytes': total_bytes},
                     'split': how, 'val_fraction': config.val_fraction, 'tokenizer': config.tokenizer})


def _open_bins(config: DataConfig, path: Path) -> Data:
  train_path, val_path = path, config.val_path and Path(config.val_path).expanduser()
  if path.is_dir():
    train_path, val_path = path / 'train.bin', val_path or path / 'val.bin'
  train = open_bin(train_path, config.eot_id)
  if val_path:
    val = open_bin(val_path, config.eot_id)
  else:
    cut = int(len(train.tokens) * (1 - config.val_fraction))
    train, val = _slice(train, 0, cut), _slice(train, cut, len(train.tokens))
  if min(len(train.tokens), len(val.tokens)) < 2:
    raise DataError(f'{path}: {len(train.tokens)} tokens to train on and {len(val.tokens)} to validate with; '
                    'each side needs 2 or more')
  vocab_size = 1 + int(max(train.tokens.max(), val.tokens.max()))
  return Data(train, val, tokenizer=None, vocab_size=vocab_size)


def _slice(tokens: TokenStore, begin: int, end: int) -> TokenStore:
  inside = tokens.starts[(tokens.starts > begin) & (tokens.starts < end)] - begin
  return TokenStore(tokens.tokens[begin:end], np.concatenate([[0], inside]), f'{tokens.sha256}[{begin}:{end}]', 0)


def tokenize(path: str, tokenizer: Tokenizer | None, eot_id: int | None = None) -> TokenStore:
  """All of a source as one store in memory, by a tokenizer that exists already; .bin files as they are."""
  if path.endswith('.bin'):
    return open_bin(Path(path).expanduser(), eot_id if tokenizer is None else tokenizer.eot_id)
  if tokenizer is None:
    raise DataError(f'--data: {path} is no .bin of tokens, and the run has no tokenizer for text')
  texts = [document.text for document in open_source('auto', path).documents()]
  rows = [np.concatenate([[tokenizer.eot_id], ids]) for ids in tokenizer.encode(texts)]
  starts = np.cumsum([0, *map(len, rows)])[:-1]
  tokens = np.concatenate(rows).astype(np.int64)
  return TokenStore(tokens, starts, hashlib.sha256(tokens.tobytes()).hexdigest(), sum(len(t.encode()) for t in texts))


def data_fingerprint(config: DataConfig, data: Data, batch_size: int, seed: int) -> dict:
  """All that batch n depends on; kept in the checkpoint, compared when a run goes on."""
  return {'train_tokens': data.train.sha256, 'seed': seed, 'task': config.task, 'seq_len': config.seq_len,
          'mask_documents': config.mask_documents, 'rows_per_batch': batch_size}


def check_fingerprint(saved: dict, current: dict) -> None:
  """Raises ConfigError naming each field in which the data of a run differs from its checkpoint's."""
  names = {'train_tokens': 'the training data (sha256 of its tokens)', 'seed': 'config.seed',
           'task': 'config.data.task', 'seq_len': 'config.data.seq_len', 'mask_documents': 'config.data.mask_documents',
           'rows_per_batch': 'the number of rows in a batch (config.batch_tokens / config.data.seq_len)'}
  differing = [f'{names.get(k, k)}: checkpoint {saved.get(k)}, now {current.get(k)}'
               for k in {**saved, **current} if saved.get(k) != current.get(k)]
  if differing:
    raise ConfigError('the data differs from what the checkpoint was trained on, so its batches cannot go on:\n  '
                      + '\n  '.join(differing) + '\nPut it back, or start in another --workdir.')


def _slug(path: str) -> str:
  return ''.join(c if c.isalnum() else '_' for c in path.rstrip('/').rsplit('/', 1)[-1])[:32] or 'data'
