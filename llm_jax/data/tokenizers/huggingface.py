"""Hugging Face tokenizers: any tokenizer.json, and byte-level BPE trained here and saved as tokenizer.json."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tokenizers

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.tokenizers import bpe
from llm_jax.data.tokenizers.bpe import empty_table, utf8

EOT = '<|endoftext|>'

# Usual names of (bos, eos); the first pair in a vocabulary is used.
SPECIALS = (
    (EOT, EOT), ('<|begin_of_text|>', '<|end_of_text|>'), ('<s>', '</s>'), ('<bos>', '<eos>'), ('[CLS]', '[SEP]'),
    ('[BOS]', '[EOS]'), ('<|im_start|>', '<|im_end|>'),
    ('<\uff5cbegin\u2581of\u2581sentence\uff5c>', '<\uff5cend\u2581of\u2581sentence\uff5c>'),
    ('</s>', '</s>'), ('<eos>', '<eos>'))


class HuggingFaceTokenizer:
  """A tokenizer.json; encodes with tiktoken if it is byte-level BPE with provably the same ids.

  A special token that a text spells is plain text; `parsing_special_tokens` makes a tokenizer to which it is the token.
  `ends` are the spellings of bos and eos; None: the first pair of SPECIALS in the vocabulary.
  """

  def __init__(self, text: str, parse: bool = False, ends: tuple[str, str] | None = None):
    self._model = _whole_and_deterministic(tokenizers.Tokenizer.from_str(text))
    self.leads = True  # whether the model's texts begin with bos; see infer/text.py
    vocab = self._model.get_vocab()
    self.token_bytes = empty_table(max(vocab.values(), default=-1) + 1)
    spec = json.loads(self._model.to_str())  # with all keys, including those missing in `text`
    usual = next((pair for pair in SPECIALS if set(pair) <= set(vocab)), None)
    pair = ends or usual
    self._ends = None if pair == usual else pair
    if pair is None:
      raise ConfigError('the tokenizer has no bos token: none of '
                        f'{", ".join(dict.fromkeys(first for first, _ in SPECIALS))} is in its vocabulary; add one')
    self.bos_id, self.eos_id = vocab[pair[0]], vocab[pair[1]]

    model = spec['model']
    unknown = model['vocab'][model['unk_id']][0] if model.get('unk_id') is not None else model.get('unk_token')
    special = {*pair, *(token['content'] for token in spec['added_tokens'] if token['special'])} - {unknown}
    spelled = {*special, *(token['content'] for token in spec['added_tokens'] if token['special'])}
    self._spelled = re.compile('|'.join(map(re.escape, spelled)))
    self._parse = parse
    self._special = special
    bytes_of = _spelling(spec)
    plain = {token['content'] for token in spec['added_tokens']}  # added tokens are their own text
    for token, i in vocab.items():
      if token not in special and token != unknown:
        self.token_bytes[i] = token.encode() if token in plain else bytes_of(token)
    ranks = bpe.merge_ranks(spec)
    self._fast = bpe.open_bpe(ranks, bpe.pattern_of(spec) or '') if ranks else None

  @functools.cached_property
  def _plain(self) -> tokenizers.Tokenizer:
    """The tokenizer without the spellings of special tokens."""
    spec = _without_spelling(json.loads(self._model.to_str()), self._special)
    model = _whole_and_deterministic(tokenizers.Tokenizer.from_str(json.dumps(spec)))
    model.encode_special_tokens = True  # the unknown token, which keeps its spelling
    return model

  def parsing_special_tokens(self) -> HuggingFaceTokenizer:
    """The tokenizer for which a special token that a text spells is that token."""
    return HuggingFaceTokenizer(self._model.to_str(), True, self._ends)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    if self._parse:
      return [self._encode(self._model, [text])[0] if self._spelled.search(text) else self._encode_plain([text])[0]
              for text in texts]
    return self._encode_plain(texts)

  def _encode_plain(self, texts: list[str]) -> list[np.ndarray]:
    return bpe.encode(self._fast, texts) if self._fast is not None else self._encode(self._plain, texts)

  def _encode(self, model: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
    for text in texts:
      utf8(text)
    try:
      return [np.array(e.ids, np.uint32) for e in model.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as e:  # the library raises no narrower type
      raise DataError(f'the tokenizer cannot encode a text: {e}') from None

  def to_json(self) -> str:
    """The tokenizer.json; with other ends than the usual ones, inside of what `open_ends` reads."""
    text = self._model.to_str()
    return text if self._ends is None else json.dumps(
        {'type': 'huggingface', 'ends': self._ends, 'tokenizer': json.loads(text)}, ensure_ascii=False)

  def to_library_json(self) -> str:
    """The tokenizer.json as the library reads it."""
    return self._model.to_str()

  def begins_with_bos(self) -> bool:
    """Whether the tokenizer itself begins texts with bos, when special tokens are asked for."""
    ids = self._model.encode('a', add_special_tokens=True).ids
    return bool(ids) and ids[0] == self.bos_id

  @property
  def special_tokens(self) -> dict[str, int]:
    """Ids of the special tokens that `parse` finds in texts."""
    added = self._model.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}

  def with_special_tokens(self, tokens: list[str]) -> HuggingFaceTokenizer:
    """The tokenizer with these special tokens at the end of its vocabulary."""
    model = tokenizers.Tokenizer.from_str(self._model.to_str())
    model.add_special_tokens(tokens)
    return HuggingFaceTokenizer(model.to_str(), ends=self._ends)

  def name_of(self, token: int) -> str:
    """The spelling of a special token."""
    return self._model.id_to_token(token) or ''

  @functools.cached_property
  def _parser(self) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(self._model.to_str())  # without encode_special_tokens, which is not saved

  def parse(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, their characters [n, 2]) of texts in which spellings of special tokens are these tokens."""
    for text in texts:
      utf8(text)
    return [(np.array(e.ids, np.uint32), np.array(e.offsets, np.int64).reshape(-1, 2))
            for e in self._parser.encode_batch(texts, add_special_tokens=False)]


