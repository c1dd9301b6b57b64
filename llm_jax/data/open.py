"""From a DataConfig to token stores: `open_data`. Batches are made in pipeline.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.builder import to_dict
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.chat.open import chat_tokenizer, check_conversations, template_of
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.config import DataConfig, cache_dir
from llm_jax.data.loaders import LOADERS
from llm_jax.data.rows.augment import Augment
from llm_jax.data.rows.examples import Examples, make_examples
from llm_jax.data.rows.order import VERSION as ORDER_VERSION
from llm_jax.data.sources.corpus import PARTS, Corpus, fit_tokenizer, key_of, make_store, memory_stores
from llm_jax.data.sources.documents import SourceConfig, is_url, shown
from llm_jax.data.sources.files import Source, locate, open_source
from llm_jax.data.sources.filters import FilterConfig, Report
from llm_jax.data.sources.splits import SPLITS, SplitConfig, borders
from llm_jax.data.stores import store
from llm_jax.data.stores.store import TokenStore, mapped_store, open_split
from llm_jax.data.stores.token_files import TokenFile, open_bin
from llm_jax.data.tokenizers.tokenizer import (
  TOKENIZERS,
  ByteTokenizer,
  Tokenizer,
  TokenizerConfig,
  identity,
  open_tokenizer,
)

_STEP = 1 << 20  # tokens checked at once
# Fields of DataConfig that determine the tokens of a store, and what is compared by a hash in the fingerprint.
TOKENS = {f.name for part in (SourceConfig, SplitConfig) for f in dataclasses.fields(part)} | {
    'sources', 'filters', 'on_bad_record', 'tokenizer', 'encoder_tokenizer', 'vocab_size', 'min_frequency', 'pattern'}
BY_HASH = {'train_tokens': 'the training data (config.data.path or config.data.sources)',
           'encoder_tokenizer': 'the tokenizer of config.data.encoder_tokenizer',
           'chat_template': 'the chat template'}


@dataclasses.dataclass(frozen=True)
class Data:
  """The splits, each with one store per source, and the tokenizer (None for token ids without one)."""

  splits: dict[str, dict[str, TokenStore]]
  tokenizer: Tokenizer | None
  vocab_size: int
  bos_id: int | None = None
  eos_id: int | None = None
  reports: dict[str, dict] = dataclasses.field(default_factory=dict)  # of the filters, by source
  streams: dict[str, Corpus] = dataclasses.field(default_factory=dict)  # when streaming; then the split train is empty
  encoder_tokenizer: Tokenizer | None = None  # for the prompts of pairs; None: `tokenizer` encodes them too

  @property
  def prompt_tokenizer(self) -> Tokenizer | None:
    return self.tokenizer if self.encoder_tokenizer is None else self.encoder_tokenizer

  @property
  def train(self) -> dict[str, TokenStore]:
    return self.splits['train']

  @property
  def val(self) -> dict[str, TokenStore]:
    return self.splits['val']


def open_data(config: DataConfig) -> Data:
  """Opens the stores; makes those that are not in the cache. Raises DataError, ConfigError, StorageError."""
  config.check_paths()
  sources = config.named_sources
  if config.streaming:
    return LOADERS['stream'].open(config)
  bins = {name: found for name, source in sources.items() if (found := _bins(config, source))}
  corpora = {name: open_corpus(config, name, source) for name, source in sources.items() if name not in bins}
  check_conversations(config, corpora)
  tokenizer, encoder_tokenizer, key = _tokenizers(config, corpora, bins)
  if bins and tokenizer is not None and not _takes_ids(config):
    raise ConfigError(f'config.data.tokenizer: {config.tokenizer} is fitted to texts, but '
                      f'{shown(sources[next(iter(bins))].path)} holds token ids; set the tokenizer of these ids')
  by_source = {name: _map_bins(config, source, bins[name]) if name in bins else
               _stores(config, source, corpora[name], tokenizer, encoder_tokenizer, key)
               for name, source in sources.items()}
  splits = {split: {name: s[split] for name, s in by_source.items() if split in s and len(s[split].tokens)}
            for split in SPLITS}
  reports = {name: report for name, s in by_source.items() if 'train' in s and (report := s['train'].report)}
  wants_val = config.val_documents if config.split == 'count' else config.val_fraction
  for split in ('train', 'val'):
    for name, source in sources.items() if split == 'train' or wants_val or splits['val'] else ():
      num_tokens = len(splits[split][name].tokens) if name in splits[split] else 0
      if num_tokens < 2:
        counts = f'; {", ".join(map(str.strip, Report.from_dict(reports[name]).lines()))}' if name in reports else ''
        raise DataError(f'config.data.path: {shown(source.path)} gives {num_tokens} token(s) for {split}, which needs '
                        f'2 or more (config.data.split {config.split}, val_fraction {config.val_fraction}{counts})')
      if tokenizer is not None:
        _check_tokens(source, splits[split][name], tokenizer, encoder_tokenizer, is_bin=name in bins)
  return dataclasses.replace(data_of(config, splits, tokenizer, encoder_tokenizer), reports=reports)


def open_examples(config: DataConfig, data: Data, tokens: TokenStore, *, train: bool) -> Examples:
  """The rows of a store as examples of the config's task. Raises ConfigError, DataError if they do not fit."""
  return make_examples(
      tokens, task=config.task_settings, seq_len=config.seq_len, encoder_len=config.encoder_len, packing=config.packing,
      stride=config.stride, truncate=config.truncate, mask_documents=config.mask_documents,
      augment=config.augment if train else Augment(), vocab_size=data.vocab_size, bos_id=data.bos_id,
      eos_id=data.eos_id, encoder_tokenizer=data.encoder_tokenizer, score_once=not train)


