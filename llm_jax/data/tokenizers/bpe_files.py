"""Byte-level BPE in older files of transformers, vocab.json and merges.txt, as the tokenizer.json that they mean."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from llm_jax.base.errors import ConfigError, DataError

VOCAB, MERGES = 'vocab.json', 'merges.txt'
BESIDE = (MERGES, 'added_tokens.json', 'special_tokens_map.json', 'tokenizer_config.json')
EOT = '<|endoftext|>'
# Words of Qwen2, of which digits stand alone; those of GPT-2 are the library's own.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
# The class of a tokenizer_config.json that names none, by the model_type in config.json.
CLASSES = {'gpt2': 'GPT2Tokenizer', 'starcoder2': 'GPT2Tokenizer', 'qwen2': 'Qwen2Tokenizer', 'qwen3': 'Qwen2Tokenizer'}


class BpeFiles(NamedTuple):
  """What the files say."""

  text: str  # the tokenizer.json
  ends: tuple[str, str]  # spellings of bos and eos


def is_vocab(path: Path) -> bool:
  """Whether a file is a vocab.json with merges.txt beside it."""
  return path.name == VOCAB and path.with_name(MERGES).is_file()


def digest_beside(path: Path) -> str:
  """The sha256 of the files beside a vocab.json that its tokenizer depends on. Raises OSError."""
  found = hashlib.sha256(_class_of(path, _read(path, 'tokenizer_config.json')).encode())
  for name in BESIDE:
    if path.with_name(name).is_file():
      found.update(f'{name}\0'.encode() + path.with_name(name).read_bytes())
  return found.hexdigest()


def read_bpe_files(path: Path) -> BpeFiles:
  """Reads the tokenizer of a vocab.json. Raises ConfigError for one of another kind, DataError."""
  config = _read(path, 'tokenizer_config.json')
  kind = _class_of(path, config).removesuffix('Fast')
  if kind not in ('GPT2Tokenizer', 'Qwen2Tokenizer'):
    raise ConfigError(f'its tokenizer is a {kind or "tokenizer of unknown class"}; of {VOCAB} with {MERGES} only '
                      'GPT2Tokenizer and Qwen2Tokenizer can be read; save it as tokenizer.json by transformers: '
                      'AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)')
  is_qwen2 = kind == 'Qwen2Tokenizer'
  named = _named_tokens(_read(path, 'special_tokens_map.json') | config)
  defaults = {'unk_token': EOT, 'eos_token': EOT} | ({'pad_token': EOT} if is_qwen2 else {'bos_token': EOT})
  named = {name: token for name, token in (defaults | named).items() if token}
  bos, eos = named.get('bos_token') or named['eos_token'], named.get('eos_token') or named['bos_token']
  library = _library(path, is_qwen2, prefix=bool(config.get('add_prefix_space')))
  _add_tokens(path, library, config, {*named.values()})
  begins = [(f'{bos} ', bos)] if config.get('add_bos_token') else []
  ends = [(f' {eos}', eos)] if config.get('add_eos_token') else []
  if begins or ends:
    before, after = ''.join(text for text, _ in begins), ''.join(text for text, _ in ends)
    library.post_processor = processors.TemplateProcessing(
        single=f'{before}$A{after}', pair=f'{before}$A{after} {before}$B{after}',
        special_tokens=[(token, library.token_to_id(token)) for _, token in begins + ends])
  return BpeFiles(library.to_str(), (bos, eos))


def _library(path: Path, is_qwen2: bool, prefix: bool) -> tokenizers.Tokenizer:
  """The tokenizer without added tokens."""
  try:
    vocab, merges = tokenizers.models.BPE.read_file(str(path), str(path.with_name(MERGES)))
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
  except Exception as e:  # the library raises no narrower type
    raise DataError(f'with {MERGES} no tokenizer that can be used ({e}); copy both again from their origin') from None
  library.decoder = tokenizers.decoders.ByteLevel()
  letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not is_qwen2)
  library.pre_tokenizer = letters
  if is_qwen2:
    library.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), 'isolated')
    library.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
  return library


def _add_tokens(path: Path, library: tokenizers.Tokenizer, config: dict[str, Any], special: set[str]) -> None:
  """Adds tokens in the order of their ids: those of added_tokens_decoder, or of added_tokens.json, and special ones."""
  listed = config.get('added_tokens_decoder') or {
      str(i): {'content': token, 'special': token in special} for token, i in _read(path, 'added_tokens.json').items()}
  contents = {token['content'] for token in listed.values()}
  more = [token for token in sorted(special - contents) if library.token_to_id(token) is not None]
  listed = {int(i): token for i, token in listed.items()} | {
      library.token_to_id(token): {'content': token, 'special': True} for token in more}
  for i, token in sorted(listed.items()):
    flags = {name: bool(token[name]) for name in ('single_word', 'lstrip', 'rstrip') if name in token}
    is_special = bool(token.get('special')) or token['content'] in special
    added = tokenizers.AddedToken(token['content'], special=is_special,
                                  normalized=bool(token.get('normalized', not is_special)), **flags)
    (library.add_special_tokens if is_special else library.add_tokens)([added])
    if (got := library.token_to_id(token['content'])) != i:
      raise DataError(f'the files beside it add the token {token["content"]!r} with id {i}, but after the '
                      f'vocabulary it has {got}; copy them again from their origin')


def _named_tokens(values: dict[str, Any]) -> dict[str, str]:
  """{'bos_token': its spelling, ...} with '' for null, and entries for additional tokens."""
  found = {name: _content(value) for name, value in values.items() if name in (
      'bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')}
  more = values.get('extra_special_tokens') or values.get('additional_special_tokens') or []
  more = more.values() if isinstance(more, dict) else more
  return found | {f'additional {i}': _content(value) for i, value in enumerate(more)}


def _content(token: Any) -> str:
  return str((token.get('content') if isinstance(token, dict) else token) or '')


def _class_of(path: Path, config: dict[str, Any]) -> str:
  return str(config.get('tokenizer_class') or CLASSES.get(str(_read(path, 'config.json').get('model_type')), ''))


def _read(path: Path, name: str) -> dict[str, Any]:
  """The JSON object in a file beside a vocab.json; empty without one. Raises DataError."""
  beside = path.with_name(name)
  try:
    values = json.loads(beside.read_text(encoding='utf-8')) if beside.is_file() else {}
  except (OSError, ValueError, RecursionError) as e:
    raise DataError(f'{name}: cannot be read: {e}') from None
  if not isinstance(values, dict):
    raise DataError(f'{name}: must hold a JSON object')
  return values
