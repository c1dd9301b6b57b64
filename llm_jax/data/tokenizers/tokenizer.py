"""Tokenizers by name: some are fitted to a corpus, as byte, char and bpe; others are opened from files or by name.

Every tokenizer starts a document with `bos_id` and ends it with `eos_id`; they are equal if there is one special token.
Each id has fixed bytes (`token_bytes`), so the bytes of text per token are known for any tokenizer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llm_jax.base.builder import known_names
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, Registry, register, settings_from_signature
from llm_jax.data.tokenizers.bpe import utf8
from llm_jax.data.tokenizers.bpe_files import digest_beside, is_vocab, read_bpe_files
from llm_jax.data.tokenizers.huggingface import Bpe, HuggingFaceTokenizer, ends_beside


class Tokenizer(Protocol):
  bos_id: int
  eos_id: int  # equal to bos_id if there is one special token
  token_bytes: list[bytes]  # by id; special tokens have none

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text, never special tokens, even if the text spells one. Raises DataError."""
    ...

  def to_json(self) -> str:
    """Everything that `load_tokenizer` needs, without other files or a network: "type": NAME and what it adds."""
    ...


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """How a tokenizer is fitted; byte and char have no settings."""

  vocab_size: int = 8192  # bpe: number of ids; word: maximum
  min_frequency: int = 1  # bpe: of a pair to be merged; word: of a word to be in the vocabulary
  pattern: str | None = None  # word: the regular expression whose matches are words
  own: Any = None  # the settings of an entry of TOKENIZERS that has some


class ByteTokenizer:
  """One token per byte of UTF-8."""

  def __init__(self) -> None:
    self.token_bytes = [bytes([i]) for i in range(256)] + [b'']
    self.bos_id = self.eos_id = 256

  @classmethod
  def fit(cls, texts: Iterable[str]) -> ByteTokenizer:
    return cls()

  @classmethod
  def from_json(cls, spec: dict) -> ByteTokenizer:
    return cls()

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(utf8(text), np.uint8) for text in texts]

  def to_json(self) -> str:
    return json.dumps({'type': 'byte'})


class CharTokenizer:
  """One token per character of the corpus that it was fitted to, ordered by code point."""

  def __init__(self, chars: Iterable[str]):
    self.chars = sorted(chars)
    self.token_bytes = [utf8(c) for c in self.chars] + [b'']
    self.bos_id = self.eos_id = len(self.chars)
    # Id by code point, up to one above the highest known; unknown characters have the special token's id.
    codes = np.array([ord(c) for c in self.chars], np.int64)
    self._ids = np.full(codes.max(initial=-1) + 2, self.bos_id, np.uint32)
    self._ids[codes] = np.arange(len(codes))

  @classmethod
  def fit(cls, texts: Iterable[str]) -> CharTokenizer:
    return cls(set[str]().union(*texts))

  @classmethod
  def from_json(cls, spec: dict) -> CharTokenizer:
    return cls(spec['chars'])

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
    ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
    unknown = np.flatnonzero(ids == self.bos_id)
    if unknown.size:
      raise DataError(f'character {text[unknown[0]]!r} at position {unknown[0]} of a text is not among the '
                      f'{len(self.chars)} characters of the tokenizer')
    return ids

  def to_json(self) -> str:
    return json.dumps({'type': 'char', 'chars': ''.join(self.chars)})


class ExtendedTokenizer:
  """A tokenizer with special tokens at the end of its vocabulary."""

  def __init__(self, base: Tokenizer, tokens: list[str]):
    self.base, self.bos_id, self.eos_id, self.encode = base, base.bos_id, base.eos_id, base.encode
    first = len(base.token_bytes)
    self.special_tokens = {token: first + i for i, token in enumerate(tokens)}
    self.token_bytes = [*base.token_bytes, *[b''] * len(tokens)]

  def to_json(self) -> str:
    return json.dumps({'type': 'extended', 'special_tokens': list(self.special_tokens),
                       'base': json.loads(self.base.to_json())}, ensure_ascii=False)


class Kind(NamedTuple):
  """A kind of tokenizer that is fitted to texts."""

  fit: Callable[[Iterable[str], TokenizerConfig], Tokenizer]  # reads the texts once
  from_json: Callable[[dict], Tokenizer]  # of what `to_json` saved with "type": NAME


# Tokenizers made elsewhere: classes with open(name), for the config's NAME:name or a file with one of the ENDINGS, and
# from_json(spec).
OPENED = Registry('opened_tokenizer')
ENDINGS = {'.model': 'sentencepiece'}
COMMON = tuple(field.name for field in dataclasses.fields(TokenizerConfig) if field.name != 'own')


