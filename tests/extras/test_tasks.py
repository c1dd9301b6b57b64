"""The features of a task can be turned back into the store: no token is lost, added or learnt twice."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rows import BOS, documents_of, lengths_lists, make_store, pairs, property_test

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import register
from llm_jax.data.rows.examples import make_examples
from llm_jax.data.rows.tasks import TASKS, Layout, NextToken, PromptAnswer, Task, lay_out
from llm_jax.extras.tasks import (
  FillInTheMiddle,
  PrefixLM,
  Seq2Seq,
  SpanCorruption,
)

VOCAB = 30000  # sentinel k is VOCAB + k
NEED = {'text': {}, 'answers': {'answers': [1, 2, 3, 1]}, 'labels': {'labels': np.arange(4.0)},
        'learnt': {'learnt': np.ones(76)}, 'seconds': {'learnt': np.ones(76), 'seconds': np.array([2, 1, 30, 4])}}
ROW_KEYS = {'tokens', 'targets', 'loss_mask', 'segment_ids', 'positions'}


def make(store, task, **options):
  options = {'seq_len': 16, 'encoder_len': 16, 'packing': 'concat' if 'concat' in task.packings else 'pad',
             'vocab_size': VOCAB, 'bos_id': BOS, 'eos_id': BOS, **options}
  return make_examples(store, task=task, **options)


def rows_of(examples, seed=0):
  return [examples.make(i, np.random.default_rng([seed, i])) for i in range(len(examples))]


def pieces_of(row):
  """(tokens, targets, loss_mask, positions) of each piece of a row."""
  return [tuple(row[name][row['segment_ids'] == k].tolist() for name in ('tokens', 'targets', 'loss_mask', 'positions'))
          for k in range(1, row['segment_ids'].max() + 1)]


def learnt(rows):
  return Counter(np.concatenate([row['targets'][row['loss_mask'] > 0] for row in rows]).tolist())


def encoder_of(row):
  ids = row['encoder_tokens'][row['encoder_segment_ids'] == 1].tolist()
  assert not row['encoder_tokens'][len(ids):].any(), 'padding is not 0 or not on the right'
  return ids


# Next token.

def plain_next_token(store, begin, seq_len):
  """Features of the window from `begin`, made token by token."""
  row = {name: np.zeros(seq_len, np.float32 if name == 'loss_mask' else np.int32) for name in ROW_KEYS}
  segment = position = 0
  for t in range(min(seq_len, len(store.tokens) - 1 - begin)):
    opens = t == 0 or begin + t in store.starts.tolist()
    segment, position = segment + opens, 0 if opens else position + 1
    for name, value in (('tokens', store.tokens[begin + t]), ('targets', store.tokens[begin + t + 1]),
                        ('loss_mask', 1), ('segment_ids', segment), ('positions', position)):
      row[name][t] = value
  return row


@property_test
@given(st.lists(st.integers(1, 30), min_size=2, max_size=9), st.integers(1, 20))
def test_next_token_equals_a_plain_loop(lengths, seq_len):
  store = make_store(lengths)
  examples = make(store, NextToken(), seq_len=seq_len)
  for i in range(len(examples)):
    expected = plain_next_token(store, i * seq_len, seq_len)
    row = examples.make(i, None)
    assert row.keys() == expected.keys()
    for name in row:
      assert row[name].dtype == expected[name].dtype
      np.testing.assert_array_equal(row[name], expected[name], err_msg=name)


@property_test
@given(lengths_lists, st.integers(1, 20), st.sampled_from(['best_fit', 'pad']),
       st.sampled_from(['split', 'left', 'right']))
def test_learnt_and_dropped_targets_are_all_targets(lengths, seq_len, packing, truncate):
  store = make_store(lengths)
  examples = make(store, NextToken(), seq_len=seq_len, packing=packing, truncate=truncate)
  stored = Counter(x for ids in documents_of(store, True) for x in ids[1:])
  found = learnt(rows_of(examples))
  assert not found - stored, 'a target that is not in the store, or learnt twice'
  assert found.total() + examples.dropped_tokens == stored.total()
  assert truncate != 'split' or found == stored


@property_test
@given(st.integers(2, 200), st.integers(1, 20), st.data())
def test_score_once_counts_targets_with_most_context(num_tokens, seq_len, data):
  store = make_store([num_tokens])
  stride = data.draw(st.integers(1, seq_len))
  rows = rows_of(make(store, NextToken(), seq_len=seq_len, stride=stride, score_once=True))
  assert learnt(rows) == Counter([*range(2, num_tokens + 1), BOS])  # BOS also ends the document
  for i, row in enumerate(rows):
    assert (row['positions'][row['loss_mask'] > 0] >= (seq_len - stride if i else 0)).all()


# Pairs.

@property_test
@given(pairs, st.integers(1, 20), st.sampled_from(['best_fit', 'pad']))
def test_prompt_answer_learns_only_answer_and_eos(cases, seq_len, packing):
  store = make_store([1 + p + a for p, a in cases], [1 + p for p, _ in cases])
  rows = rows_of(make(store, PromptAnswer(), seq_len=seq_len, packing=packing))
  documents = documents_of(store, True)
  answers = Counter(x for ids, (p, _) in zip(documents, cases, strict=True) for x in ids[1 + p:][:seq_len])
  assert learnt(rows) == answers  # the default truncation keeps answers, up to the length of a row
  for tokens, targets, mask, _ in itertools.chain(*map(pieces_of, rows)):
    assert tokens[0] == BOS
    assert tokens[1:] == targets[:-1]
    assert mask == sorted(mask), 'a token after the start of the answer is not learnt'


@property_test
@given(pairs, st.integers(1, 12), st.integers(2, 12), st.sampled_from(['left', 'right']))
def test_seq2seq_keeps_both_sides_and_counts_cut_tokens(cases, seq_len, encoder_len, truncate):
  store = make_store([1 + p + a for p, a in cases], [1 + p for p, _ in cases])
  examples = make(store, Seq2Seq(), seq_len=seq_len, encoder_len=encoder_len, truncate=truncate)
  dropped = 0
  for row, ids, (p, _) in zip(rows_of(examples), documents_of(store, True), cases, strict=True):
    prompt, answer, room = ids[1:1 + p], ids[1 + p:], encoder_len - 1
    kept = prompt[:room] if truncate == 'right' else prompt[max(0, p - room):]
    assert encoder_of(row) == [*kept, BOS]
    [(tokens, targets, mask, positions)] = pieces_of(row)
    assert targets == answer[:seq_len]
    assert tokens == [BOS, *targets[:-1]]
    assert all(mask)
    assert positions == list(range(len(tokens)))
    dropped += len(prompt) - len(kept) + len(answer) - len(targets)
  assert examples.dropped_tokens == dropped


# Fill in the middle.

def original_of(tokens, targets):
  """The document before it was rearranged; after sentinel 2, SPM has prefix and middle, PSM only the middle."""
  ids = [*tokens[:1], *targets]
  assert tokens[1:] == targets[:-1]
  if VOCAB not in ids:
    return ids
  assert [x for x in ids if x >= VOCAB] == [VOCAB, VOCAB + 1, VOCAB + 2]
  assert ids[1] == VOCAB
  after, between = ids.index(VOCAB + 1), ids.index(VOCAB + 2)
  end = ids[-1:] if ids[-1] == BOS else []
  prefix, suffix = ids[2:after], ids[after + 1:between]
  middle = ids[between + 1:len(ids) - len(end)]
  return [*ids[:1], *prefix, *middle, *suffix, *end]


@property_test
@given(lengths_lists, st.integers(4, 24), st.sampled_from(['best_fit', 'pad']), st.integers(0, 9))
def test_fill_in_the_middle_can_be_undone(lengths, seq_len, packing, seed):
  store = make_store(lengths)
  rows = rows_of(make(store, FillInTheMiddle(rate=0.7), seq_len=seq_len, packing=packing), seed)
  plain = make(store, NextToken(), seq_len=seq_len - 3, packing='pad')  # the same pieces
  undone = sorted(original_of(*piece[:2]) for row in rows for piece in pieces_of(row))
  assert undone == sorted([*tokens[:1], *targets] for row in rows_of(plain) for tokens, targets, _, _ in pieces_of(row))
  assert all((row['loss_mask'] == (row['segment_ids'] > 0)).all() for row in rows)


def test_fill_in_the_middle_follows_its_rates_and_cuts_anywhere():
  store = make_store([10] * 2000)
  rows = rows_of(make(store, FillInTheMiddle(rate=0.6, spm_rate=0.25)))
  kinds, middles = Counter(), Counter()
  for row in rows:
    [(tokens, targets, _, _)] = pieces_of(row)
    kinds['fim' if VOCAB in targets else 'plain'] += 1
    kinds['adjacent'] += tokens[1:3] == [VOCAB, VOCAB + 1]  # SPM, and PSM where the prefix is empty
    if VOCAB in targets and tokens[1:3] != [VOCAB, VOCAB + 1]:
      middles[targets[::-1].index(VOCAB + 2) - 1] += 1
  assert abs(kinds['fim'] / 2000 - 0.6) < 0.04
  empty_prefix = 1 - (9 / 10)**2
  assert abs(kinds['adjacent'] / kinds['fim'] - (0.25 + 0.75 * empty_prefix)) < 0.06
  assert set(middles) == set(range(9))
  assert rows_of(make(store, FillInTheMiddle(rate=0)))[5].keys() == ROW_KEYS
  assert not any((row['targets'] >= VOCAB).any() for row in rows_of(make(store, FillInTheMiddle(rate=0))))


# Prefix LM.

@property_test
@given(lengths_lists.filter(lambda x: sum(x) > 1), st.integers(1, 20), st.sampled_from(['concat', 'best_fit', 'pad']))
def test_no_target_inside_a_prefix_is_learnt(lengths, seq_len, packing):
  store = make_store(lengths)
  examples, plain = (make(store, task, seq_len=seq_len, packing=packing) for task in (PrefixLM(), NextToken()))
  for row, reference in zip(rows_of(examples), rows_of(plain), strict=True):
    for name in ROW_KEYS - {'loss_mask'}:
      np.testing.assert_array_equal(row[name], reference[name])
    assert not row['prefix_mask'][row['segment_ids'] == 0].any()
    for k in range(1, row['segment_ids'].max() + 1):
      inside = row['segment_ids'] == k
      prefix, mask = row['prefix_mask'][inside].tolist(), row['loss_mask'][inside].tolist()
      length = sum(prefix)
      assert prefix == [1] * length + [0] * (len(prefix) - length)
      assert length >= 1
      # The last token of the prefix predicts the first after it.
      assert mask == [0] * (length - 1) + [1] * (len(mask) - length + 1)


def test_prefixes_end_anywhere():
  rows = rows_of(make(make_store([8] * 500), PrefixLM(), packing='pad'))
  assert {int(row['prefix_mask'].sum()) for row in rows} == set(range(1, 9))


# Span corruption.

def joined_spans(row):
  """The text before corruption, and its number of spans."""
  encoder = encoder_of(row)
  [(tokens, targets, mask, _)] = pieces_of(row)
  assert (encoder[-1], targets[-1], tokens[0]) == (BOS, BOS, BOS)
  assert tokens[1:] == targets[:-1]
  assert all(mask)
  spans, spoken = {}, None
  for x in targets[:-1]:
    if x >= VOCAB:
      spoken = spans.setdefault(x, [])
    else:
      spoken.append(x)
  assert all(spans.values()), 'an empty span'
  assert list(spans) == [x for x in encoder if x >= VOCAB] == list(range(VOCAB, VOCAB + len(spans)))
  return [y for x in encoder[:-1] for y in spans.get(x, [x])], len(spans)


@settings(property_test, max_examples=80)
@given(lengths_lists, st.integers(3, 24), st.integers(3, 24), st.floats(0.05, 0.9), st.floats(1, 5), st.integers(0, 9))
def test_span_corruption_can_be_undone(lengths, seq_len, encoder_len, noise_density, mean_span_length, seed):
  store = make_store(lengths)
  task = SpanCorruption(noise_density, mean_span_length)
  rows = rows_of(make(store, task, seq_len=seq_len, encoder_len=encoder_len), seed)
  texts = [joined_spans(row)[0] for row in rows]
  assert list(itertools.chain(*texts)) == [x for x in store.tokens.tolist() if x != BOS]
  for text, row in zip(texts, rows, strict=True):
    num_noise, num_spans = task.noise(len(text))
    assert joined_spans(row)[1] == num_spans
    assert row['loss_mask'].sum() == num_noise + num_spans + 1
  capacity = task.capacity(Layout(seq_len, encoder_len, VOCAB, BOS, BOS))
  longer = capacity + 1
  num_noise, num_spans = task.noise(longer)
  assert longer - num_noise + num_spans + 1 > encoder_len or num_noise + num_spans + 1 > seq_len, 'longer would fit'


def test_spans_follow_the_paper_and_vary():
  store = make_store([400] * 30)
  rows = rows_of(make(store, SpanCorruption(), seq_len=114, encoder_len=512))
  texts, counts = zip(*map(joined_spans, rows), strict=True)
  assert {len(text) for text in texts} == {399}
  assert set(counts) == {20}  # 399 * 0.15 = 60 tokens, 3 a span
  assert len({tuple(np.flatnonzero(row['encoder_tokens'] >= VOCAB)) for row in rows}) == 30
  lengths = Counter(int(n) for row in rows for n in np.diff([*np.flatnonzero(row['targets'] >= VOCAB), 80]) - 1)
  assert lengths[1] > lengths[3] > lengths[6] > 0


# All tasks.

def every_case():
  return [(cls(), packing) for cls in TASKS.values() for packing in cls.packings]


@pytest.mark.parametrize(('task', 'packing'), every_case(), ids=lambda x: x if isinstance(x, str) else type(x).__name__)
@pytest.mark.parametrize('mask_documents', [False, True])
def test_rows_depend_on_index_and_rng_alone(task, packing, mask_documents):
  if not mask_documents and (type(task).__name__ == 'Preference' or (isinstance(task, PrefixLM) and packing != 'pad')):
    return  # rejected, see below
  store = make_store([5, 2, 60, 9], **NEED[task.needs])
  examples = make(store, task, packing=packing, mask_documents=mask_documents)
  rows, again = rows_of(examples), rows_of(pickle.loads(pickle.dumps(examples)))  # noqa: S301
  assert len({str([(name, x.dtype, x.shape) for name, x in row.items()]) for row in rows}) == 1
  assert {x.shape for x in rows[0].values()} <= {(16,), ()}
  assert (mask_documents or task.whole) == ('segment_ids' in rows[0]) and mask_documents == ('positions' in rows[0])
  same = [all((x == b[name]).all() for name, x in a.items()) for a, b in zip(rows, again, strict=True)]
  assert all(same)
  seeds = [rows_of(examples, seed) for seed in range(1, 4)]
  changed = any((x != b[name]).any() for other in seeds for a, b in zip(rows, other, strict=True)
                for name, x in a.items())
  assert changed == examples.random
  if not examples.random:
    examples.make(0, None)


# A task from outside.

class Halves(Task):
  """Uses at most half of a row, and cuts the rest of a document."""

  def capacity(self, layout):
    return None

  def num_cut(self, rows, layout):
    return int(np.maximum(rows.sizes - layout.seq_len // 2, 0).sum())

  def check(self, layout, store):
    if layout.seq_len % 2:
      raise ConfigError(f'config.data.seq_len: {layout.seq_len} is odd')

  def features(self, row, layout, rng):
    [piece] = row
    return lay_out([piece.ids[:layout.seq_len // 2 + 1]], None, layout)


def test_a_task_from_outside_limits_rows_and_rejects_settings(monkeypatch):
  monkeypatch.setattr(TASKS, '_entries', dict(TASKS._entries))
  register(TASKS, 'halves', Halves)
  store = make_store([5, 2, 60, 9])
  examples = make(store, Halves(), seq_len=16)
  assert [int(row['loss_mask'].sum()) for row in rows_of(examples)] == [5, 2, 8, 8]  # eos included
  assert examples.dropped_tokens == (60 - 8) + (9 - 8)
  with pytest.raises(ConfigError, match=r'data\.seq_len: 15 is odd'):
    make(store, Halves(), seq_len=15)
