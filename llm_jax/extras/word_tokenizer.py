"""Words found by a regular expression and fitted to a corpus; unknown words become <unk>."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.tokenizers.bpe import utf8
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS

SPECIALS = ('<pad>', '<bos>', '<eos>', '<unk>')  # ids 0 to 3; words follow
UNK = 3

# A name or word, a digit or a mark, each with the space before it; a newline with the next line's indentation; other
# space. Every character is in one match. Digits are single words, as most numbers would be <unk>.
PATTERN = r' ?[^\W\d]\w*| ?\d| ?[^\w\s]|\n[ \t]*|[^\S\n]+'


class WordTokenizer:
  """One id per word, in order of falling frequency."""

  def __init__(self, words: list[str], pattern: str):
    self.words, self.pattern = words, pattern
    self.bos_id, self.eos_id = 1, 2
    self.token_bytes = [b''] * len(SPECIALS) + [utf8(word) for word in words]
    self._regex = _compiled(pattern)
    self._ids = _Ids((word, i) for i, word in enumerate(words, len(SPECIALS)))

  @classmethod
  def fit(cls, texts: Iterable[str], vocab_size: int, min_frequency: int, pattern: str | None) -> WordTokenizer:
    """The words that occur `min_frequency` times or more, most frequent first, ties by text, `vocab_size` at most."""
    if vocab_size <= len(SPECIALS):
      raise ConfigError(f'vocab_size={vocab_size} leaves no word beside {", ".join(SPECIALS)}; set 5 or more')
    regex = _compiled(pattern or PATTERN)
    counts: Counter[str] = Counter()
    for text in texts:
      counts.update(regex.findall(text))
    counts.pop('', None)
    known = [word for word, count in counts.items() if count >= min_frequency]
    known.sort(key=lambda word: (-counts[word], word))
    return cls(known[:vocab_size - len(SPECIALS)], regex.pattern)

  @classmethod
  def from_json(cls, spec: dict) -> WordTokenizer:
    return cls(spec['words'], spec['pattern'])

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    ids, words = self._ids.__getitem__, self._regex.findall
    return [np.fromiter(map(ids, words(text)), np.uint32) for text in texts]

  def to_json(self) -> str:
    return json.dumps({'type': 'word', 'pattern': self.pattern, 'words': self.words}, ensure_ascii=False)


class _Ids(dict):
  def __missing__(self, word: str) -> int:
    return UNK


def _compiled(pattern: str) -> re.Pattern[str]:
  try:
    regex = re.compile(pattern)
  except re.error as e:
    raise ConfigError(f'pattern {pattern!r} is not a regular expression: {e}') from None
  if regex.groups:
    raise ConfigError(f'pattern {pattern!r} has a group: write (?:...) instead of (...)')
  return regex


register(TOKENIZERS, 'word', WordTokenizer, NoSettings)