def data_of(config: DataConfig, splits: dict[str, dict[str, TokenStore]], tokenizer: Tokenizer | None,
          encoder_tokenizer: Tokenizer | None = None) -> Data:
  if tokenizer is not None:
    return Data(splits, tokenizer, len(tokenizer.token_bytes), tokenizer.bos_id, tokenizer.eos_id,
                encoder_tokenizer=encoder_tokenizer)
  eot_id = next(iter(config.named_sources.values())).eot_id
  vocab_size = 1 + max(_max_id(tokens) for stores in splits.values() for tokens in stores.values())
  return Data(splits, None, vocab_size, eot_id, eot_id)


def _max_id(tokens: TokenStore) -> int:
  """The highest id. Raises DataError for an id below 0."""
  most = 0
  for begin in range(0, len(tokens.tokens), _STEP):
    part = tokens.tokens[begin:begin + _STEP]
    if part.dtype.kind == 'i' and part.min() < 0:
      raise DataError(f'{tokens.tokens.files[0].path}: holds the token id {part.min()}; ids must be 0 or '
                      f'more; is config.data.dtype {part.dtype} right?')
    most = max(most, int(part.max()))
  return most


def _check_tokens(source: SourceConfig, tokens: TokenStore, tokenizer: Tokenizer, encoder_tokenizer: Tokenizer | None,
                  is_bin: bool) -> None:
  """Raises DataError if all tokens are white space, or for ids of a .bin (not checked before) beyond the vocabulary."""
  if is_bin and (most := _max_id(tokens)) >= len(tokenizer.token_bytes):
    raise DataError(f'{tokens.tokens.files[0].path}: token {most} is beyond the vocabulary of '
                    f'{len(tokenizer.token_bytes)} tokens')
  blank, blank_prompt = (np.array([not b.strip() for b in t.token_bytes])
                         for t in (tokenizer, encoder_tokenizer or tokenizer))
  for begin in range(0, len(tokens.tokens), _STEP):
    ids = tokens.tokens[begin:begin + _STEP]
    is_prompt = np.zeros(len(ids), bool) if encoder_tokenizer is None else _in_prompts(tokens, begin, begin + len(ids))
    if not (blank[ids[~is_prompt]].all() and blank_prompt[ids[is_prompt]].all()):
      return
  raise DataError(f'config.data.path: {shown(source.path)} holds nothing but white space')


def _in_prompts(tokens: TokenStore, begin: int, end: int) -> np.ndarray:
  """bool [end - begin]: whether each token in [begin, end) belongs to a prompt; bos does not."""
  assert tokens.answers is not None, '_tokenizers checks for pairs'
  positions = np.arange(begin, end)
  documents = np.searchsorted(tokens.starts, positions, 'right') - 1
  places = positions - tokens.starts[documents]
  return (places > 0) & (places < tokens.answers[documents])


def open_corpus(config: DataConfig, name: str, source: SourceConfig) -> Corpus:
  sides: list[tuple[str | None, Source]] = [(None, open_source(source, cache_dir(config)))]
  split = SplitConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SplitConfig)})
  for side, path in (('val', source.val_path), ('test', source.test_path)):
    if path is not None:
      sides.append((side, open_source(dataclasses.replace(source, path=path), cache_dir(config))))
      nothing: Any = {f'{side}_fraction': 0.0, f'{side}_documents': 0}
      split = dataclasses.replace(split, **nothing)
  corpus = Corpus(shown(source.path) if name == 'data' else name, tuple(sides), split, config.filters,
                  config.on_bad_record, config.max_bad_fraction, template_of(config))
  return corpus.resolved()


