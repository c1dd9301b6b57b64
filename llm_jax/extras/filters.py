"""Quality filters on documents before they are stored: rules as in Gopher and C4.

A rule is a measure of the text and a limit. The rules are language independent, but words are divided by white space:
for scripts without it between words (Chinese, Japanese, Thai) leave the rules for words and n-grams off.
For documents of token ids, `min_chars` and `max_chars` count ids, and no other rule applies.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.base.registry import NoSettings, register
from llm_jax.data.loaders import RULES
from llm_jax.data.sources.documents import Content
from llm_jax.data.sources.filters import FilterConfig

# Rae et al. 2021, arXiv 2112.11446, appendix A.1.1: the quality rules (without the English stop words) and Table A1.
GOPHER = {
    'min_words': 50, 'max_words': 100_000,
    'min_mean_word_length': 3.0, 'max_mean_word_length': 10.0,
    'max_symbol_ratio': 0.1, 'max_bullet_lines': 0.9, 'max_ellipsis_lines': 0.3, 'min_letter_word_ratio': 0.8,
    'max_duplicate_line_ratio': 0.3, 'max_duplicate_line_char_ratio': 0.2,
    'max_duplicate_paragraph_ratio': 0.3, 'max_duplicate_paragraph_char_ratio': 0.2,
    'max_top_ngram_ratio': (0.20, 0.18, 0.16),
    'max_duplicate_ngram_ratio': (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
}
# Raffel et al. 2020, arXiv 1910.10683, section 2.2, keeps only lines that end in terminal punctuation, and pages with
# 3 sentences. Here lines are not removed; the share of such lines is limited instead, by FineWeb's 0.12 (Penedo et al.
# 2024, arXiv 2406.17557).
C4 = {'min_sentences': 3, 'min_terminal_lines': 0.12}

BULLETS = ('•', '‣', '▪', '●', '◦', '·', '-', '*', '–')  # noqa: RUF001
ELLIPSES = ('...', '…')
TERMINALS = ('.', '!', '?', '"', '”', '。', '！', '？', '」', '؟', '।')  # noqa: RUF001
# A mark before white space ends a sentence, a Chinese mark anywhere. The lookbehind keeps '.....x' in linear time.
SENTENCE = re.compile(r'(?<![.!?؟।])[.!?؟।]++["\'”’»)\]]*+(?!\S)|[。！？]+')  # noqa: RUF001


class _Text:
  """A text and values that several rules need, computed on first use."""

  def __init__(self, text: str):
    self.text = text

  @functools.cached_property
  def words(self) -> list[str]:
    return self.text.split()

  @functools.cached_property
  def num_visible(self) -> int:
    """Characters that are not white space."""
    return sum(map(len, self.words))

  @functools.cached_property
  def stripped(self) -> list[str]:
    return [line.strip() for line in self.text.split('\n')]

  @functools.cached_property
  def lines(self) -> list[str]:
    return [line for line in self.stripped if line]

  @functools.cached_property
  def paragraphs(self) -> list[str]:
    """Lines between blank lines."""
    return ['\n'.join(lines) for filled, lines in itertools.groupby(self.stripped, bool) if filled]

  @functools.cached_property
  def ngrams(self) -> _Ngrams:
    return _Ngrams(self.words)


class _Ngrams:
  """The n-grams of words that occur twice or more, for any n; those of n are searched among those of n - 1."""

  def __init__(self, words: list[str]):
    self.words = words
    self.ends = list(itertools.accumulate(map(len, words), initial=0))
    self.groups = [[list(range(len(words)))]]  # [n]: the starts of each repeated n-gram, ascending

  def repeated(self, n: int) -> list[list[int]]:
    while len(self.groups) <= n:
      offset, groups = len(self.groups) - 1, []
      words, num_starts = self.words, len(self.words) - offset
      for starts in self.groups[-1]:
        by_last = collections.defaultdict(list)
        for start in starts:
          if start < num_starts:
            by_last[words[start + offset]].append(start)
        groups += [group for group in by_last.values() if len(group) > 1]
      self.groups.append(groups)
    return self.groups[n]

  def covered(self, starts: list[int], n: int) -> int:
    """Characters in the n words from each start (ascending); overlaps count once."""
    total, reach, ends = 0, 0, self.ends
    for start in starts:
      total += ends[start + n] - ends[start if start > reach else reach]
      reach = start + n
    return total

  def top(self, n: int) -> int:
    """Characters covered by the n-gram that covers most."""
    return max((self.covered(group, n) for group in self.repeated(n)), default=0)

  def duplicated(self, n: int) -> int:
    """Characters in any n-gram that occurs twice or more."""
    return self.covered(sorted(itertools.chain.from_iterable(self.repeated(n))), n)


@functools.cache
def _letters() -> np.ndarray:
  """Which code points are letters, or marks on letters as in Hindi: bool [0x110000]."""
  return np.fromiter((unicodedata.category(chr(code))[0] in 'LM' for code in range(0x110000)), bool, 0x110000)


def _num_letters(t: _Text) -> int:
  codes = np.frombuffer(t.text.encode('utf-32-le', 'surrogatepass'), '<u4')
  return int(np.count_nonzero(_letters()[codes]))


def _share(part: float, whole: int) -> float:
  return part / whole if whole else 0.0


def _has_letter(word: str) -> bool:
  return word[0].isalpha() or any(map(str.isalpha, word))


def _line_share(t: _Text, holds: Callable[[str], bool]) -> float:
  return _share(sum(map(holds, t.lines)), len(t.lines))


def _repeats(items: list[str]) -> float:
  return _share(len(items) - len(set(items)), len(items))


def _repeated_chars(items: list[str]) -> float:
  total = sum(map(len, items))
  return _share(total - sum(map(len, set(items))), total)


# Rule -> its measure.
MEASURES: dict[str, Callable[[_Text, int], float | tuple[float, ...]]] = {
    'min_chars': lambda t, _: len(t.text),
    'max_chars': lambda t, _: len(t.text),
    'min_words': lambda t, _: len(t.words),
    'max_words': lambda t, _: len(t.words),
    'min_mean_word_length': lambda t, _: _share(t.num_visible, len(t.words)),
    'max_mean_word_length': lambda t, _: _share(t.num_visible, len(t.words)),
    'min_letter_ratio': lambda t, _: _share(_num_letters(t), t.num_visible),
    'min_letter_word_ratio': lambda t, _: _share(sum(map(_has_letter, t.words)), len(t.words)),
    'max_symbol_ratio': lambda t, _: _share(max(t.text.count('#'), sum(map(t.text.count, ELLIPSES))), len(t.words)),
    'max_bullet_lines': lambda t, _: _line_share(t, lambda line: line.startswith(BULLETS)),
    'max_ellipsis_lines': lambda t, _: _line_share(t, lambda line: line.endswith(ELLIPSES)),
    'min_terminal_lines': lambda t, _: _line_share(t, lambda line: line.endswith(TERMINALS)),
    'min_sentences': lambda t, _: sum(1 for _ in SENTENCE.finditer(t.text)),
    'max_duplicate_line_ratio': lambda t, _: _repeats(t.lines),
    'max_duplicate_line_char_ratio': lambda t, _: _repeated_chars(t.lines),
    'max_duplicate_paragraph_ratio': lambda t, _: _repeats(t.paragraphs),
    'max_duplicate_paragraph_char_ratio': lambda t, _: _repeated_chars(t.paragraphs),
    'max_top_ngram_ratio': lambda t, k: tuple(_share(t.ngrams.top(n), t.num_visible) for n in range(2, 2 + k)),
    'max_duplicate_ngram_ratio':
        lambda t, k: tuple(_share(t.ngrams.duplicated(n), t.num_visible) for n in range(5, 5 + k)),
}


class Quality:
  """The active rules of a config. Stateless: the result depends on the document alone."""

  def __init__(self, config: FilterConfig):
    self.limits = config.limits

  def reason(self, content: Content) -> str | None:
    """The config name of the first rule that drops the document; None: it is kept."""
    if isinstance(content, np.ndarray):
      lengths = {rule: limit for rule, limit in self.limits.items() if rule in ('min_chars', 'max_chars')}
      return next((rule for rule, limit in lengths.items() if _beyond(rule, content.size, limit)), None)
    text = _Text(content)
    for rule, limit in self.limits.items():
      if _beyond(rule, MEASURES[rule](text, len(limit) if isinstance(limit, tuple) else 0), limit):
        return rule
    return None


def _beyond(rule: str, value: Any, limit: Any) -> bool:
  if isinstance(limit, tuple):
    return any(v > most for v, most in zip(value, limit, strict=True))
  return value < limit if rule.startswith('min_') else value > limit


register(RULES, 'quality', lambda config: Quality(config).reason, NoSettings)
