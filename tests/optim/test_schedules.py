"""Learning rates by step against their papers' equations."""

import math

import jax
import numpy as np
import pytest

from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.config import Config
from llm_jax.optim.chain import SCHEDULES, OptimConfig

PEAK, STEPS = 0.5, 100


def values(name, num_steps=STEPS, first_count=0, **sections):
  config = build(OptimConfig, {'learning_rate': PEAK, 'schedule': name, 'first_count': first_count, **sections})
  schedule = config.make_schedule(num_steps)
  return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(num_steps + 1)))


def climb(step, warmup):
  return PEAK * step / warmup


def cosine(x):
  return (1 + math.cos(math.pi * x)) / 2


def warm(warmup, after):
  return lambda step: climb(step, warmup) if step < warmup else PEAK * after((step - warmup) / (STEPS - warmup))


def triangle(step):
  cycle = step // 20
  return PEAK * (0.2 + 0.8 * (1 - abs(step / 10 - 2 * cycle - 1)) * 0.5**cycle)


def restarts(step):
  begin, length, peak = 0, 10, 1.0
  while step >= begin + length and begin + length < STEPS:
    begin, length, peak = begin + length, 2 * length, 0.5 * peak
  return PEAK * peak * (0.1 + 0.9 * cosine(min(1, (step - begin) / length)))


@pytest.mark.parametrize(('name', 'settings', 'expected'), [
    ('warmup_cosine', {'warmup_steps': 10, 'end_factor': 0.2}, warm(10, lambda x: 0.2 + 0.8 * cosine(x))),
    ('warmup_linear', {'warmup_steps': 10, 'end_factor': 0.2}, warm(10, lambda x: 1 - 0.8 * x)),
    ('polynomial', {'warmup_steps': 10, 'power': 3.0, 'end_factor': 0.2}, warm(10, lambda x: 0.2 + 0.8 * (1 - x)**3)),
    ('constant', {'warmup_steps': 10}, warm(10, lambda x: 1)),
    ('constant', {}, lambda step: PEAK),
    ('inverse_sqrt', {'warmup_steps': 16}, lambda s: climb(s, 16) if s < 16 else PEAK * math.sqrt(16 / s)),
    ('wsd', {'warmup_steps': 10, 'decay_steps': 20, 'shape': 'sqrt'},
     lambda s: climb(s, 10) if s < 10 else PEAK * (1 - math.sqrt(max(0, s - 80) / 20))),
    ('wsd', {'decay_steps': 50, 'shape': 'linear', 'end_factor': 0.5},
     lambda s: PEAK * (1 - 0.5 * max(0, s - 50) / 50)),
    ('wsd', {'decay_steps': 50, 'shape': 'cosine'}, lambda s: PEAK * cosine(max(0, s - 50) / 50)),
    ('one_cycle', {'pct_start': 0.2, 'div_factor': 10.0, 'final_div_factor': 100.0},  # as torch's OneCycleLR
     lambda s: PEAK * (0.1 + 0.9 * (1 - cosine(s / 19)) if s < 19 else 0.001 + 0.999 * cosine((min(s, 99) - 19) / 80))),
    ('cyclic', {'half_steps': 10, 'min_factor': 0.2, 'shrink': 0.5}, triangle),
    ('restarts', {'period': 10, 'multiply': 2.0, 'shrink': 0.5, 'end_factor': 0.1}, restarts),
    ('phases', {'warmup_steps': 10, 'factors': [1.0, 5.0, 0.2], 'boundaries': [20, 60]},
     lambda s: climb(s, 10) if s < 10 else PEAK * (1 if s < 20 else 5 if s < 60 else 0.2)),
])
def test_schedules_match_their_equations(name, settings, expected):
  np.testing.assert_allclose(values(name, **{name: settings}), [expected(s) for s in range(STEPS + 1)], rtol=1e-6,
                             atol=1e-6 * PEAK)


@pytest.mark.parametrize(('name', 'settings'), [
    ('warmup_cosine', {'warmup_steps': 10}), ('warmup_linear', {'warmup_steps': 10}),
    ('constant', {'warmup_steps': 10}), ('inverse_sqrt', {'warmup_steps': 10}),
    ('wsd', {'warmup_steps': 10, 'decay_steps': 20, 'end_factor': 0.1})])
def test_by_default_the_first_update_has_a_rate_and_the_last_one_the_end_value(name, settings):
  rates, counted = values(name, first_count=1, **{name: settings}), values(name, **{name: settings})
  np.testing.assert_allclose(rates[:STEPS], counted[1:], rtol=1e-6)
  assert rates[0] == pytest.approx(PEAK / 10) and rates[9] == pytest.approx(PEAK)
  assert rates[STEPS - 1] == pytest.approx(counted[STEPS])


@pytest.mark.parametrize('first_count', [0, 1])
def test_a_phase_has_as_many_updates_as_its_boundaries_say(first_count):
  rates = values('phases', first_count=first_count, phases={'factors': [1.0, 5.0, 0.2], 'boundaries': [20, 60]})
  np.testing.assert_allclose(rates[:STEPS], PEAK * np.repeat([1.0, 5.0, 0.2], [20, 40, 40]), rtol=1e-6)


def test_rewarm_raises_the_rate_from_zero_again():
  plain, got = (values('warmup_cosine', first_count=1, **given) for given in ({}, {'rewarm': [50, 10]}))
  np.testing.assert_array_equal(got[:50], plain[:50])
  np.testing.assert_allclose(got[50:60] / plain[50:60], np.arange(1, 11) / 10, rtol=1e-5)
  np.testing.assert_array_equal(got[60:], plain[60:])


