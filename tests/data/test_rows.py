"""With every packing, each target of a store is in one row or counted as dropped."""

import bisect
import pickle
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.rows.packing import best_fit
from llm_jax.data.rows.rows import Windows, pack

BOS = 0
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)
lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def make_store(lengths, answers=None, labels=None, **columns):
  """Documents of these lengths, bos included; all other tokens are different, so a token identifies its position."""
  lengths = np.array(lengths, np.int64)
  tokens = np.arange(1, lengths.sum() + 1).astype(np.uint16)
  starts = np.cumsum(lengths) - lengths
  tokens[starts[lengths > 0]] = BOS
  return types.SimpleNamespace(tokens=tokens, starts=starts, labels=labels, **columns,
                               answers=None if answers is None else np.array(answers, np.int64))


def documents_of(store, append_eos):
  ends = [*store.starts[1:], len(store.tokens)]
  end = [BOS] if append_eos else []
  return [[*store.tokens[a:b].tolist(), *end] for a, b in zip(store.starts, ends, strict=True)]


def rows_of(rows):
  return [rows[i] for i in range(len(rows))]


def pieces_of(rows):
  return [piece for row in rows_of(rows) for piece in row]


def packed(store, packing='best_fit', truncate='split', capacity=8, bos_id=BOS, eos_id=BOS, **options):
  options = {'row_size': capacity + options.get('overhead', 0), **options}
  return pack(store, packing, truncate, capacity, bos_id=bos_id, eos_id=eos_id, **options)


# Windows.

@property_test
@given(lengths_lists, st.integers(1, 17), st.data())
def test_windows_are_the_flat_stream_cut_at_documents(lengths, seq_len, data):
  store = make_store(lengths)
  stride = data.draw(st.integers(1, seq_len))
  rows = Windows(store, seq_len, stride)
  num_targets = len(store.tokens) - 1
  last_seen = 0
  for i, row in enumerate(rows_of(rows)):
    begin = i * stride
    stop = min(begin + seq_len, num_targets)
    assert np.concatenate([piece.ids[:-1] for piece in row]).tolist() == store.tokens[begin:stop].tolist()
    assert np.concatenate([piece.ids[1:] for piece in row]).tolist() == store.tokens[begin + 1:stop + 1].tolist()
    for piece in row:
      assert piece.document == bisect.bisect_right(store.starts.tolist(), begin) - 1
      assert BOS not in piece.ids[1:-1].tolist()
      begin += len(piece.ids) - 1
    assert stop > last_seen, 'a row without a new target'
    last_seen = stop
  assert last_seen == num_targets, 'targets left out'


def test_windows_skip_documents_without_tokens():
  store = make_store([3, 0, 0, 4, 0])
  [row] = rows_of(Windows(store, 10, 10))
  assert [(piece.ids.tolist(), piece.document) for piece in row] == [([BOS, 2, 3, BOS], 0), ([BOS, 5, 6, 7], 3)]


# Packed documents.

@property_test
@given(lengths_lists, st.integers(1, 20), st.sampled_from(['best_fit', 'pad']), st.booleans(), st.integers(0, 3))
def test_joined_pieces_give_the_documents_back(lengths, capacity, packing, virtual_eos, overhead):
  store = make_store(lengths)
  rows = packed(store, packing, capacity=capacity, eos_id=BOS if virtual_eos else 9999, overhead=overhead)
  joined = {}
  for piece in sorted(pieces_of(rows), key=lambda p: (p.document, p.ids[1:].tolist() == [BOS], p.ids[1])):
    before = joined.setdefault(piece.document, piece.ids[:1].tolist())
    assert before[-1] == piece.ids[0], 'a chunk does not start at the last token of the one before'
    joined[piece.document] = before + piece.ids[1:].tolist()
  assert joined == {d: ids for d, ids in enumerate(documents_of(store, virtual_eos)) if len(ids) > 1}
  assert rows.dropped_tokens == 0
  for row in rows_of(rows):
    assert sum(len(piece.ids) - 1 + overhead for piece in row) <= capacity + overhead
    assert packing == 'best_fit' or len(row) == 1
    assert [piece.document for piece in row] == sorted(piece.document for piece in row)


@property_test
@given(lengths_lists, st.integers(1, 20), st.sampled_from(['best_fit', 'pad']), st.sampled_from(['left', 'right']),
       st.booleans())
def test_truncated_documents_keep_one_end_and_count_the_rest(lengths, capacity, packing, truncate, virtual_eos):
  store = make_store(lengths)
  rows = packed(store, packing, truncate, capacity, eos_id=BOS if virtual_eos else 9999)
  documents = documents_of(store, virtual_eos)
  found = {piece.document: piece.ids.tolist() for piece in pieces_of(rows)}
  assert len(found) == len(pieces_of(rows))
  assert found == {d: ids[:capacity + 1] if truncate == 'right' else [BOS, *ids[1:][-capacity:]]
                   for d, ids in enumerate(documents) if len(ids) > 1}
  kept = sum(len(ids) - 1 for ids in found.values())
  assert kept + rows.dropped_tokens == sum(len(ids) - 1 for ids in documents)