def adapt_tokenizer(name: str, value: Any, settings: type | None) -> tuple[Kind, type]:
  """A class with fit(texts, **settings) and from_json(spec) as a Kind.

  `fit` receives those of vocab_size, min_frequency and pattern that it names; its other parameters with plain
  defaults are the settings.
  """
  if not (hasattr(value, 'fit') and hasattr(value, 'from_json')) or name in ('none', *OPENED):
    raise ConfigError(f'tokenizer {name!r}: needs fit(texts) and from_json(spec), and a name other than '
                      f'none, {", ".join(OPENED)}')
  common = [field for field in COMMON if field in inspect.signature(value.fit).parameters]

  def fit(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    own = {} if config.own is None else vars(config.own)
    return value.fit(texts, **{field: getattr(config, field) for field in common}, **own)

  return Kind(fit, value.from_json), settings or settings_from_signature(value.fit, COMMON)


# Classes with fit(texts) and from_json(spec), both of which return a Tokenizer. A bpe is saved as a Hugging Face
# tokenizer.json, which has no "type".
TOKENIZERS = Registry('tokenizer', adapt_tokenizer)
for _name, _kind in (('byte', ByteTokenizer), ('char', CharTokenizer), ('bpe', Bpe)):
  register(TOKENIZERS, _name, _kind, NoSettings)


def open_tokenizer(name: str) -> Tokenizer:
  """A tokenizer.json, or a vocab.json with merges.txt, or one of OPENED by a file's ending or as tiktoken:NAME.

  Raises ConfigError, DataError.
  """
  kind, _, rest = name.partition(':')
  path = Path(name).expanduser()
  if kind in OPENED:
    return OPENED[kind].open(rest)
  if path.suffix == '.json':
    return load_tokenizer(path)
  if path.suffix in ENDINGS:
    return OPENED[ENDINGS[path.suffix]].open(name)
  raise ConfigError(f'tokenizer {name!r} is not a path to a tokenizer.json, a vocab.json with merges.txt or a '
                    f'SentencePiece *.model, tiktoken:NAME, nor a name; {known_names(name, TOKENIZERS)}')


def identity(name: str) -> str:
  """The identity of a tokenizer, without opening it: the sha256 of its file, or its name. Raises DataError."""
  if name in TOKENIZERS or name.partition(':')[0] in OPENED:
    return name
  path = Path(name).expanduser()
  try:
    with open(path, 'rb') as f:
      digest = hashlib.file_digest(f, 'sha256').hexdigest()
    if is_vocab(path):
      return f'{digest} {digest_beside(path)}'
    ends = ends_beside(path) if path.suffix == '.json' else None
    return digest if ends is None else f'{digest} {" ".join(ends)}'
  except OSError as e:
    raise DataError(f'{path}: the tokenizer cannot be read: {e.strerror}') from None


def load_tokenizer(path: Path) -> Tokenizer:
  """The tokenizer that `to_json` saved, by its "type"; without one, a Hugging Face tokenizer.json.

  A vocab.json with merges.txt beside it is read as the tokenizer.json that they mean. Raises ConfigError, DataError.
  """
  try:
    spec = json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise DataError(f'{path}: the tokenizer cannot be read: {e.strerror}') from None
  except ValueError as e:
    raise DataError(f'{path}: not a tokenizer: not JSON ({e})') from None
  try:
    if is_vocab(path):
      text, ends = read_bpe_files(path)
      return _from_json(json.loads(text), ends)
    return _from_json(spec, ends_beside(path))
  except (DataError, ConfigError) as e:
    raise type(e)(f'{path}: {e}') from None
  except Exception as e:  # libraries raise many types for damaged files
    raise DataError(f'{path}: not a tokenizer that can be used ({type(e).__name__}: {e}); copy it again from its '
                    'origin') from None


def _from_json(spec: Any, ends: tuple[str, str] | None = None) -> Tokenizer:
  kind = spec.get('type') if isinstance(spec, dict) else None
  for registry in (TOKENIZERS, OPENED):
    if isinstance(kind, str) and kind in registry:
      return registry[kind].from_json(spec)
  if kind == 'extended':
    return ExtendedTokenizer(_from_json(spec['base']), spec['special_tokens'])
  if kind == 'huggingface':
    return HuggingFaceTokenizer(json.dumps(spec['tokenizer']), ends=tuple(spec['ends']))
  if isinstance(spec, dict) and kind is None and 'model' in spec:
    entries = spec['model'].get('vocab', ())  # a dict, or pairs of token and score
    vocab = {entry if isinstance(entry, str) else entry[0] for entry in entries}
    vocab |= {token['content'] for token in spec.get('added_tokens', ())}
    return HuggingFaceTokenizer(json.dumps(spec), ends=ends if ends and set(ends) <= vocab else None)
  known = ', '.join([*TOKENIZERS, *OPENED, 'extended', 'huggingface'])
  raise DataError(f'not a tokenizer: a saved one has a "type", one of {known}, but this has {kind!r}; '
                  'a Hugging Face tokenizer.json has a "model" instead')


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
  """Ids that end a generated text: eos, the eos of the tokenizer under a chat template, and `other_ends` if it has any.

  `other_ends` are the further eos_token_ids of a published model.
  """
  base = getattr(tokenizer, 'base', tokenizer)
  return frozenset({tokenizer.eos_id, base.eos_id, *getattr(tokenizer, 'other_ends', ())})


def before_eos(tokenizer: Tokenizer, row: list[int]) -> list[int]:
  """The ids before the first of `stop_ids`."""
  stops = stop_ids(tokenizer)
  return list(itertools.takewhile(lambda i: i not in stops, row))


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
  """Text of the ids; a sequence cut inside a character ends in U+FFFD. Raises DataError."""
  ids = [int(i) for i in ids]
  size = len(tokenizer.token_bytes)
  if ids and not 0 <= min(ids) <= max(ids) < size:
    wrong = next(i for i in ids if not 0 <= i < size)
    raise DataError(f'token id {wrong} is not in the tokenizer\'s range, 0 to {size - 1}')
  return b''.join(tokenizer.token_bytes[i] for i in ids).decode('utf-8', errors='replace')
