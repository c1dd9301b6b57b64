"""The filter skip_spikes, and steps that would overflow the optimizer's state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from program import write_config

import llm_jax
from llm_jax.base.builder import build
from llm_jax.base.errors import DivergedError
from llm_jax.extras.spikes import SkipSpikes
from llm_jax.optim.chain import OptimConfig, make_optimizer
from llm_jax.optim.guard import guarded_update
from llm_jax.training.finite import _are_bad, non_finite

CHAIN = {'chain': ('skip_spikes', 'adamw'), 'skip_spikes': {'window': 8}, 'schedule': 'constant'}


def judged(losses, norms=None, **settings):
  """Indices of the steps that are skipped."""
  link, found = SkipSpikes(**settings), []
  state = link.make(None, None).init({})
  judge = jax.jit(link.judge)
  for i, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
    allowed, state = judge(state, jnp.float32(loss), jnp.float32(norm))
    found += [] if allowed else [i]
  assert int(state.total) == len(found)
  return found


def test_what_is_a_spike():
  noise = np.random.default_rng(0).normal(size=60)
  falling = (5 * np.exp(-np.arange(60) / 30) + 0.05 * noise).tolist()
  assert judged(falling, window=16) == []
  spiked = [9.0 if i in (3, 30, 45) else x for i, x in enumerate(falling)]
  assert judged(spiked, window=16) == [30, 45], 'at 3 the window is not full'
  assert judged(falling, [50.0 if i == 40 else 1 + 0.1 * abs(x) for i, x in enumerate(noise)], window=16) == [40]
  assert judged([np.nan if i == 20 else x for i, x in enumerate(falling)], window=16) == [], 'not kept in the window'
  assert judged([2.0] * 20 + [2.001] * 5, window=8) == [], 'equal losses are no noise scale'
  shifted = judged([2.0] * 20 + [4.0] * 20, window=8)
  assert shifted and shifted[-1] < 30, 'a lasting change of level is accepted in the end'


def test_a_spike_changes_nothing_but_the_window():
  tx = make_optimizer(build(OptimConfig, CHAIN), 100)
  params = {'w': jnp.ones(3)}
  state, update = tx.init(params), jax.jit(lambda *args: guarded_update(
      tx, args[0], args[1], args[2], loss=args[3], extra_loss=jnp.float32(0)))
  for i in range(10):
    params, state, metrics = update({'w': jnp.full(3, 0.1)}, state, params, jnp.float32(2 + 0.01 * (i % 3)))
    assert metrics['skipped'] == 0
  after, spiked, metrics = update({'w': jnp.full(3, 0.1)}, state, params, jnp.float32(7))
  assert metrics['skipped'] == 1 and tx.report(spiked)['spike'] == 1 and tx.report(spiked)['spike_score'] > 6
  jax.tree.map(np.testing.assert_array_equal, (after, spiked[1:]), (params, state[1:]))


@pytest.mark.parametrize(('gradient', 'skipped'), [
    (1e14, 0), (1e16, 1), (1e18, 1), (1e30, 1), (np.nan, 1), (np.inf, 1)])
@pytest.mark.parametrize('chain', [('adamw',), ('grokfast_ema', 'adam'), ('adafactor',), ('sgd',)])
def test_no_gradient_makes_the_state_overflow(gradient, skipped, chain):
  tx = make_optimizer(build(OptimConfig, {'chain': chain, 'schedule': 'constant', 'learning_rate': 1e-3}), 100)
  params = {'w': jnp.ones((4, 4))}
  state = tx.init(params)
  for value in (1.0, gradient, gradient, 1.0):
    params, state, metrics = guarded_update(tx, {'w': jnp.full((4, 4), 0.1).at[0, 0].set(value)}, state, params,
                                            loss=jnp.float32(1), extra_loss=jnp.float32(0))
    assert metrics['skipped'] == (skipped if value == gradient or value != value else 0)
    assert non_finite({'params': params, 'state': state}) == []


def test_arrays_that_must_not_be_saved_are_named():
  tree = {'a': {'w': jnp.array([1.0, np.nan])}, 'b': jnp.array([1e31]), 'c': jnp.ones(2), 'best': jnp.float32(np.inf),
          'step': jnp.int32(2)}
  assert non_finite(tree) == ['a/w', 'b']
  on_devices = _are_bad((tree['a']['w'], tree['b'], tree['c'], tree['best']))  # as several processes find it
  assert on_devices.tolist() == [True, True, False, False]


@pytest.mark.slow
def test_a_resumed_run_skips_the_same_spikes_with_the_same_bits(tmp_path):
  settings = {'num_steps': 20, 'eval.every': 0, 'checkpoint.every': 10, 'optim.chain': ('skip_spikes', 'adamw'),
              'optim.skip_spikes.window': 8, 'optim.skip_spikes.threshold': 0.5}
  config = llm_jax.load_config(write_config(tmp_path), **settings)

  def lines(workdir, config):
    return {line['step']: [line[f'train/{name}'] for name in ('loss', 'grad_norm', 'spikes', 'spike_score', 'skipped')]
            for line in llm_jax.train(config, tmp_path / workdir)}

  whole = lines('whole', config)
  parts = lines('parts', dataclasses.replace(config, num_steps=10)) | lines('parts', config)
  assert parts == whole and whole[20][2] >= 1
  assert sum(values[4] for values in whole.values()) == whole[20][2], 'each skipped step is counted'


@pytest.mark.slow
def test_a_run_whose_weights_explode_ends_and_its_last_checkpoint_is_sound(tmp_path):
  config = llm_jax.load_config(write_config(tmp_path), **{'num_steps': 60, 'eval.every': 0, 'checkpoint.every': 4})

  def explode(count):
    return jnp.where(count < 10, 1e-3, 1e33)  # the update of step 11

  with pytest.raises(DivergedError):
    for _ in llm_jax.train(config, tmp_path / 'run', tx=optax.adam(explode)):
      pass
  saved = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').glob('*') if path.name.isdigit()]
  assert sorted(saved) == [4, 8]

