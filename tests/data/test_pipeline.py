"""Batches are a pure function of (data, seed, n): each token is a target once per epoch, with any number of hosts."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest

from llm_jax.data import pipeline
from llm_jax.data.pipeline import Endless, eval_batches, prefetched, train_batches
from llm_jax.data.rows.augment import Augment
from llm_jax.data.rows.examples import make_examples
from llm_jax.data.rows.tasks import NextToken
from llm_jax.data.stores.store import TokenStore

# (num_tokens, seq_len). All tokens of a store are different, so a token identifies its position.
LENGTHS = [(1, 1), (2, 1), (50, 7), (57, 7), (64, 64), (65, 64), (500, 16), (129, 1)]


def make_store(num_tokens, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.permutation(num_tokens).astype(np.uint16) + 1
  begins = rng.integers(1, num_tokens, num_tokens // 9) if num_tokens > 9 else []
  starts = np.unique([0, *begins, num_tokens - 1]).astype(np.int64)  # the last token starts a document too
  return TokenStore(tokens, starts, f'sha {num_tokens} {seed}', num_tokens)


def make_windows(num_tokens=500, seq_len=16, seed=0, mask_documents=True):
  return make_examples(make_store(num_tokens, seed), task=NextToken(), seq_len=seq_len, mask_documents=mask_documents,
                       vocab_size=num_tokens + 1, bos_id=None, eos_id=None)


def rows_of(examples):
  return [examples.make(i, np.random.default_rng(i)) for i in range(len(examples))]


def split(batch):
  return [{name: x[i] for name, x in batch.items()} for i in range(len(batch['tokens']))]


def batch_at(batches, n):
  return {name: x[0] for name, x in batches(np.array([n])).items()}


def epoch_of(windows, seed, epoch=0):
  """Rows of an epoch of training."""
  return split(Endless(windows, seed)(np.arange(epoch * len(windows), (epoch + 1) * len(windows))))


def tokens_of(examples):
  return examples.rows.store.tokens


def real(rows, name):
  """The values of feature `name` where loss_mask is 1, over all rows in order."""
  return np.concatenate([row[name][row['loss_mask'] > 0] for row in rows]).tolist()


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def order_of(rows):
  """The first token of each row, which identifies the window."""
  return [int(row['tokens'][0]) for row in rows]


# Windows.

@pytest.mark.parametrize(('num_tokens', 'seq_len'), [n for n in LENGTHS if n[0] > 1])
def test_every_token_but_the_first_is_a_target_once(num_tokens, seq_len):
  windows = make_windows(num_tokens, seq_len)
  rows = rows_of(windows)
  assert real(rows, 'targets') == tokens_of(windows)[1:].tolist()
  assert real(rows, 'tokens') == tokens_of(windows)[:-1].tolist()
  assert all(row['loss_mask'].any() for row in rows)


def test_shuffled_epochs_hold_every_target_once():
  windows = make_windows()
  for epoch in range(3):
    rows = epoch_of(windows, 3, epoch)
    assert sorted(real(rows, 'targets')) == sorted(tokens_of(windows)[1:].tolist())


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('seq_len', [1, 8, 33])
def test_segments_and_positions_restart_at_documents(seed, seq_len):
  windows = make_windows(200, seq_len, seed)
  starts = set(windows.rows.store.starts.tolist())
  for i in range(len(windows)):
    row = windows.make(i, None)
    segment = position = 0
    for t in range(seq_len):
      at = i * seq_len + t
      if at >= 199:  # after the last token with a target
        assert row['segment_ids'][t] == 0
        assert row['loss_mask'][t] == 0
        continue
      opens = t == 0 or at in starts
      segment, position = segment + opens, 0 if opens else position + 1
      assert (row['segment_ids'][t], row['positions'][t], row['loss_mask'][t]) == (segment, position, 1)


def test_segments_agree_with_the_special_tokens_of_the_row():
  # The expectation uses the tokens only: 0 starts each document, as in a real store.
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 6, 300).astype(np.uint16)
  tokens[0] = 0
  store = TokenStore(tokens, np.flatnonzero(tokens == 0), 'sha', 300)
  for row in rows_of(make_examples(store, task=NextToken(), seq_len=11, vocab_size=6, bos_id=0, eos_id=0)):
    held = row['segment_ids'] > 0
    opens = row['tokens'] == 0
    opens[0] = True
    np.testing.assert_array_equal(row['segment_ids'][held], np.cumsum(opens)[held])
    np.testing.assert_array_equal(row['positions'][held] == 0, opens[held])


def test_without_mask_documents_a_row_is_one_segment():
  masked, plain = (make_windows(mask_documents=m).make(3, None) for m in (True, False))
  assert set(plain) == {'tokens', 'targets', 'loss_mask'}
  assert_equal(plain, {name: masked[name] for name in plain})


# Order.

def test_each_epoch_is_a_new_permutation_and_seeds_differ():
  windows = make_windows()
  epochs = [order_of(epoch_of(windows, seed, epoch)) for seed in (0, 1) for epoch in range(4)]
  in_order = order_of(rows_of(windows))
  assert all(sorted(epoch) == sorted(in_order) for epoch in epochs)
  assert all(a != b for a, b in itertools.combinations([in_order, *epochs], 2))


def test_order_is_a_shuffle_not_a_rotation():
  windows = make_windows(2000, 4)
  index = {first: i for i, first in enumerate(order_of(rows_of(windows)))}
  order = [index[first] for first in order_of(epoch_of(windows, 0))]
  steps = np.diff(order)
  assert len(set(steps.tolist())) > len(order) / 3
  assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.2


# Batches.

def batches_of(batch_size=8, rows=None, seed=0, **windows):
  rows = np.arange(batch_size) if rows is None else rows
  return train_batches(Endless(make_windows(**windows), seed), lambda n: n * batch_size, rows)


def test_batch_n_starts_at_example_n_times_batch_size():
  windows = make_windows()
  examples, batches = Endless(windows, 7), batches_of(seed=7)
  for n in (0, 3, 4, 40):  # an epoch is four batches
    batch = batch_at(batches, n)
    for row in range(8):
      assert_equal({name: x[row:row + 1] for name, x in batch.items()}, examples(np.array([n * 8 + row])))


@pytest.mark.parametrize('num_tokens', [100, 500])
def test_batches_cross_epochs_without_a_gap(num_tokens):
  # 5 rows per batch divide neither 7 nor 32 windows per epoch: some batches hold rows of two epochs.
  windows, batches = make_windows(num_tokens), batches_of(5, num_tokens=num_tokens)
  num_batches = 3 * len(windows) // 5 + 1
  rows = [row for n in range(num_batches) for row in split(batch_at(batches, n))]
  for epoch in range(3):
    of_epoch = rows[epoch * len(windows):(epoch + 1) * len(windows)]
    assert sorted(real(of_epoch, 'targets')) == sorted(tokens_of(windows)[1:].tolist())


@pytest.mark.parametrize('ahead_bytes', [1, 3 * 8 * 16 * 20, 4 << 20])  # one batch at a time, a few, the most
@pytest.mark.parametrize('begin', [0, 1, 7, 1000, 10**9])
def test_batch_n_is_a_pure_function(begin, ahead_bytes, monkeypatch):
  monkeypatch.setattr(pipeline, 'AHEAD_BYTES', ahead_bytes)
  random_access, numbers = batches_of(), range(begin, begin + 2 * pipeline.AHEAD + 2)
  expected = {n: batch_at(random_access, n) for n in reversed(numbers)}
  with contextlib.closing(prefetched(batches_of(), begin)) as iterator:
    for n in numbers:
      batch = next(iterator)
      assert_equal(batch, expected[n])
      assert_equal(batch, batch_at(random_access, n))  # the same on a second access
  assert (expected[begin]['tokens'] != batch_at(batches_of(seed=1), begin)['tokens']).any()


def test_random_draws_depend_on_seed_and_position():
  """Every epoch and seed draws new random tokens, independent of other accesses. One row has only one order."""
  windows = make_windows(17, 16)
  examples = dataclasses.replace(windows, augment=Augment(token_replace=0.5),
                                 layout=dataclasses.replace(windows.layout, bos_id=0))
  assert len(examples) == 1
  drawn = {(seed, position): Endless(examples, seed)(np.array([position]))['tokens'].tobytes()
           for seed in range(4) for position in range(4)}
  assert len(set(drawn.values())) == len(drawn)
  whole = Endless(examples, 2)(np.arange(4))['tokens']
  assert [row.tobytes() for row in whole] == [drawn[2, position] for position in range(4)]


@pytest.mark.parametrize('num_hosts', [1, 2, 4])
@pytest.mark.parametrize('deal', ['blocks', 'strided'])
def test_rows_of_all_hosts_are_the_global_batch(num_hosts, deal):
  whole = batches_of()
  row_sets = [np.arange(8).reshape(num_hosts, -1)[host] if deal == 'blocks' else np.arange(host, 8, num_hosts)
              for host in range(num_hosts)]
  with contextlib.ExitStack() as stack:
    hosts = [stack.enter_context(contextlib.closing(prefetched(batches_of(rows=rows), 2))) for rows in row_sets]
    for n in range(2, 9):
      batch = batch_at(whole, n)
      seen = []
      for rows, host in zip(row_sets, hosts, strict=True):
        local = next(host)
        for i, row in enumerate(rows):
          assert_equal({name: x[i] for name, x in local.items()}, {name: x[row] for name, x in batch.items()})
          seen.append(int(row))
      assert sorted(seen) == list(range(8))


# Evaluation.

def eval_rows(windows, batch_size, rows=None, max_rows=None):
  batches = list(eval_batches(windows, batch_size, np.arange(batch_size) if rows is None else rows, max_rows))
  return [row for batch in batches for row in split(batch)]


@pytest.mark.parametrize('batch_size', [1, 3, 8, 31, 32, 33, 100])
def test_eval_covers_every_token_once_whatever_the_batch_size(batch_size):
  windows = make_windows()
  assert len(windows) == 32
  rows = eval_rows(windows, batch_size)
  assert len(rows) % batch_size == 0
  assert len(rows) < 32 + batch_size
  assert sum(row['loss_mask'].sum() for row in rows) == 499
  assert real(rows, 'targets') == tokens_of(windows)[1:].tolist()
  for blank in rows[32:]:
    assert not blank['segment_ids'].any()


@pytest.mark.parametrize('num_hosts', [1, 2, 4])
def test_eval_of_all_hosts_covers_every_token_once(num_hosts):
  windows = make_windows(470)
  hosts = [eval_rows(windows, 12, np.arange(host, 12, num_hosts)) for host in range(num_hosts)]
  assert len({len(rows) for rows in hosts}) == 1  # all hosts make the same number of batches
  targets = itertools.chain(*(real(rows, 'targets') for rows in hosts))
  assert sorted(targets) == sorted(tokens_of(windows)[1:].tolist())


@pytest.mark.parametrize('max_rows', [1, 2, 5, 7, 16, 31, 32, 1000])
@pytest.mark.parametrize('batch_size', [1, 4, 50])
def test_eval_of_max_rows_is_evenly_spread(max_rows, batch_size):
  windows = make_windows()
  index = {first: i for i, first in enumerate(order_of(rows_of(windows)))}
  chosen = [index[first] for first in order_of(r for r in eval_rows(windows, batch_size, max_rows=max_rows)
                                               if r['loss_mask'].any())]
  count = min(max_rows, 32)
  assert len(chosen) == len(set(chosen)) == count
  assert chosen == sorted(chosen)
  gaps = np.diff([*chosen, 32 + chosen[0]])  # the last gap wraps around
  assert gaps.max() - gaps.min() <= 1
