"""A mixture draws exact, evenly spread shares, and takes each source's examples in order without gap or repeat."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.rows.mixture import CYCLE, Mixture

property_test = settings(max_examples=20, deadline=None, derandomize=True, database=None)
weight_lists = st.integers(1, 5).flatmap(lambda n: st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1), st.integers(1, 9)), min_size=n, max_size=n)).filter(any)


def drawn(mixture, begin, end):
  """(sources, indices in them) of the mixture's examples [begin, end)."""
  return mixture(np.arange(begin, end))


def pair_of(mixture, index):
  [[source], [example]] = drawn(mixture, index, index + 1)
  return int(source), int(example)


def stages_of(draw, num_stages, longest=3000):
  """Weights [stage][source] and the example at which each stage begins."""
  num_sources = draw(st.integers(1, 4))
  weights = draw(st.lists(st.lists(st.sampled_from([0, 0, 1, 2, 0.3, 7.5]), min_size=num_sources, max_size=num_sources)
                          .filter(any), min_size=num_stages, max_size=num_stages))
  lengths = draw(st.lists(st.integers(1, longest), min_size=num_stages - 1, max_size=num_stages - 1))
  return weights, [0, *np.cumsum(lengths).tolist()]


@property_test
@given(weight_lists)
def test_shares_of_a_cycle_are_exact(weights):
  sources, _ = drawn(Mixture([weights], [0]), 0, CYCLE)
  counts = np.bincount(sources, minlength=len(weights))
  shares = np.array(weights) / np.sum(weights)
  # Sources with a share below one example per cycle get one, at the cost of the others.
  num_rare = np.sum((shares > 0) & (shares * CYCLE < 1))
  assert (np.abs(counts - shares * CYCLE) <= 1 + num_rare).all()
  assert ((counts > 0) == (shares > 0)).all()


@property_test
@given(weight_lists)
def test_sources_are_evenly_spread_from_the_first_example(weights):
  length = CYCLE + 500
  sources, _ = drawn(Mixture([weights], [0]), 0, length)
  shares = np.bincount(sources[:CYCLE], minlength=len(weights)) / CYCLE
  counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
  assert np.abs(counts - shares * np.arange(1, length + 1)[:, None]).max() <= len(weights)


@property_test
@given(st.data())
def test_each_source_continues_across_cycles_and_stages(data):
  weights, begins = stages_of(data.draw, data.draw(st.integers(1, 4)))
  mixture = Mixture(weights, begins)
  sources, examples = drawn(mixture, 0, begins[-1] + 3000)
  for source in range(len(weights[0])):
    own = examples[sources == source]
    np.testing.assert_array_equal(own, np.arange(len(own)))
  for stage, begin in enumerate(begins):
    end = [*begins, len(sources)][stage + 1]
    held = {source for source, weight in enumerate(weights[stage]) if weight > 0}
    assert set(sources[begin:end].tolist()) <= held, 'drawn in a stage where its weight is 0'


@pytest.mark.parametrize('length', [CYCLE - 1, CYCLE, CYCLE + 1, 2 * CYCLE + 7])
def test_stages_of_several_cycles_are_counted_right(length):
  mixture = Mixture([[1, 2.5, 0], [0, 1, 1]], [0, length])
  sources, examples = drawn(mixture, 0, length + 300)
  for source in range(3):
    own = examples[sources == source]
    np.testing.assert_array_equal(own, np.arange(len(own)))


@property_test
@given(st.data(), st.integers(0, 10**15))
def test_example_n_is_computed_without_those_before(data, ahead):
  weights, begins = stages_of(data.draw, 2)
  index = begins[-1] + ahead
  mixture, other = Mixture(weights, begins), pickle.loads(pickle.dumps(Mixture(weights, begins)))  # noqa: S301
  source, example = pair_of(mixture, index)
  assert pair_of(other, index) == (source, example)
  share = weights[-1][source] / sum(weights[-1])
  assert example == pytest.approx(share * ahead, rel=2 / CYCLE / share, abs=begins[-1] + CYCLE)
  sources, examples = drawn(mixture, index + 1, index + 1 + CYCLE)
  assert examples[sources == source][0] == example + 1


@property_test
@given(weight_lists, st.floats(0.01, 1000))
def test_the_scale_of_the_weights_does_not_matter(weights, scale):
  a, b = Mixture([weights], [0]), Mixture([[scale * weight for weight in weights]], [0])
  shares = [np.bincount(drawn(m, 0, CYCLE)[0], minlength=len(weights)) for m in (a, b)]
  assert np.abs(shares[0] - shares[1]).max() <= 1  # rounding may change one example


def test_new_weights_do_not_change_earlier_examples():
  a, b = Mixture([[3, 1]], [0]), Mixture([[3, 1], [1, 1]], [0, 700])
  np.testing.assert_array_equal(drawn(a, 0, 700), drawn(b, 0, 700))