def test_documents_without_bos_keep_their_first_token():
  store = types.SimpleNamespace(tokens=np.arange(10, 20), starts=np.array([0, 0, 6, 10]), answers=None, labels=None)
  rows = packed(store, 'pad', 'left', 3, bos_id=None, eos_id=None)
  assert [piece.ids.tolist() for piece in pieces_of(rows)] == [[12, 13, 14, 15], [16, 17, 18, 19]]
  assert rows.dropped_tokens == 2


pairs = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=10)


@property_test
@given(pairs, st.integers(1, 20), st.sampled_from(['best_fit', 'pad']), st.sampled_from(['left', 'right']))
def test_pairs_are_never_split_and_left_keeps_the_answer(pairs, capacity, packing, truncate):
  store = make_store([1 + prompt + answer for prompt, answer in pairs], [1 + prompt for prompt, _ in pairs])
  rows = packed(store, packing, truncate, capacity, answers=store.answers)
  kept = 0
  documents = documents_of(store, append_eos=True)
  found = {piece.document: piece for piece in pieces_of(rows)}
  assert len(found) == len(pieces_of(rows))
  for d, (prompt, answer) in enumerate(pairs):
    if truncate == 'right' and prompt >= capacity:
      assert d not in found
      continue
    piece, ids = found[d], documents[d]
    kept += len(piece.ids) - 1
    cut = min(max(0, prompt + answer + 1 - capacity), prompt) if truncate == 'left' else 0
    assert piece.ids.tolist() == [BOS, *ids[1 + cut:][:capacity]]
    assert piece.ids[piece.answer] == ids[1 + prompt], 'the answer does not start where the piece says'
  assert kept + rows.dropped_tokens == sum(map(sum, pairs)) + len(pairs)


def test_labels_stay_with_their_documents():
  store = make_store([3, 1, 9, 2], labels=np.array([5.0, 6, 7, 8]))
  assert {piece.document: piece.label for piece in pieces_of(packed(store, truncate='right', least=0))} == {
      0: 5, 1: 6, 2: 7, 3: 8}


# Best fit.

def plain_best_fit(sizes, capacity):
  """Room left in each row after packing one piece at a time."""
  rooms = []
  for size in sorted(sizes, reverse=True):
    fitting = [room for room in rooms if room >= size]
    if fitting:
      rooms.remove(min(fitting))
    rooms.append((min(fitting) if fitting else capacity) - size)
  return sorted(rooms)


@settings(property_test, max_examples=150)
@given(st.integers(1, 30).flatmap(lambda capacity: st.tuples(
    st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))))
def test_histogram_best_fit_equals_best_fit_decreasing(case):
  capacity, sizes = case
  order, ends = best_fit(np.array(sizes, np.int64), capacity)
  assert sorted(order.tolist()) == list(range(len(sizes))), 'a piece is missing or there twice'
  fills = [sum(sizes[p] for p in row) for row in np.split(order, ends)[:-1]]
  assert len(fills) == len(ends)
  assert sorted(capacity - fill for fill in fills) == plain_best_fit(sizes, capacity)
  assert all(a + b > capacity for a, b in zip(sorted(fills), sorted(fills)[1:], strict=False)), 'two rows fit in one'


def test_packing_is_deterministic_picklable_and_small():
  store = make_store(np.random.default_rng(0).integers(1, 60, 500))
  a, b = packed(store, capacity=64), pickle.loads(pickle.dumps(packed(store, capacity=64)))  # noqa: S301
  assert len(a) == len(b)
  for x, y in zip(pieces_of(a), pieces_of(b), strict=True):
    assert x.document == y.document
    np.testing.assert_array_equal(x.ids, y.ids)
  assert sum(x.nbytes for x in (a.begins, a.sizes, a.documents)) <= 16 * len(a.sizes)


def test_a_million_documents_pack_fast_with_little_padding():
  lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(np.int64) + 1
  store = types.SimpleNamespace(tokens=range(lengths.sum()), starts=np.cumsum(lengths) - lengths, labels=None,
                                answers=None)
  begin = time.perf_counter()
  rows = packed(store, capacity=2048)
  assert time.perf_counter() - begin < 10  # takes 0.5 s; a Python loop over documents would take longer than 10 s
  assert rows.sizes.sum() == lengths.sum()
  assert rows.sizes.sum() / (2048 * len(rows)) > 0.999
  assert (np.diff(rows.ends, prepend=0) > 0).all()


@pytest.mark.parametrize('packing', ['best_fit', 'pad'])
def test_a_store_without_targets_has_no_rows(packing):
  assert len(packed(make_store([1, 1]), packing, eos_id=9999)) == 0
  assert len(Windows(make_store([1]), 4, 4)) == 0
