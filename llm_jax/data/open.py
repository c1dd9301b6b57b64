"""From a DataConfig to token stores: `open_data`. Batches are made in pipeline.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.builder import to_dict
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.notes import print_once
from llm_jax.data.chat.open import chat_tokenizer, check_conversations, template_of
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.checks import check_ids, check_size, check_white_space, max_id, warn_of_one_kind
from llm_jax.data.config import DataConfig, cache_dir
from llm_jax.data.loaders import LOADERS
from llm_jax.data.recipes import StoreRecipe, open_recipe, prune_cache, recipe_of
from llm_jax.data.rows.augment import Augment
from llm_jax.data.rows.examples import Examples, make_examples
from llm_jax.data.rows.order import VERSION as ORDER_VERSION
from llm_jax.data.sources import overlap
from llm_jax.data.sources.content import FileHashes
from llm_jax.data.sources.corpus import PARTS, Corpus, fit_tokenizer, key_of, memory_stores
from llm_jax.data.sources.documents import SourceConfig, is_url, shown
from llm_jax.data.sources.files import locate, open_sides, open_source
from llm_jax.data.sources.filters import FilterConfig
from llm_jax.data.sources.finding import LeftOut
from llm_jax.data.sources.kinds import refuse_pointers
from llm_jax.data.sources.splits import SPLITS, SplitConfig, borders
from llm_jax.data.stores.prepared import Prepared, check_columns, find_prepared, prepared_tokenizers
from llm_jax.data.stores.store import TokenStore, mapped_store
from llm_jax.data.stores.token_files import TokenFile, open_bin
from llm_jax.data.tokenizers.tokenizer import (
  TOKENIZERS,
  ByteTokenizer,
  Tokenizer,
  TokenizerConfig,
  identity,
  open_tokenizer,
)

# Fields of DataConfig that determine the tokens of a store, and what is compared by a hash in the fingerprint.
TOKENS = {f.name for part in (SourceConfig, SplitConfig) for f in dataclasses.fields(part)} | {
    'sources', 'filters', 'on_bad_record', 'tokenizer', 'encoder_tokenizer', 'vocab_size', 'min_frequency', 'pattern',
    'special_tokens'}
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
  if config.streaming:
    return _open_stream(config)
  sources = config.named_sources
  prepared, bins, recipes, (tokenizer, encoder_tokenizer) = _open_sources(config)
  opened = {name: found.splits(config.verify) for name, found in prepared.items()}
  opened |= {name: _map_bins(config, sources[name], found) for name, found in bins.items()}
  opened |= {name: open_recipe(config, recipe) for name, recipe in recipes.items()}
  by_source = {name: opened[name] for name in sources}
  prune_cache(config)
  splits = {split: {name: s[split] for name, s in by_source.items() if split in s and len(s[split].tokens)}
            for split in SPLITS}
  if len(sources) > 1:
    for line in overlap.lines(overlap.compare(lambda name: _keys(splits[name.removesuffix(overlap.ENDING)]))):
      print_once(f'data: all sources together: {line}')
  reports = {name: report for name, s in by_source.items() if 'train' in s and (report := s['train'].report)}
  wants_val = config.val_documents if config.split == 'count' else config.val_fraction
  for split in ('train', 'val'):
    for name, source in sources.items() if split == 'train' or wants_val or splits['val'] else ():
      check_size(config, source, split, splits[split].get(name), reports.get(name))
      if name in prepared:  # checked when it was prepared; looking at all of it here might fetch it
        continue
      if name in bins and tokenizer is not None:
        check_ids(splits[split][name], tokenizer)
      warn_of_one_kind(name, split, splits[split][name], tokenizer)
      if tokenizer is not None:
        check_white_space(source, name, split, splits[split][name], tokenizer, encoder_tokenizer)
  return dataclasses.replace(data_of(config, splits, tokenizer, encoder_tokenizer), reports=reports)


def _keys(stores: dict[str, TokenStore]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.uint64), *(s.keys for s in stores.values() if s.keys is not None)])


def _open_stream(config: DataConfig) -> Data:
  config.check_paths()
  for source in config.named_sources.values():
    if find_prepared(config, source):
      raise ConfigError(f'config.data.streaming: {shown(source.path)} is a prepared store, which is read from its '
                        'files; set streaming to False')
  return LOADERS['stream'].open(config)


def _open_sources(config: DataConfig) -> tuple[
    dict[str, Prepared], dict[str, dict[str, TokenFile]], dict[str, StoreRecipe],
    tuple[Tokenizer | None, Tokenizer | None]]:
  """(prepared stores, .bin files, recipes of the other stores, each by source; tokenizer, the prompts' own or None).

  Fits a tokenizer that is not in the cache. Raises DataError, ConfigError, StorageError.
  """
  config.check_paths()
  sources = config.named_sources
  prepared = {name: ready for name, source in sources.items() if (ready := find_prepared(config, source))}
  bins = {name: found for name, source in sources.items() if name not in prepared and (found := _bins(config, source))}
  corpora = {name: open_corpus(config, name, source) for name, source in sources.items()
             if name not in bins and name not in prepared}
  check_conversations(config, corpora)
  tokenizers: tuple[Tokenizer | None, Tokenizer | None]
  if prepared:
    check_columns(config, prepared)
    first, second = prepared_tokenizers(prepared)
    tokenizers = first and with_special_tokens(config, first), second and with_special_tokens(config, second)
    key = key_of([config.special_tokens, *(t.to_json() if t else None for t in tokenizers)])
    print(f'data: {", ".join(prepared)}: prepared, with its splits, filters and tokenizer', flush=True)
  else:
    config, *both, key = _tokenizers(config, corpora, bins)
    tokenizers = both[0], both[1]
  recipes = {name: recipe_of(config, sources[name], corpus, *tokenizers, key) for name, corpus in corpora.items()}
  return prepared, bins, recipes, tokenizers


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
  vocab_size = max(tokens.vocab_size or 1 + max_id(tokens) for stores in splits.values() for tokens in stores.values())
  return Data(splits, None, vocab_size, eot_id, eot_id)


def open_corpus(config: DataConfig, name: str, source: SourceConfig) -> Corpus:
  others = [dataclasses.replace(other, path=path) for key, other in config.named_sources.items() if key != name
            for path in (other.val_path, other.test_path) if path is not None]
  sides = open_sides(source, cache_dir(config), [open_source(other, cache_dir(config)) for other in others],
                     config.on_bad_record)
  split = SplitConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SplitConfig)})
  for side, _ in sides:
    if side is not None:
      nothing: Any = {f'{side}_fraction': 0.0, f'{side}_documents': 0}
      split = dataclasses.replace(split, **nothing)
  corpus = Corpus(shown(source.path) if name == 'data' else name, tuple(sides), split, config.filters,
                  config.on_bad_record, config.max_bad_fraction, template_of(config),
                  FileHashes(cache_dir(config), of_stream=config.streaming))
  return corpus.resolved()


def _tokenizers(config: DataConfig, corpora: dict[str, Corpus], bins: dict[str, dict[str, TokenFile]]) -> tuple[
    DataConfig, Tokenizer | None, Tokenizer | None, str]:
  """(the config, tokenizer, the prompts' own tokenizer or None, cache key of both). Raises ConfigError.

  In the config that is returned, the tokenizer is none if all data are token ids.
  """
  if _holds_only_ids(config, corpora, bins):
    print_once(f'data: {", ".join(shown(source.path) for source in config.named_sources.values())}: token ids alone: '
               f'they are used as they are, without config.data.tokenizer {config.tokenizer}')
    config = dataclasses.replace(config, tokenizer='none')
  reader = config.encoder_tokenizer
  if (template := template_of(config)) is not None:
    tokenizer, key = tokenizer_of(config, config.tokenizer, corpora)
    return config, chat_tokenizer(config, tokenizer, template), None, key_of([key, template.identity])
  if reader is None:
    tokenizer, key = tokenizer_of(config, config.tokenizer, corpora)
    return config, tokenizer, None, key
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
  return config, tokenizer, encoder_tokenizer, key_of([key, encoder_key])


def tokenizer_of(config: DataConfig, name: str, corpora: dict[str, Corpus],
               parts: tuple[str, ...] = PARTS) -> tuple[Tokenizer | None, str]:
  if name not in ('none', *TOKENIZERS):
    return with_special_tokens(config, open_tokenizer(name)), f'{identity(name)}{_special_key(config)}'
  if name == 'none' or not corpora or any(corpus.dtype_of_ids() for corpus in corpora.values()):
    return (ByteTokenizer(), 'byte') if name == 'byte' else (None, 'none')
  settings = TokenizerConfig(config.vocab_size, config.min_frequency, config.pattern, config.sections.get(name))
  tokenizer, key = fit_tokenizer(name, settings, corpora.values(), cache_dir(config), parts)
  return with_special_tokens(config, tokenizer), f'{key}{_special_key(config)}'


def with_special_tokens(config: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
  """The tokenizer, for which text may spell special tokens if the config says so. Raises ConfigError."""
  if config.special_tokens == 'text':
    return tokenizer
  if not hasattr(tokenizer, 'parsing_special_tokens'):
    raise ConfigError('config.data.special_tokens: parse needs a tokenizer whose special tokens have a spelling: bpe, '
                      f'or a tokenizer.json; config.data.tokenizer is {config.tokenizer}: set text')
  return tokenizer.parsing_special_tokens()


def _special_key(config: DataConfig) -> str:
  return '' if config.special_tokens == 'text' else f'-{config.special_tokens}'


def _holds_only_ids(config: DataConfig, corpora: dict[str, Corpus], bins: dict[str, dict[str, TokenFile]]) -> bool:
  """Whether all sources hold token ids, which a tokenizer that is fitted here cannot have made.

  The tokenizer byte goes with bytes (format bytes, or ids of uint8). Raises ConfigError where texts stand beside ids.
  """
  if config.tokenizer not in TOKENIZERS or config.encoder_tokenizer is not None:
    return False
  dtypes = {name: files['train'].dtype for name, files in bins.items()}
  dtypes |= {name: corpus.dtype_of_ids() or '' for name, corpus in corpora.items()}
  ids = [name for name, dtype in dtypes.items() if dtype and (config.tokenizer, dtype) != ('byte', 'uint8')]
  if not ids:
    return False
  paths = {name: shown(source.path) for name, source in config.named_sources.items()}
  others = [name for name in paths if name not in ids]
  if others:
    raise ConfigError(f'config.data.tokenizer: {config.tokenizer} is for texts, but {paths[ids[0]]} holds token ids '
                      f'beside {paths[others[0]]}; set it to the tokenizer of these ids (a tokenizer.json, a .model or '
                      'tiktoken:NAME), which encodes the texts too, or leave one of the two out')
  if 'uint8' in (dtypes[name] for name in corpora):
    raise ConfigError(f'config.data.tokenizer: {config.tokenizer} is fitted to texts, but {paths[ids[0]]} is read as '
                      'bytes; set it to byte, or config.data.format to text')
  return True


def store_recipes(config: DataConfig) -> dict[str, StoreRecipe]:
  """The recipe of each source's store; prepared stores and .bin files have none. Raises what open_data raises."""
  return _open_sources(config)[2]


def _bins(config: DataConfig, source: SourceConfig) -> dict[str, TokenFile] | None:
  """The .bin files of each split, if the path is a .bin file or a folder with train.bin; else None."""
  path = source.path
  if is_url(path) and path.endswith('.bin'):
    files = locate(source, cache_dir(config), LeftOut())
    if len(files) > 1:
      return None
    path = str(files[0].path)
  root = Path(path).expanduser()
  paths = {'val': source.val_path, 'test': source.test_path}
  if (root / 'train.bin').is_file():
    paths = {split: found or str(root / f'{split}.bin') for split, found in paths.items()
             if found or (root / f'{split}.bin').is_file()}
    root /= 'train.bin'
  elif not root.exists() and Path(f'{root}.bin').is_file() and Path(f'{root}.idx').is_file():
    root = Path(f'{root}.bin')  # Megatron names the two files by what they share
  elif root.suffix != '.bin' or source.format not in ('auto', 'bin'):
    return None
  refuse_pointers([root, *(Path(p).expanduser() for p in paths.values() if p)])
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
  if find_prepared(config, source):
    raise DataError(f'--data: {shown(path)} is a prepared store; give the texts or ids that it was made from')
  if bins := _bins(config, source):
    val = mapped_store(bins['train'], source.eot_id if tokenizer is None else tokenizer.bos_id)
  else:
    corpus = Corpus(path, (('val', open_source(source, cache_dir(config))),), SplitConfig('document'), FilterConfig(),
                    config.on_bad_record, config.max_bad_fraction, getattr(tokenizer, 'template', None))
    check_conversations(config, {'data': corpus}, '--data')
    if tokenizer is None and corpus.dtype_of_ids() is None:
      raise DataError(f'--data: {path} is text, but the run has no tokenizer')
    val = memory_stores((pair for _, dealt in corpus.documents() for pair in dealt), ('val',), tokenizer,
                        encoder_tokenizer)['val']
  if len(val.tokens) < 2:
    raise DataError(f'--data: {path} gives {len(val.tokens)} token(s); it needs 2 or more')
  data = data_of(config, {'train': {}, 'val': {'data': val}, 'test': {}}, tokenizer, encoder_tokenizer)
  if encoder_tokenizer is not None:  # two vocabularies: the ids fit their tokenizers
    return data
  return dataclasses.replace(data, vocab_size=max(data.vocab_size, max_id(val) + 1))


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