def _tokenizers(config: DataConfig, corpora: dict[str, Corpus],
                bins: Collection[str]) -> tuple[Tokenizer | None, Tokenizer | None, str]:
  """(tokenizer, the prompts' own tokenizer or None, cache key of both). Raises ConfigError."""
  reader = config.encoder_tokenizer
  if (template := template_of(config)) is not None:
    tokenizer, key = tokenizer_of(config, config.tokenizer, corpora)
    return chat_tokenizer(config, tokenizer, template), None, key_of([key, template.identity])
  if reader is None:
    tokenizer, key = tokenizer_of(config, config.tokenizer, corpora)
    return tokenizer, None, key
  path = f'config.data.encoder_tokenizer: {reader}'
  for name, source in config.named_sources.items():
    first = None if name in bins else corpora[name].first()
    if name in bins or (first is not None and first.answer is None):
      raise ConfigError(f'{path} is for prompts, but {shown(source.path)} holds no pairs of text; set '
                        'config.data.answer_field to the field of the answers, or encoder_tokenizer to None')
    if first is not None and not (isinstance(first.text, str) and isinstance(first.answer, str)):
      raise ConfigError(f'{path} is for texts, but {shown(source.path)} holds token ids; set it to None')
  [(tokenizer, key), (encoder_tokenizer, encoder_key)] = (
      tokenizer_of(config, name, corpora, (part,)) for name, part in ((config.tokenizer, 'answer'), (reader, 'text')))
  return tokenizer, encoder_tokenizer, key_of([key, encoder_key])


def tokenizer_of(config: DataConfig, name: str, corpora: dict[str, Corpus],
               parts: tuple[str, ...] = PARTS) -> tuple[Tokenizer | None, str]:
  if name not in ('none', *TOKENIZERS):
    return open_tokenizer(name), identity(name)
  if name == 'none' or not corpora or any(corpus.holds_ids() for corpus in corpora.values()):
    return (ByteTokenizer(), 'byte') if name == 'byte' else (None, 'none')
  settings = TokenizerConfig(config.vocab_size, config.min_frequency, config.pattern, config.sections.get(name))
  return fit_tokenizer(name, settings, corpora.values(), cache_dir(config), parts)


def _takes_ids(config: DataConfig) -> bool:
  """Whether documents of token ids can use the tokenizer's ids: not if it is fitted here, or there are two."""
  return (config.tokenizer not in TOKENIZERS or config.tokenizer == 'byte') and config.encoder_tokenizer is None


def _stores(config: DataConfig, source: SourceConfig, corpus: Corpus, tokenizer: Tokenizer | None,
            encoder_tokenizer: Tokenizer | None, tokenizer_key: str) -> dict[str, TokenStore]:
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
  make_store(corpus, tokenizer, folder, dtype, config.shard_tokens, _takes_ids(config), about, encoder_tokenizer)
  if config.verify:
    store.verify(folder)
  return {split: open_split(folder, split) for split in SPLITS}


def _bins(config: DataConfig, source: SourceConfig) -> dict[str, TokenFile] | None:
  """The .bin files of each split, if the path is a .bin file or a folder with train.bin; else None."""
  path = source.path
  if is_url(path) and path.endswith('.bin'):
    files = locate(source, cache_dir(config))
    if len(files) > 1:
      return None
    path = str(files[0].path)
  root = Path(path).expanduser()
  paths = {'val': source.val_path, 'test': source.test_path}
  if (root / 'train.bin').is_file():
    paths = {split: found or str(root / f'{split}.bin') for split, found in paths.items()
             if found or (root / f'{split}.bin').is_file()}
    root /= 'train.bin'
  elif root.suffix != '.bin' or source.format not in ('auto', 'bin'):
    return None
  return {'train': open_bin(root, source.dtype), **{
      split: open_bin(Path(p).expanduser(), source.dtype) for split, p in paths.items() if p}}


def _map_bins(config: DataConfig, source: SourceConfig, files: dict[str, TokenFile]) -> dict[str, TokenStore]:
  train, eot_id = files['train'], source.eot_id
  if config.split not in ('auto', 'tail') and 'val' not in files:
    raise ConfigError(f'config.data.split: a .bin file cannot be reordered: set auto or tail; '
                      f'got {config.split}')
  ends = borders(train.size, 0 if 'val' in files else config.val_fraction,
                 0 if 'test' in files else config.test_fraction)
  cut = {split: mapped_store(train, eot_id, begin, end)
         for split, begin, end in zip(SPLITS, (0, *ends), ends, strict=False) if end > begin}
  return cut | {split: mapped_store(files[split], eot_id) for split in files if split != 'train'}


