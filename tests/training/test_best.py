"""What a run remembers of its evaluations, whatever it monitors."""

import json

import pytest

from llm_jax.base.builder import build
from llm_jax.base.conditions import condition
from llm_jax.base.errors import ConfigError
from llm_jax.config import Config, EvalConfig
from llm_jax.training.best import Best


def seen(config, values, metric='val/accuracy'):
  best = Best(config)
  for step, value in enumerate(values, 1):
    best.update(step, {metric: value})
  return best


@pytest.mark.parametrize(('mode', 'values', 'stale'), [
    ('max', [0.1, 0.5, 0.4, 0.5], 2), ('max', [0.1, 0.2, 0.3], 0), ('min', [0.1, 0.5, 0.4, 0.5], 3),
    ('max', [0.5, 0.509], 1),  # by less than min_delta
    ('min', [float('nan'), float('nan')], 2)])
def test_patience_counts_evaluations_since_the_best(mode, values, stale):
  config = EvalConfig(monitor='val/accuracy', mode=mode, patience=2, min_delta=0.01)
  best = seen(config, values)
  assert best.stale == stale and bool(best.over) == (stale >= 2)


def test_checkpoints_restore_best_for_the_same_monitor():
  config = EvalConfig(monitor='val/accuracy', mode='max', patience=3, capabilities=('val/accuracy > 0.3',))
  best = seen(config, [0.2, 0.5, 0.4])
  kept = json.loads(json.dumps(best.to_meta()))
  assert Best.from_meta(config, kept and {'best': kept}) == best
  other = Best.from_meta(EvalConfig(), {'best': kept})
  assert (other.best, other.stale) == (float('inf'), 0) and other.reached == {'val/accuracy > 0.3': 2}
  elsewhere = Best.from_meta(config, {'best': kept, 'step': 7}, other_data=True)
  assert elsewhere == Best(config, since=7, reached=other.reached)
  assert Best.from_meta(EvalConfig(), {}) == Best(EvalConfig())


def test_a_capability_is_reported_once_with_its_first_step():
  config = EvalConfig(monitor='val/accuracy', mode='max', capabilities=('val/accuracy > 0.5', 'val/accuracy >= 0.9'))
  best = Best(config)
  told = [best.update(step, {'val/accuracy': value})[1] for step, value in ((10, 0.4), (20, 0.6), (30, 0.4), (40, 0.9))]
  assert told == [[], ['val/accuracy > 0.5'], [], ['val/accuracy >= 0.9']]
  assert best.reached == {'val/accuracy > 0.5': 20, 'val/accuracy >= 0.9': 40}


def test_retention_is_the_share_of_reached_capabilities_that_still_hold():
  best = Best(EvalConfig(monitor='val/accuracy', mode='max', goal='val/accuracy > 0.9',
                         capabilities=('val/accuracy > 0.3', 'val/accuracy > 0.5')))
  retained = []
  for step, value in enumerate((0.2, 0.4, 0.6, 0.4, 0.1), 1):
    best.update(step, results := {'val/accuracy': value})
    retained.append(best.retention(results))
  assert retained == [{}, *({'capability/retained': share} for share in (1.0, 1.0, 0.5, 0.0))]
  kept = Best.from_meta(EvalConfig(capabilities=('val/accuracy > 0.3',)), {'best': best.to_meta()})
  assert kept.retention({'val/accuracy': 0.4}) == {'capability/retained': 1.0}, 'of those that are asked for now'


def test_a_reached_goal_ends_the_run_for_good():
  best = Best(EvalConfig(monitor='val/accuracy', mode='max', goal='val/accuracy >= 0.9'))
  for step, value in ((10, 0.5), (20, 0.95), (30, 0.1)):
    best.update(step, {'val/accuracy': value})
    assert bool(best.over) == (step > 10)
  assert best.over == 'val/accuracy >= 0.9 was reached at step 20 (config.eval.goal)'


def test_a_missing_metric_is_reported_with_known_ones():
  for config in (EvalConfig(monitor='val/accuracy'), EvalConfig(capabilities=('val/accuracy > 0.5',))):
    with pytest.raises(ConfigError, match=r'config\.eval: .*val/accuracy.*val/loss'):
      Best(config).update(1, {'val/loss': 1.0})


@pytest.mark.parametrize('text', ['val/accuracy', 'val/accuracy = 0.5', 'val/accuracy > much', '> 0.5', '1 > 2 > 3'])
def test_an_invalid_condition_is_reported(text):
  with pytest.raises(ConfigError, match='is not a condition'):
    build(Config, {'eval': {'capabilities': [text]}})
  assert condition('val/loss<=-1e-3') == ('val/loss', '<=', -1e-3)