@pytest.mark.parametrize(('name', 'settings', 'fitted'), [
    ('warmup_cosine', {'warmup_steps': 200}, {'warmup_steps': 10}),
    ('warmup_cosine', {'warmup_steps': 19}, {'warmup_steps': 19}),
    ('wsd', {'warmup_steps': 600, 'decay_steps': 200}, {'warmup_steps': 7, 'decay_steps': 2}),
    ('constant', {'warmup_steps': 20}, {'warmup_steps': 10})])
def test_a_short_run_shortens_warm_up_and_decay(name, settings, fitted):
  given = build(OptimConfig, {'learning_rate': PEAK, 'schedule': name, name: settings})
  short = build(OptimConfig, {'learning_rate': PEAK, 'schedule': name, name: fitted})
  schedules = [config.make_schedule(20) for config in (given, short)]
  np.testing.assert_array_equal(*([float(schedule(n)) for n in range(20)] for schedule in schedules))
  lines = given.shortened(20)
  assert len(lines) == sum(settings[field] != fitted[field] for field in settings)
  for line, field in zip(lines, settings, strict=False):
    assert f'{name}.{field}: {settings[field]} is shortened to {fitted[field]}, as the run has 20 steps' in line


def test_restarts_decrease_between_restarts():
  got = values('restarts', restarts={'period': 10, 'multiply': 1.0, 'shrink': 0.5, 'end_factor': 0.1})[:STEPS]
  cycles = got.reshape(-1, 10)
  assert (np.diff(cycles) < 0).all() and (np.diff(cycles[:, 0]) < 0).all()
  np.testing.assert_allclose(cycles, PEAK * 0.5 ** np.arange(10)[:, None] * (cycles[0] / PEAK), rtol=1e-5)


def test_composite_runs_parts_in_sequence():
  got = values('composite', composite={'parts': ['constant', 'warmup_cosine', 'warmup_linear'], 'boundaries': [20, 60]},
               constant={'warmup_steps': 4}, warmup_cosine={'end_factor': 0.0})
  np.testing.assert_allclose(got[:20], values('constant', 20, constant={'warmup_steps': 4})[:20], rtol=1e-6)
  np.testing.assert_allclose(got[20:60], values('warmup_cosine', 40, warmup_cosine={'end_factor': 0.0})[:40], rtol=1e-6)
  np.testing.assert_allclose(got[60:], values('warmup_linear', 40), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', [name for name in SCHEDULES if name != 'composite'])
def test_rates_are_finite_and_at_most_the_peak(name):
  config = build(OptimConfig, {'learning_rate': PEAK, 'schedule': name})
  rates = np.array([float(config.make_schedule(3000)(step)) for step in (*range(0, 3000, 100), 3000)])
  assert np.isfinite(rates).all() and (rates >= 0).all()
  assert rates.max() == pytest.approx(PEAK * (5 if name == 'phases' else 1), rel=0.01)


@pytest.mark.parametrize(('given', 'words'), [
    ({'schedule': 'composite'}, ['composite.parts', 'warmup_cosine']),
    ({'schedule': 'composite', 'composite': {'parts': ['composite']}}, ["'composite'", 'unknown']),
    ({'schedule': 'composite', 'composite': {'parts': ['constant', 'cyclic']}}, ['boundaries', '1 steps for 2 parts']),
    ({'schedule': 'phases', 'phases': {'factors': [], 'boundaries': []}}, ['phases', 'factors', 'at least one']),
    ({'schedule': 'phases', 'phases': {'boundaries': [3, 2, 1]}}, ['boundaries must be increasing', '3, 2, 1']),
    ({'schedule': 'wsd', 'wsd': {'shape': 'round'}}, ['shape', 'linear', 'sqrt', 'cosine']),
    ({'schedule': 'one_cycle', 'one_cycle': {'pct_start': 1.0}}, ['pct_start', '1.0']),
    ({'schedule': 'inverse_sqrt', 'inverse_sqrt': {'warmup_steps': 0}}, ['warmup_steps', 'positive']),
    ({'schedule': 'warmup_linear', 'warmup_linear': {'end_factor': 2.0}}, ['end_factor', '[0, 1]', '2.0']),
])
def test_invalid_settings_are_reported(given, words):
  with pytest.raises(ConfigError) as e:
    build(OptimConfig, given)
  assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize(('given', 'words'), [
    ({'schedule': 'composite', 'composite': {'parts': ['constant', 'warmup_cosine'], 'boundaries': [900]},
      'warmup_cosine': {'warmup_steps': 200}}, ['boundaries leave warmup_cosine 100 steps', 'warm-up']),
    ({'schedule': 'composite', 'composite': {'parts': ['constant', 'warmup_cosine'], 'boundaries': [2000]}},
     ['composite.boundaries', '0 steps', '1000']),
    ({'schedule': 'phases'}, ['phases.boundaries 1000, 6000, 8000', 'num_steps 1000']),
    ({'schedule': 'phases', 'phases': {'warmup_steps': 50, 'factors': [1.0, 2.0], 'boundaries': [20]}}, ['20', '50']),
])
def test_settings_that_do_not_fit_the_run_are_reported(given, words):
  with pytest.raises(ConfigError) as e:
    build(Config, {'optim': given})
  assert all(word in str(e.value) for word in words), e.value