def tokenize(path: str, config: DataConfig, tokenizer: Tokenizer | None,
             encoder_tokenizer: Tokenizer | None = None) -> Data:
  """All of a path as validation data, encoded with existing tokenizers; .bin files are mapped."""
  source = dataclasses.replace(next(iter(config.named_sources.values())), path=path, format='auto', sha256=None,
                               val_path=None, test_path=None)
  if bins := _bins(config, source):
    val = mapped_store(bins['train'], source.eot_id if tokenizer is None else tokenizer.bos_id)
  else:
    corpus = Corpus(path, (('val', open_source(source, cache_dir(config))),), SplitConfig('document'), FilterConfig(),
                    config.on_bad_record, config.max_bad_fraction, template_of(config))
    check_conversations(config, {'data': corpus}, '--data')
    if tokenizer is None and not corpus.holds_ids():
      raise DataError(f'--data: {path} is text, but the run has no tokenizer')
    val = memory_stores((pair for _, dealt in corpus.documents() for pair in dealt), ('val',), tokenizer,
                        encoder_tokenizer)['val']
  if len(val.tokens) < 2:
    raise DataError(f'--data: {path} gives {len(val.tokens)} token(s); it needs 2 or more')
  data = data_of(config, {'train': {}, 'val': {'data': val}, 'test': {}}, tokenizer, encoder_tokenizer)
  if encoder_tokenizer is not None:  # two vocabularies: the ids fit their tokenizers
    return data
  return dataclasses.replace(data, vocab_size=max(data.vocab_size, _max_id(val) + 1))


def data_fingerprint(config: DataConfig, data: Data, batch_size: int, seed: int) -> dict:
  """Everything that batch n depends on; stored in the checkpoint and compared when a run resumes."""
  fields = ('task', 'seq_len', 'encoder_len', 'packing', 'stride', 'truncate', 'mask_documents', 'streaming',
            *(['shuffle_buffer'] if config.streaming else []))
  settings = {f: getattr(config, f) for f in fields}
  for name, section in ((config.task, config.task_settings), ('augment', config.augment)):
    settings |= {f'{name}.{field}': value for field, value in to_dict(section).items()}
  if data.encoder_tokenizer is not None:  # its eos is not stored with the tokens
    settings['encoder_tokenizer'] = key_of(data.encoder_tokenizer.to_json())
  if isinstance(data.tokenizer, ChatTokenizer):
    settings['chat_template'] = key_of(data.tokenizer.template.identity)
  settings['order'] = 'stream' if config.streaming else ORDER_VERSION
  # Lists, because the order of the sources matters.
  train = [[name, tokens.sha256] for name, tokens in data.train.items()]
  train += [[name, key_of([corpus.contents(), data.tokenizer.to_json() if data.tokenizer else None])]
            for name, corpus in data.streams.items()]
  mixture = [[begin, {name: source.weight[i] for name, source in config.sources.items()}]
             for i, begin in enumerate(config.weights_from)] if config.sources else []
  return {'train_tokens': train, 'seed': seed, 'rows_per_batch': batch_size, 'mixture': mixture, **settings}


def check_fingerprint(saved: dict, current: dict, step: int,
                      changed: Mapping[str, tuple[Any, Any]] | None = None) -> None:
  """Raises ConfigError naming each field in which a run's data differs from its checkpoint's at `step`.

  `changed`: the fields of config.data that differ, {name: (old, new)}. Mixture weights that begin at that step or later
  may differ.
  """
  saved, current = ({**f, 'mixture': [s for s in f['mixture'] if s[0] < step]} for f in (saved, current))
  names = {'seed': 'config.seed',
           'rows_per_batch': 'the number of rows in a batch (config.batch_tokens / config.data.seq_len)',
           'order': 'the order of rows (of another version of llm_jax)',
           'mixture': f'the weights of the sources before step {step} (config.data.sources.NAME.weight, weights_from)'}
  differing = [f'{names.get(k, f"config.data.{k}")}: checkpoint {saved.get(k)}, now {current.get(k)}'
               for k in {**saved, **current} if saved.get(k) != current.get(k) and k not in BY_HASH]
  if hashes := [k for k in BY_HASH if saved.get(k) != current.get(k)]:
    causes = [f'config.data.{name}: checkpoint {old}, now {new}' for name, (old, new) in (changed or {}).items()
              if name.partition('.')[0] in TOKENS and not name.endswith('.weight')]
    differing += causes or [f'{BY_HASH[k]} has changed since the checkpoint was written' for k in hashes]
  if differing:
    raise ConfigError('the data differs from the data of the checkpoint, so its batches cannot continue:\n  '
                      + '\n  '.join(differing))


def _slug(path: str) -> str:
  return ''.join(c if c.isalnum() else '_' for c in path.rstrip('/').rsplit('/', 1)[-1])[:32] or 'data'

