"""Each rule equals a plain reference of its measure; counts add up; duplicates are found, also after a restart."""

import json
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax.base.errors import DataError
from llm_jax.data.sources.filters import Deduplicator, FilterConfig, Report
from llm_jax.extras.filters import C4, GOPHER, MEASURES, Quality

# Few words, so that lines, paragraphs and n-grams repeat.
WORDS = st.sampled_from(['a', 'bb', 'the', 'The', '##', '...', '12', 'end.', 'été', '-', '“Oh!”', 'you?', '中文。',
                         '…', 'हिन'])
TEXTS = st.lists(st.tuples(WORDS, st.sampled_from([' ', ' ', '\n', '\n\n', ' \r\n', '\n \n'])), max_size=60).map(
    lambda pairs: ''.join(word + space for word, space in pairs))


def lines(text):
  return [line.strip() for line in text.split('\n') if line.strip()]


def paragraphs(text):
  found, last = [], ''
  for line in [*text.split('\n'), '']:
    if line.strip():
      last += line.strip() + '\n'
    elif last:
      found.append(last[:-1])
      last = ''
  return found


def repeats(items, weight):
  total = sum(map(weight, items))
  return sum(weight(x) for i, x in enumerate(items) if x in items[:i]) / total if total else 0


def share(items, holds):
  return sum(bool(holds(x)) for x in items) / len(items) if len(items) else 0


def ngram_share(text, n, choose):
  """Share of characters in repeated n-grams; `choose` gets the characters of each n-gram and of all together."""
  words = text.split()
  grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
  covers = [{i + j for i, g in enumerate(grams) if g == gram for j in range(n)}
            for gram, count in Counter(grams).items() if count > 1]
  chars = sum(map(len, words))
  return choose([sum(len(words[i]) for i in cover) for cover in covers],
                sum(len(words[i]) for i in set().union(*covers))) / chars if chars else 0


REFERENCES = {
    'chars': len,
    'words': lambda t: len(t.split()),
    'mean_word_length': lambda t: float(np.mean([len(w) for w in t.split()])) if t.split() else 0,
    'letter_ratio': lambda t: share([c for c in t if not c.isspace()],
                                    lambda c: unicodedata.category(c)[0] in 'LM'),
    'letter_word_ratio': lambda t: share(t.split(), lambda w: any(c.isalpha() for c in w)),
    'symbol_ratio': lambda t: max(t.count('#'), t.count('...') + t.count('…')) / max(1, len(t.split())),
    'bullet_lines': lambda t: share(lines(t), lambda x: x[0] in '-*•'),
    'ellipsis_lines': lambda t: share(lines(t), lambda x: x[-3:] == '...' or x[-1] == '…'),
    'terminal_lines': lambda t: share(lines(t), lambda x: x[-1] in '.!?”"。'),
    'sentences': lambda t: sum(t.split().count(w) for w in ('...', 'end.', '“Oh!”', 'you?', '中文。')),
    'duplicate_line_ratio': lambda t: repeats(lines(t), lambda x: 1),
    'duplicate_line_char_ratio': lambda t: repeats(lines(t), len),
    'duplicate_paragraph_ratio': lambda t: repeats(paragraphs(t), lambda x: 1),
    'duplicate_paragraph_char_ratio': lambda t: repeats(paragraphs(t), len),
    'top_ngram_ratio': lambda t: tuple(ngram_share(t, n, lambda each, _: max(each, default=0)) for n in (2, 3, 4)),
    'duplicate_ngram_ratio': lambda t: tuple(ngram_share(t, n, lambda _, union: union) for n in (5, 6, 7)),
}


@pytest.mark.parametrize('rule', MEASURES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=TEXTS)
@example('')
@example(' \n')
def test_a_rule_drops_documents_beyond_its_limit(rule, text):
  kind, name = rule.split('_', 1)
  value = REFERENCES[name](text)
  step = 1 if name in ('chars', 'words', 'sentences') else 1e-6
  outward = -step if kind == 'min' else step

  def reason(limit):
    limit = tuple(max(0, x) for x in limit) if isinstance(limit, tuple) else max(0, limit)
    return Quality(FilterConfig(**{rule: limit})).reason(text)

  if isinstance(value, tuple):
    assert reason(tuple(min(1, v + 1e-6) for v in value)) is None
    for i, v in enumerate(value):
      if v > 0:
        assert reason(tuple(v - 1e-6 if i == j else 1.0 for j in range(len(value)))) == rule
    return
  top = 1 if name.endswith(('ratio', 'lines')) and name != 'symbol_ratio' else 1e9
  assert reason(min(top, value + outward)) is None
  if 0 <= value - outward <= top:
    assert reason(value - outward) == rule


PROSE = ('The ferry had left before the fog came down over the harbour. Nobody on the quay could say which of the two '
         'boats it was, and the man who sold tickets had gone home early!\nA dog slept under his window. Later, when '
         'lamps were lit along the front, three women walked past carrying nets; they did not stop, but the youngest '
         'looked back once.\n\n"What did she see?" asked my brother.\nI told him that I had been reading.\n')


