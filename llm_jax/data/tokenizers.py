"""Tokenizers: byte, char (fitted), bpe (trained here by Hugging Face `tokenizers`). All are lossless.

Every tokenizer has one special token, which opens each document and so also ends the one before it. Each id stands
for fixed bytes (`token_bytes`), so text is the join of bytes, and bits per byte are exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

from llm_jax.errors import DataError

EOT = '<|endoftext|>'


class Tokenizer(Protocol):
  eot_id: int
  token_bytes: list[bytes]  # by id; the special token has none

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text, without the special token, whatever the text holds."""
    ...

  def to_json(self) -> str: ...


class ByteTokenizer:
  """One token a byte of UTF-8."""

  def __init__(self):
    self.token_bytes = [bytes([i]) for i in range(256)] + [b'']
    self.eot_id = 256

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), np.uint8) for text in texts]

  def to_json(self) -> str:
    return json.dumps({'type': 'byte'})


class CharTokenizer:
  """One token a character of the corpus that it was fitted to, by code point."""

  def __init__(self, chars: Iterable[str]):
    self.chars = sorted(chars)
    self.token_bytes = [c.encode() for c in self.chars] + [b'']
    self.eot_id = len(self.chars)
    self._codes = np.array([ord(c) for c in self.chars], np.uint32)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    ids = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
    unknown = codes[self._codes[ids] != codes]
    if unknown.size:
      raise DataError(f'character {chr(unknown[0])!r} is not among the {len(self.chars)} that the char tokenizer knows')
    return ids

  def to_json(self) -> str:
    return json.dumps({'type': 'char', 'chars': ''.join(self.chars)})


class BPETokenizer:
  """Byte-level BPE (arXiv 1508.07909, GPT-2's bytes): any text, no unknown token."""

  def __init__(self, model: tokenizers.Tokenizer):
    self._model = model
    # Text that spells the special token is text, never the token itself.
    model.encode_special_tokens = True
    eot_id = model.token_to_id(EOT)
    if eot_id is None:
      raise DataError(f'the tokenizer has no {EOT} token')
    self.eot_id = eot_id
    byte_of = _byte_alphabet()
    self.token_bytes = [b''] * model.get_vocab_size()
    for token, i in model.get_vocab().items():
      if i != self.eot_id:
        self.token_bytes[i] = bytes(byte_of[c] for c in token)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [np.array(e.ids, np.int64) for e in self._model.encode_batch_fast(texts, add_special_tokens=False)]

  def to_json(self) -> str:
    return self._model.to_str()


def _byte_alphabet() -> dict[str, int]:
  """GPT-2's spelling of bytes in vocabularies: printable ones as themselves, the rest from U+0100 on, in order."""
  printable = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
  rest = [b for b in range(256) if b not in printable]
  return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


def train_byte(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  del texts, vocab_size
  return ByteTokenizer()


def train_char(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  del vocab_size
  return CharTokenizer(set().union(*map(set, texts)))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Merges the most frequent pairs of `texts` until the vocabulary has `vocab_size` tokens."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=[EOT], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  model.train_from_iterator(texts, trainer)
  return BPETokenizer(model)


# name -> function (texts, vocab_size) -> Tokenizer
TOKENIZERS: dict[str, Callable[[Iterable[str], int], Tokenizer]] = {
    'byte': train_byte,
    'char': train_char,
    'bpe': train_bpe,
}


def load_tokenizer(path: Path) -> Tokenizer:
  """What `to_json` wrote: {"type": "byte" | "char"}, or a Hugging Face tokenizer.json of a byte-level BPE."""
  text = path.read_text(encoding='utf-8')
  spec = json.loads(text)
  if spec.get('type') == 'byte':
    return ByteTokenizer()
  if spec.get('type') == 'char':
    return CharTokenizer(spec['chars'])
  return BPETokenizer(tokenizers.Tokenizer.from_str(text))


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
  """Text of the ids; a sequence cut inside a character ends in U+FFFD."""
  return b''.join(tokenizer.token_bytes[int(i)] for i in ids).decode('utf-8', errors='replace')
