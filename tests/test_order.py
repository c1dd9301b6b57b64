"""Each epoch is a permutation of all rows, the same wherever it is asked, and as even as chance."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.order import BLOCK, order

property_test = settings(max_examples=50, deadline=None, derandomize=True, database=None)
sizes = st.one_of(st.integers(1, 50), st.integers(1, 20_000))


def epoch_of(num_rows, seed, epoch=0):
  return order(np.arange(epoch * num_rows, (epoch + 1) * num_rows), num_rows, seed)


@property_test
@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_each_epoch_holds_each_row_once(num_rows, seed, epoch):
  np.testing.assert_array_equal(np.sort(epoch_of(num_rows, seed, epoch)), np.arange(num_rows))


@property_test
@given(sizes, st.integers(0, 2**32 - 1), st.integers(0, 10**12), st.integers(1, 2 * BLOCK))
def test_a_row_is_a_function_of_its_position(num_rows, seed, begin, count):
  positions = np.arange(begin, begin + count)
  rows = order(positions, num_rows, seed)
  some = np.random.default_rng(seed).permutation(count)[:20]
  np.testing.assert_array_equal(order(positions[some], num_rows, seed), rows[some])
  assert (rows[some[:1]] == order(positions[some[:1]], num_rows, seed)).all()


def test_more_rows_than_32_bits_count():
  num_rows = 10**15
  rows = order(np.arange(num_rows - 10_000, num_rows + 10_000), num_rows, 0)  # of two epochs
  assert len(set(rows.tolist())) == 20_000 and rows.min() >= 0 and rows.max() < num_rows
  assert 0.45 < rows.mean() / num_rows < 0.55


def test_epochs_and_seeds_differ():
  orders = [tuple(epoch_of(50, seed, epoch).tolist()) for seed in range(20) for epoch in range(20)]
  assert len(set(orders)) == 400


@pytest.mark.parametrize('num_rows', [2, 3, 4, 5, 6])
def test_all_permutations_are_equally_frequent(num_rows):
  num_permutations = math.factorial(num_rows)
  counts = Counter(tuple(epoch_of(num_rows, 0, epoch).tolist()) for epoch in range(20 * num_permutations))
  found = np.array([counts[p] for p in itertools.permutations(range(num_rows))])
  freedom = num_permutations - 1
  assert ((found - 20)**2 / 20).sum() < freedom + 5 * math.sqrt(2 * freedom)  # chi-square: mean k, variance 2 k


@pytest.mark.parametrize('num_rows', [100, 1000, 4096, 30_001])
def test_where_a_row_comes_tells_nothing_of_it(num_rows):
  epochs = np.array([epoch_of(num_rows, 1, epoch) for epoch in range(100_000 // num_rows)])
  places = np.tile(np.arange(num_rows), len(epochs))
  counts, _, _ = np.histogram2d(places, epochs.ravel(), bins=10)
  expected = len(places) / 100
  assert ((counts - expected)**2 / expected).sum() < 81 + 5 * math.sqrt(2 * 81)
  # Neighbours are as far from each other as two rows drawn at random: a third of all, on average.
  assert np.abs(np.diff(epochs, axis=1)).mean() / num_rows == pytest.approx(1 / 3, abs=0.01)
  # As many rows stay where they are, and follow the one before them, as chance leaves: one of each an epoch.
  for events in (epochs == np.arange(num_rows), np.diff(epochs, axis=1) == 1):
    assert abs(events.sum() - len(epochs)) < 5 * math.sqrt(len(epochs))
