"""Batches are a pure function of (data, seed, n): each token once an epoch, whatever hosts, restarts or prefetching."""

import contextlib
import dataclasses
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from llm_jax.data import DataConfig, open_data, open_examples, pipeline
from llm_jax.data.augment import Augment
from llm_jax.data.documents import SourceConfig
from llm_jax.data.examples import Examples, make_examples
from llm_jax.data.pipeline import Endless, eval_batches, mixed, prefetched, train_batches, train_sources
from llm_jax.data.store import TokenStore
from llm_jax.data.tasks import NextToken

# No two tokens are alike, so a token tells where it came from.
LENGTHS = [(1, 1), (2, 1), (50, 7), (57, 7), (64, 64), (65, 64), (500, 16), (129, 1)]


def make_store(num_tokens, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.permutation(num_tokens).astype(np.uint16) + 1
  begins = rng.integers(1, num_tokens, num_tokens // 9) if num_tokens > 9 else []
  starts = np.unique([0, *begins, num_tokens - 1]).astype(np.int64)  # the last token opens a document too
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
  """What `name` holds where the loss counts, over all rows in order."""
  return np.concatenate([row[name][row['loss_mask'] > 0] for row in rows]).tolist()


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def order_of(rows):
  """The first token of each row: which window it is."""
  return [int(row['tokens'][0]) for row in rows]


# Windows.

@pytest.mark.parametrize(('num_tokens', 'seq_len'), [n for n in LENGTHS if n[0] > 1])
def test_every_token_but_the_first_is_a_target_once(num_tokens, seq_len):
  windows = make_windows(num_tokens, seq_len)
  rows = rows_of(windows)
  assert real(rows, 'targets') == tokens_of(windows)[1:].tolist()
  assert real(rows, 'tokens') == tokens_of(windows)[:-1].tolist()
  assert all(row['loss_mask'].any() for row in rows)


def test_shuffled_epochs_hold_every_target_once_too():
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
      if at >= 199:  # past the last token that has a target
        assert row['segment_ids'][t] == 0
        assert row['loss_mask'][t] == 0
        continue
      opens = t == 0 or at in starts
      segment, position = segment + opens, 0 if opens else position + 1
      assert (row['segment_ids'][t], row['positions'][t], row['loss_mask'][t]) == (segment, position, 1)


def test_segments_agree_with_the_special_tokens_of_the_row():
  # Written from the tokens alone: 0 opens each document, here as in a real store.
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


def test_order_is_a_shuffle_and_no_rotation():
  windows = make_windows(2000, 4)
  index = {first: i for i, first in enumerate(order_of(rows_of(windows)))}
  order = [index[first] for first in order_of(epoch_of(windows, 0))]
  steps = np.diff(order)
  assert len(set(steps.tolist())) > len(order) / 3
  assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.2


# Batches.

def batches_of(batch_size=8, rows=None, seed=0, **windows):
  rows = np.arange(batch_size) if rows is None else rows
  return train_batches(Endless(make_windows(**windows), seed), batch_size, rows)


def test_batch_n_holds_examples_n_times_batch_size_and_on():
  windows = make_windows()
  examples, batches = Endless(windows, 7), batches_of(seed=7)
  for n in (0, 3, 4, 40):  # an epoch is four batches
    batch = batch_at(batches, n)
    for row in range(8):
      assert_equal({name: x[row:row + 1] for name, x in batch.items()}, examples(np.array([n * 8 + row])))


@pytest.mark.parametrize('num_tokens', [100, 500])
def test_batches_cross_epochs_without_a_seam(num_tokens):
  # 5 rows a batch divide neither 7 nor 32 windows an epoch: some batches hold the end of one and the next one's start.
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
      assert_equal(batch, batch_at(random_access, n))  # asked again, after others
  assert (expected[begin]['tokens'] != batch_at(batches_of(seed=1), begin)['tokens']).any()


@pytest.mark.parametrize('kind', ['next_token', 'best_fit', 'mixture'])
def test_rows_kept_in_memory_are_those_made_again(corpora, kind, monkeypatch):
  calls, make = [], Examples.make
  monkeypatch.setattr(Examples, 'make', lambda *args: calls.append(args) or make(*args))
  expected = [batch_at(open_batches(corpora, kind), n) for n in range(60)]  # of several epochs, each by a fresh one
  calls.clear()
  kept = open_batches(corpora, kind)
  for n in range(60):
    assert_equal(batch_at(kept, n), expected[n])
  num_rows = {id(examples): len(examples) for examples, *_ in calls}
  assert sum(num_rows.values()) >= len(calls) - len(num_rows), 'a row was made twice'  # the first: for its shape

  monkeypatch.setattr(pipeline, 'KEPT_BYTES', 0)
  calls.clear()
  made = open_batches(corpora, kind)
  for n in range(60):
    assert_equal(batch_at(made, n), expected[n])
  assert len(calls) >= 60 * ROWS


def test_chance_is_of_seed_and_position():
  """Drawn again in each epoch, other for another seed, whatever else is asked; a set of one row has but one order."""
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


# Every kind of example, from text to batches.

KINDS = {
    'next_token': {},
    'overlapping': {'stride': 7, 'augment': Augment(jitter=True, token_dropout=0.1, token_replace=0.1)},
    'best_fit': {'packing': 'best_fit'},
    'fim': {'task': 'fim', 'packing': 'best_fit'},
    'span_corruption': {'task': 'span_corruption', 'packing': 'pad', 'encoder_len': 32},
    'prefix_lm': {'task': 'prefix_lm', 'packing': 'pad'},
    'mixture': {'sources': {'a': (1.0, 3.0), 'b': (2.0, 0.0), 'c': (0.0, 1.0)}, 'weights_from': (0, 5)},
}
ROWS = 8


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  """Three folders of documents of uneven lengths, in no two of which the same character is."""
  root = tmp_path_factory.mktemp('corpora')
  rng = np.random.default_rng(0)
  for i, name in enumerate('abc'):
    (root / name).mkdir()
    for number in range(30):
      text = ''.join(chr(0x4e00 + 2000 * i + int(c)) for c in rng.integers(0, 1000, rng.integers(1, 150)))
      (root / name / f'{number:02}.txt').write_text(text, encoding='utf-8')
  return root


def config_of(corpora, kind):
  options = dict(KINDS[kind])
  if 'sources' in options:
    options['sources'] = {name: SourceConfig(path=str(corpora / name), weight=weight)
                          for name, weight in options['sources'].items()}
  return DataConfig(**{'path': str(corpora / 'a'), 'tokenizer': 'char', 'seq_len': 24, 'split': 'tail',
                       'val_fraction': 0.1, 'shard_tokens': 500, 'cache_dir': str(corpora / 'cache'), **options})


def open_batches(corpora, kind, rows=range(ROWS), seed=3):
  config = config_of(corpora, kind)
  examples = mixed(config, train_sources(config, open_data(config)), lambda step: ROWS * step, seed)
  return train_batches(examples, ROWS, np.asarray(rows))


def digest(batch):
  return hashlib.sha256(b''.join(name.encode() + str(x.dtype).encode() + x.tobytes()
                                 for name, x in sorted(batch.items()))).hexdigest()[:16]


@pytest.mark.parametrize('kind', KINDS)
def test_batch_n_is_the_same_for_all_hosts_prefetched_or_not_and_after_a_start_at_n(corpora, kind):
  numbers = [0, 1, 4, 5, 6, 57, 100_000]  # the mixture changes at 5
  whole = open_batches(corpora, kind)
  expected = {n: batch_at(whole, n) for n in reversed(numbers)}
  assert len({digest(batch) for batch in expected.values()}) == len(numbers)
  assert digest(batch_at(open_batches(corpora, kind, seed=4), 5)) != digest(expected[5])
  for num_hosts in (1, 2, 4):
    for host, rows in enumerate(np.arange(ROWS).reshape(num_hosts, -1)):
      batches = open_batches(corpora, kind, rows)
      for begin, count in ((0, 7), (57, 1), (100_000, 1)):
        with contextlib.closing(prefetched(batches, begin)) as iterator:
          for n in range(begin, begin + count):
            batch = next(iterator)
            if n in expected:
              assert_equal(batch, {name: x[rows] for name, x in expected[n].items()}), (num_hosts, host, n)


OTHER_PROCESS = """
import sys
from pathlib import Path
import test_pipeline
for kind in test_pipeline.KINDS:
  batches = test_pipeline.open_batches(Path(sys.argv[1]), kind)
  print(kind, *(test_pipeline.digest(test_pipeline.batch_at(batches, n)) for n in (3, 5, 1000)))
"""


def test_batch_n_is_the_same_in_another_process(corpora):
  expected = [' '.join([kind, *(digest(batch_at(open_batches(corpora, kind), n)) for n in (3, 5, 1000))])
              for kind in KINDS]
  folder = str(__file__).rsplit('/', 1)[0]
  done = subprocess.run([sys.executable, '-c', OTHER_PROCESS, corpora], text=True, capture_output=True, cwd=folder)
  assert done.returncode == 0, done.stderr
  assert [line for line in done.stdout.splitlines() if not line.startswith('data:')] == expected


def test_worker_processes_make_the_same_batches(corpora):
  whole = open_batches(corpora, 'fim', rows=[1, 5])
  with contextlib.closing(prefetched(open_batches(corpora, 'fim', rows=[1, 5]), 4, num_workers=2)) as iterator:
    for n in range(4, 11):
      assert_equal(next(iterator), batch_at(whole, n))


# Tokens in = tokens in rows + dropped_tokens.

@pytest.mark.parametrize(('packing', 'truncate'), [('concat', 'auto'), *itertools.product(('best_fit', 'pad'),
                                                                                       ('split', 'left', 'right'))])
@pytest.mark.parametrize('tokenizer', ['char', 'word'])  # one special token; bos and eos
def test_tokens_in_are_tokens_in_rows_and_dropped_ones(corpora, packing, truncate, tokenizer):
  config = dataclasses.replace(config_of(corpora, 'next_token'), packing=packing, truncate=truncate,
                               tokenizer=tokenizer, pattern=r'\S')
  data = open_data(config)
  tokens = np.asarray(data.train['data'].tokens[:])
  for train in (True, False):
    examples = open_examples(config, data, data.train['data'], train=train)
    targets = np.array(real(rows_of(examples), 'targets'))
    if packing == 'concat':  # the first is no target
      np.testing.assert_array_equal(targets, tokens[1:])
      assert examples.dropped_tokens == 0
    else:  # each document's first is no target; the one after its last is, stored or not
      num_documents = len(data.train['data'].starts)
      ends = num_documents if data.bos_id == data.eos_id else 0
      assert len(targets) + examples.dropped_tokens == len(tokens) - num_documents + ends
      assert (examples.dropped_tokens > 0) == (truncate != 'split')
      if truncate == 'split':
        inner = np.delete(tokens, data.train['data'].starts)
        np.testing.assert_array_equal(np.sort(targets), np.sort(np.append(inner, [data.eos_id] * ends)))


@pytest.mark.parametrize('packing', ['concat', 'best_fit', 'pad'])
def test_an_epoch_of_batches_holds_every_target_once(corpora, packing):
  config = dataclasses.replace(config_of(corpora, 'next_token'), packing=packing)
  data = open_data(config)
  examples = open_examples(config, data, data.train['data'], train=True)
  batches = train_batches(mixed(config, train_sources(config, data), lambda step: step, seed=5), 1, np.arange(1))
  rows = [row for n in range(2 * len(examples)) for row in split(batch_at(batches, n))]
  for epoch in (rows[:len(examples)], rows[len(examples):]):
    assert sorted(real(epoch, 'targets')) == sorted(real(rows_of(examples), 'targets'))


def test_each_source_of_a_mixture_goes_through_its_own_epochs(corpora):
  config = config_of(corpora, 'mixture')
  data = open_data(config)
  batches = open_batches(corpora, 'mixture')
  rows = [row for n in range(150) for row in split(batch_at(batches, n))]
  owners = {}
  for name, store in data.train.items():
    owners |= dict.fromkeys(store.tokens[:].tolist(), name)
  special = data.bos_id
  by_source = {name: [] for name in data.train}
  for place, row in enumerate(rows):
    held = set(np.append(row['tokens'], row['targets'])[np.tile(row['loss_mask'] > 0, 2)].tolist()) - {special}
    [name] = {owners[token] for token in held}  # no row mixes sources
    by_source[name].append(row)
    assert name != 'c' or place >= 5 * ROWS, 'drawn in the stage where its weight is 0'
    assert name != 'b' or place < 5 * ROWS, 'drawn in the stage where its weight is 0'
  assert len(by_source['b']) == pytest.approx(5 * ROWS * 2 / 3, abs=1)
  assert len(by_source['c']) == pytest.approx(145 * ROWS / 4, abs=1)
  for name in 'ac':
    examples = open_examples(config, data, data.train[name], train=True)
    num_epochs = len(by_source[name]) // len(examples)
    assert num_epochs >= 2
    for epoch in range(num_epochs):
      found = by_source[name][epoch * len(examples):(epoch + 1) * len(examples)]
      assert sorted(real(found, 'targets')) == sorted(data.train[name].tokens[1:].tolist())


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
  assert len({len(rows) for rows in hosts}) == 1  # all take part in as many steps
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
  gaps = np.diff([*chosen, 32 + chosen[0]])  # around the ring
  assert gaps.max() - gaps.min() <= 1