@pytest.mark.parametrize(('reason', 'text'), [
    (None, PROSE), ('min_words', PROSE[:100]), ('max_mean_word_length', 'https://example.org/a/b/c ' * 60),
    ('max_symbol_ratio', PROSE.replace(' the ', ' # the # ').replace(' ', ' #', 8)),
    ('max_bullet_lines', '\n'.join('- ' + s for s in PROSE.split('. ') for s in s.split('\n') if s)),
    ('max_ellipsis_lines', PROSE.replace('.\n', '...\n')), ('min_letter_word_ratio', '3141 592 ' * 20 + PROSE),
    ('max_duplicate_line_ratio', PROSE + 'Read more about this\n' * 5),
    ('max_top_ngram_ratio', 'buy now ' * 40 + PROSE),
    ('max_duplicate_ngram_ratio', PROSE + PROSE.replace('\n', ' ')),
])
def test_gopher_rules_drop_bad_text_and_keep_prose(reason, text):
  assert Quality(FilterConfig(**GOPHER)).reason(text) == reason


@pytest.mark.parametrize(('reason', 'text'), [
    (None, PROSE), ('min_sentences', 'One. Two.'), ('min_terminal_lines', 'Home\n' * 60 + PROSE)])
def test_c4_rules_drop_bad_text_and_keep_prose(reason, text):
  assert Quality(FilterConfig(**C4)).reason(text) == reason


def test_all_rules_are_off_by_default():
  quality = Quality(FilterConfig())
  assert [quality.reason(text) for text in ('', '#' * 1000, 'a\n' * 1000, PROSE, '\ud800', np.arange(3))] == [None] * 6


def test_letters_of_any_script_are_letters():
  quality = Quality(FilterConfig(min_letter_ratio=0.9))
  assert [quality.reason(text) for text in ('Это слова', '中文文本', 'हिन ', 'اللغة', '𝔘𐎠')] == [None] * 5
  assert quality.reason('1²½_ 4') == 'min_letter_ratio'


def test_ids_are_filtered_by_their_number_alone():
  quality = Quality(FilterConfig(**GOPHER, **C4, min_chars=3, max_chars=5))
  assert [quality.reason(np.arange(n)) for n in (2, 3, 5, 6)] == ['min_chars', None, None, 'max_chars']


@pytest.mark.parametrize('text', ['a ' * 150_000, '.' * 300_000, '\n' * 300_000, '." ' * 100_000, '.x' * 150_000,
                                  ' \n' * 150_000, '.' * 150_000 + '"' * 150_000 + 'x'], ids=lambda t: repr(t[:6]))
def test_rules_take_linear_time(text):
  most = {name: 1e9 if name in ('max_words', 'max_mean_word_length', 'max_symbol_ratio') else
          (1.0,) * len(limit) if isinstance(limit, tuple) else 1.0 if name[:3] == 'max' else 1e-9
          for name, limit in {**GOPHER, **C4}.items()}
  begin = time.process_time()
  Quality(FilterConfig(**most)).reason(text)
  assert time.process_time() - begin < 5  # a quadratic rule takes minutes


@pytest.mark.parametrize('values', [
    {'min_words': 5, 'max_words': 4}, {'max_bullet_lines': 1.5}, {'min_chars': -1}, {'max_top_ngram_ratio': (0.1, 2.0)},
    {'min_letter_ratio': float('nan')}])
def test_impossible_limits_are_named(values):
  with pytest.raises(ValueError, match=next(iter(values))):
    FilterConfig(**values)


CONTENTS = st.one_of(st.text(alphabet='ab\ud800é', max_size=3), st.lists(st.integers(0, 3), max_size=3).map(np.array))


def plain(part):
  return part if isinstance(part, str) else tuple(part.tolist())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(documents=st.lists(st.lists(CONTENTS, min_size=1, max_size=2), max_size=30), stop=st.integers(0, 30))
def test_duplicates_are_found_across_restarts(documents, stop):
  keys = [tuple(map(plain, parts)) for parts in documents]
  before = Deduplicator()
  found = [before.seen(*parts) for parts in documents[:stop]]
  saved = before.new_hashes()
  assert before.new_hashes() == b''
  after = Deduplicator(saved)
  found += [after.seen(*parts) for parts in documents[stop:]]
  assert [reason is not None for reason in found] == [key in keys[:i] for i, key in enumerate(keys)]
  assert len(saved + after.new_hashes()) == 16 * len(set(keys))


def test_pairs_divided_differently_are_different():
  seen = Deduplicator()
  pairs = [('ab', 'c'), ('a', 'bc'), ('abc', ''), ('abc',), ('', 'abc')]
  assert not any(seen.seen(*parts) for parts in pairs)
  assert all(seen.seen(*parts) for parts in pairs)


def test_equal_ids_of_any_dtype_are_duplicates():
  seen = Deduplicator()
  assert not seen.seen(np.array([1, 2], np.uint16))
  assert seen.seen(np.array([1, 2], np.int64))
  assert not seen.seen(np.array([1, 3], np.int64))


def test_truncated_hashes_are_rejected():
  with pytest.raises(DataError, match='31 bytes'):
    Deduplicator(b'x' * 31)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(['keep', 'bad', 'min_words', 'duplicate']), max_size=40), st.integers(0, 40))
def test_a_report_adds_up_across_restarts(events, stop):
  report = Report()
  for i, event in enumerate(events):
    if i == stop:
      report = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    if event in ('keep', 'bad'):
      report.keep() if event == 'keep' else report.bad(f'record {i}')
    else:
      report.drop(event)
  counts = Counter(events)
  assert report.num_in == len(events) == report.to_dict()['in']
  assert (report.num_kept, report.num_bad) == (counts.pop('keep', 0), counts.pop('bad', 0))
  assert report.dropped == counts
  text = '\n'.join(report.lines())
  assert f'{len(events)} documents in' in text
  for reason, count in counts.items():
    assert f'{count} ({count / len(events):.2%}) dropped by {reason}' in text
  if report.num_bad:
    assert f'record {events.index("bad")}' in text
