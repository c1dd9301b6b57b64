"""Each epoch is a permutation of all rows, the same at any access, and statistically uniform."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.rows.order import BLOCK, GOLDEN, VERSION, _block, order, permuted, scrambled

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
  _block.cache_clear()
  np.testing.assert_array_equal(order(positions[some], num_rows, seed), rows[some])


@pytest.mark.parametrize(('begin', 'num_rows', 'seed', 'rows'), [
    (0, 1000, 0, [110, 899, 641, 998, 605, 646, 833, 939]),
    (10**12, 30_001, 2**32 - 1, [27765, 3557, 1473, 29364, 23865, 27730, 29574, 4845]),
    (3, 7, 1, [5, 4, 6, 2, 2, 4, 3, 1])])
def test_the_order_never_changes(begin, num_rows, seed, rows):
  """Resumed runs depend on this order: a different result needs a new VERSION."""
  assert (order(np.arange(begin, begin + 8), num_rows, seed).tolist(), VERSION) == (rows, 2)


def test_order_works_beyond_32_bits():
  num_rows = 10**15
  rows = order(np.arange(num_rows - 10_000, num_rows + 10_000), num_rows, 0)  # in two epochs
  assert len(set(rows.tolist())) == 20_000 and rows.min() >= 0 and rows.max() < num_rows
  assert 0.45 < rows.mean() / num_rows < 0.55


def test_epochs_and_seeds_differ():
  orders = [tuple(epoch_of(50, seed, epoch).tolist()) for seed in range(20) for epoch in range(20)]
  assert len(set(orders)) == 400


@pytest.mark.parametrize(('num_rows', 'times'), [(2, 1000), (3, 1000), (4, 1000), (5, 200), (6, 200), (7, 20)])
def test_all_permutations_are_equally_frequent(num_rows, times):
  num_permutations = math.factorial(num_rows)
  epochs = order(np.arange(times * num_permutations * num_rows), num_rows, 0).reshape(-1, num_rows)
  _, counts = np.unique(epochs @ num_rows**np.arange(num_rows), return_counts=True)
  chi_square = ((counts - times)**2 / times).sum() + (num_permutations - len(counts)) * times
  freedom = num_permutations - 1
  assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # mean k, variance 2 k


@pytest.mark.parametrize('num_rows', [8, 9, 24, 25, 49])
def test_half_of_the_permutations_are_odd(num_rows):
  epochs = order(np.arange(1000 * num_rows), num_rows, 0).reshape(-1, num_rows)
  inversions = np.triu(epochs[:, :, None] > epochs[:, None, :], 1).sum((1, 2))
  assert abs((inversions % 2).sum() - 500) < 5 * math.sqrt(250)


def unscrambled(y):
  """The x with scrambled(x) = y, in Python integers."""
  for factor, shift in ((0x94D049BB133111EB, 31), (0xBF58476D1CE4E5B9, 27), (GOLDEN, 30)):
    x = y
    for _ in range(64 // shift):
      x = y ^ x >> shift
    y = x * pow(factor, -1, 2**64) % 2**64
  return (y - 1) % 2**64


@pytest.mark.parametrize('size', [9, 100, 10_007])
def test_permutation_survives_large_round_function_values(size):
  noise, half = 2**64 - 2, 2
  key = unscrambled((unscrambled(noise) - half) % 2**64)  # gives this noise for this half in the first round
  keys = np.full(size, key, np.uint64)
  assert scrambled(np.array([half], np.uint64) + scrambled(keys[:1])) == noise
  np.testing.assert_array_equal(np.sort(permuted(np.arange(size, dtype=np.uint64), size, keys)), np.arange(size))


@pytest.mark.parametrize('num_rows', [100, 1000, 4096, 30_001])
def test_positions_are_independent_of_rows(num_rows):
  epochs = np.array([epoch_of(num_rows, 1, epoch) for epoch in range(100_000 // num_rows)])
  places = np.tile(np.arange(num_rows), len(epochs))
  counts, _, _ = np.histogram2d(places, epochs.ravel(), bins=10)
  expected = len(places) / 100
  assert ((counts - expected)**2 / expected).sum() < 81 + 5 * math.sqrt(2 * 81)
  # Neighbours are as far apart as two random rows: a third of num_rows, on average.
  assert np.abs(np.diff(epochs, axis=1)).mean() / num_rows == pytest.approx(1 / 3, abs=0.01)
  # Rows stay in place, and follow their predecessor, as often as by chance: each once per epoch on average.
  for events in (epochs == np.arange(num_rows), np.diff(epochs, axis=1) == 1):
    assert abs(events.sum() - len(epochs)) < 5 * math.sqrt(len(epochs))
