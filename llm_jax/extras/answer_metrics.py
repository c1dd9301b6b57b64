"""Metrics of generated answers: BLEU by sacrebleu, and precision, recall and F1 of words as in SQuAD."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import register
from llm_jax.losses.metrics import ANSWER_METRICS


class Bleu:
  """Corpus BLEU (Papineni et al. 2002), from 0 to 100, as sacrebleu computes it."""

  def __init__(self, tokenize: Literal['13a', 'intl', 'char', 'none'] = '13a'):
    try:
      from sacrebleu.metrics import BLEU
    except ImportError:
      raise ConfigError("config.eval.answer_metrics: bleu needs sacrebleu: pip install 'llm_jax[metrics]'") from None
    self._bleu = BLEU(tokenize=tokenize)

  def __call__(self, answers: Sequence[Any]) -> float:
    return self._bleu.corpus_score([a.given for a in answers], [[a.expected for a in answers]]).score


def words(text: str) -> Counter[str]:
  """The number of times that each word and each punctuation mark occurs."""
  return Counter(re.findall(r'\w+|[^\w\s]', text))


def ratio(part: int, whole: int, other: int) -> float:
  """part / whole; of nothing, 1 if there was nothing to find (`other` is 0), else 0."""
  return part / whole if whole else float(not other)


def word_precision(answers: Sequence[Any]) -> float:
  """The share of an answer's words that the expected one has too; the mean over answers."""
  return float(np.mean([ratio(*overlap(a.given, a.expected)) for a in answers]))


def word_recall(answers: Sequence[Any]) -> float:
  """The share of an expected answer's words that the answer has too; the mean over answers."""
  return float(np.mean([ratio(*overlap(a.expected, a.given)) for a in answers]))


def word_f1(answers: Sequence[Any]) -> float:
  """2 * common / (words of the answer + words of the expected one), as in SQuAD (arXiv 1606.05250); the mean."""
  counts = [overlap(a.given, a.expected) for a in answers]
  return float(np.mean([ratio(2 * common, given + expected, given + expected) for common, given, expected in counts]))


def overlap(one: str, other: str) -> tuple[int, int, int]:
  """(words in common, words of the one, words of the other), each as often as it occurs."""
  a, b = words(one), words(other)
  return (a & b).total(), a.total(), b.total()


register(ANSWER_METRICS, 'bleu', Bleu)
for _metric in (word_precision, word_recall, word_f1):
  register(ANSWER_METRICS, _metric.__name__, _metric)
