"""BLEU, and precision, recall and F1 of words, of answers whose values were computed by hand or by sacrebleu."""

import sys

import numpy as np
import pytest

from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.config import Config
from llm_jax.infer.answers import Answer, answer_metrics, summarize_answers

PAIRS = [('the cat sat on the mat today', 'the cat sat on the mat today'),
         ('a dog runs, quickly', 'the dog runs quickly away now'), ('x', 'y')]
ANSWERS = [Answer('', expected, given, given == expected, 0.0, None) for given, expected in PAIRS]


def results(answers, *names, **settings):
  config = build(Config, {'eval': {'answer_metrics': names, **settings}}).eval
  return [summarize_answers(answers, config)[name] for name in names]


@pytest.mark.parametrize(('given', 'expected', 'values'), [
    ('b a a', 'a b c d', (2 / 3, 2 / 4, 4 / 7)),  # the second a is not in the expected answer
    ('f(x);', 'f(x);', (1, 1, 1)), ('x', 'y', (0, 0, 0)),
    ('', 'x', (0, 0, 0)), ('x', '', (0, 0, 0)), ('', '', (1, 1, 1))])
def test_word_overlap_by_hand(given, expected, values):
  answers = [Answer('', expected, given, False, 0.0, None)]
  assert results(answers, 'word_precision', 'word_recall', 'word_f1') == pytest.approx(values)


def test_word_overlap_is_the_mean_over_answers():
  each = [results([a], 'word_precision', 'word_recall', 'word_f1') for a in ANSWERS]
  assert results(ANSWERS, 'word_precision', 'word_recall', 'word_f1') == pytest.approx(np.mean(each, 0))
  assert each[1] == pytest.approx((3 / 5, 3 / 6, 6 / 11))


@pytest.mark.parametrize('tokenize', ['13a', 'char'])
def test_bleu_is_sacrebleus(tokenize):
  sacrebleu = pytest.importorskip('sacrebleu')
  expected = sacrebleu.corpus_bleu([given for given, _ in PAIRS], [[e for _, e in PAIRS]], tokenize=tokenize)
  [bleu] = results(ANSWERS, 'bleu', bleu={'tokenize': tokenize})
  assert bleu == expected.score and 0 < bleu < 100
  assert results(ANSWERS[:1], 'bleu') == [pytest.approx(100)]


def test_bleu_without_its_package_is_one_message(monkeypatch):
  monkeypatch.setitem(sys.modules, 'sacrebleu.metrics', None)
  config = build(Config, {'eval': {'answer_metrics': ['bleu']}}).eval
  with pytest.raises(ConfigError, match=r"answer_metrics: bleu needs sacrebleu: pip install 'llm_jax\[metrics\]'"):
    answer_metrics(config)


def test_unknown_names_and_settings_are_rejected():
  for values, words in (({'answer_metrics': ['blue']}, "answer_metrics names 'blue', which is unknown.*bleu"),
                        ({'answer_metrics': ['bleu'], 'bleu': {'tokenize': '14a'}}, r'eval\.bleu\.tokenize'),
                        ({'bleu': {'tokenize': 'char'}}, 'neither metrics nor answer_metrics names it')):
    with pytest.raises(ConfigError, match=words):
      build(Config, {'eval': values})