class Bpe:
  """The tokenizer `bpe`."""

  @staticmethod
  def fit(texts: Iterable[str], vocab_size: int, min_frequency: int) -> HuggingFaceTokenizer:
    """Byte-level BPE (arXiv 1508.07909): merges the most frequent pairs until there are `vocab_size` tokens.

    The time to train is quadratic in the length of a word, so longer words are cut; to encode it is linear.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = _words(bpe.SHORT_WORDS)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[EOT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(texts, trainer)
    model.pre_tokenizer = _words(bpe.WORDS)
    return HuggingFaceTokenizer(model.to_str())

  @staticmethod
  def from_json(spec: dict) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(spec))


def _words(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
  """Splits a text into the matches of the pattern, spelled in GPT-2's alphabet of bytes."""
  splitter = tokenizers.pre_tokenizers
  return splitter.Sequence([splitter.Split(tokenizers.Regex(pattern), 'isolated'),
                            splitter.ByteLevel(add_prefix_space=False, use_regex=False)])


def _whole_and_deterministic(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """The model, which then encodes every text completely and the same way each time."""
  model.no_truncation()
  model.no_padding()
  if getattr(model.model, 'dropout', None):
    model.model.dropout = None
  return model


def _without_spelling(spec: dict, special: set[str]) -> dict:
  """The tokenizer.json with special tokens named so that no text and no merge can give them; the ids stay the same."""
  def renamed(token: str) -> str:
    return f'\ufdd0{token}\ufdd1' if token in special else token

  model = dict(spec['model'])
  vocab = model['vocab']
  model['vocab'] = ({renamed(token): i for token, i in vocab.items()} if isinstance(vocab, dict) else
                    [[renamed(token), *score] for token, *score in vocab])
  if 'merges' in model:
    pairs = [pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges']]
    model['merges'] = [[left, right] for left, right in pairs if not {left, right, left + right} & special]
  added = [token | {'content': renamed(token['content'])} for token in spec['added_tokens']]
  return spec | {'model': model, 'added_tokens': added, 'post_processor': None}


def _spelling(spec: dict) -> Callable[[str], bytes]:
  """Maps a token to its bytes: by GPT-2's alphabet; WordPiece's ## inside words; or U+2581 for space and <0xNN>."""
  model, byte_of = spec['model'], bpe.byte_alphabet()
  if '"type": "ByteLevel"' in json.dumps([spec[name] for name in ('normalizer', 'pre_tokenizer', 'decoder')]):
    return lambda token: bytes(byte_of[c] for c in token) if set(token) <= set(byte_of) else token.encode()
  if model['type'] in ('WordPiece', 'WordLevel'):
    inside = model.get('continuing_subword_prefix') or '\0'
    return lambda token: token.removeprefix(inside).encode() if token.startswith(inside) else f' {token}'.encode()
  suffix = model.get('end_of_word_suffix') or '\0'

  def plain(token: str) -> bytes:
    if re.fullmatch('<0x[0-9A-F]{2}>', token):
      return bytes([int(token[3:5], 16)])
    return token.replace('\u2581', ' ').replace(suffix, ' ').encode()

  return plain


def ends_beside(path: Path) -> tuple[str, str] | None:
  """The spellings of (bos, eos) in the tokenizer_config.json of transformers beside a tokenizer.json; None without one.

  A tokenizer without bos begins documents with eos. Raises DataError.
  """
  beside = path.with_name('tokenizer_config.json')
  try:
    values = json.loads(beside.read_text(encoding='utf-8')) if beside.is_file() else {}
  except (OSError, ValueError) as e:
    raise DataError(f'{beside}: cannot be read: {e}') from None
  if not isinstance(values, dict) or 'tokenizer_class' not in values:  # the file of a run of ours, with a chat template
    return None
  bos, eos = (str((token.get('content') if isinstance(token := values.get(name), dict) else token) or '')
              for name in ('bos_token', 'eos_token'))
  return (bos or eos, eos or bos) if bos or eos else None
