"""Augmentation changes its share of the input tokens, and nothing else."""

from collections import Counter

import numpy as np
from test_rows import BOS, make_store
from test_tasks import VOCAB, make, rows_of

from llm_jax.data.rows.augment import Augment
from llm_jax.data.rows.tasks import NextToken
from llm_jax.extras.tasks import SpanCorruption


def test_augmentation_changes_only_its_share_of_input_tokens():
  store = make_store([50] * 300)
  settings_ = {'seq_len': 64, 'packing': 'pad'}
  plain = make(store, NextToken(), **settings_)
  augmented = make(store, NextToken(), **settings_, augment=Augment(token_dropout=0.1, token_replace=0.2))
  counts = Counter()
  for a, b in zip(rows_of(plain), rows_of(augmented), strict=True):
    for name in a.keys() - {'tokens'}:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    changed = a['tokens'] != b['tokens']
    assert not changed[a['segment_ids'] == 0].any()
    inner = (a['segment_ids'] > 0) & (a['positions'] > 0)
    counts['all'] += inner.sum()
    counts['dropped'] += (inner & (b['tokens'] == BOS)).sum()
    counts['replaced'] += (inner & changed & (b['tokens'] != BOS)).sum()
    assert (b['tokens'] < VOCAB).all()
  assert abs(counts['dropped'] / counts['all'] - 0.1) < 0.01
  assert abs(counts['replaced'] / counts['all'] - 0.2) < 0.015
  assert augmented.random
  assert not plain.random


def test_augmentation_reaches_the_encoder_but_not_sentinels():
  store = make_store([40] * 20)
  rows = rows_of(make(store, SpanCorruption(), encoder_len=64, seq_len=64, augment=Augment(token_dropout=1.0)))
  for row in rows:
    for name, segments in (('encoder_tokens', 'encoder_segment_ids'), ('tokens', 'segment_ids')):
      assert set(row[name][row[segments] > 0].tolist()) == {BOS, VOCAB, VOCAB + 1}
    assert ((row['targets'] > BOS) & (row['targets'] < VOCAB)).sum() == 6


def test_jitter_moves_windows_inside_the_store():
  store = make_store([1000])
  examples = make(store, NextToken(), seq_len=10, augment=Augment(jitter=True))
  begins = {i: {int(examples.make(i, np.random.default_rng(seed))['targets'][0]) - 2 for seed in range(300)}
            for i in (0, 50, len(examples) - 1)}
  assert begins == {0: set(range(5)), 50: set(range(495, 505)), 99: {*range(985, 990)}}
  assert len(rows_of(examples)) == 100
  short = make(make_store([5]), NextToken(), seq_len=10, augment=Augment(jitter=True))
  assert short.make(0, np.random.default_rng(0))['targets'][:5].tolist() == [2, 3, 4, 5, 0]
