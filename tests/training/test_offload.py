"""Optimizer state and weights in the host's memory: the same training, also resumed with another mode."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from program import write_config

import llm_jax
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.optim.chain import as_optimizer
from llm_jax.optim.guard import guarded_update
from llm_jax.training.log import read_metrics

SETTINGS = {'num_steps': 12, 'eval.every': 6, 'checkpoint.every': 4, 'model.dropout': 0.0, 'mesh.fsdp': 4,
            'log.histograms_every': 5, 'optim.chain': ('clip_by_global_norm', 'adamw', 'ema')}


def train(folder, name, stop=None, **settings):
  """Trains to `stop` and returns the memory kinds of (weights, optimizer state) at the last step."""
  config = llm_jax.load_config(folder / 'tiny.py', **{**SETTINGS, **settings})
  kinds = []

  def note(event):
    state = event.session.state
    kinds.append(tuple({x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim} for tree in (
        state.trainable, state.opt_state)))
    if event.step == stop:
      event.stop()

  try:
    for _ in llm_jax.train(config, folder / name, callbacks=[note]):
      pass
  except llm_jax.base.errors.Interrupted:
    assert stop
  return kinds[-1]


def losses(folder, name):
  return [(line['step'], line['train/loss'], line.get('val/loss', 0.0)) for line in read_metrics(
      folder / name / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('offload')
  write_config(folder)
  assert train(folder, 'none') == ({'device'}, {'device'})
  return folder


@pytest.mark.parametrize(('mode', 'kinds'), [
    ('all', ({'pinned_host'}, {'pinned_host'})),
    pytest.param('optimizer', ({'device'}, {'pinned_host'}), marks=pytest.mark.slow)])
def test_a_run_with_state_in_host_memory_trains_the_same(folder, mode, kinds):
  assert train(folder, mode, **{'mesh.offload': mode}) == kinds
  for found, expected in zip(losses(folder, mode), losses(folder, 'none'), strict=True):
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_run_resumes_with_another_mode(folder):
  for stop, mode in ((4, 'none'), (8, 'all'), (None, 'optimizer')):
    train(folder, 'resumed', stop, **{'mesh.offload': mode})
  for found, expected in zip(losses(folder, 'resumed'), losses(folder, 'none'), strict=True):
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_fresh_run_starts_from_weights_of_another(folder):
  for mode in ('none', 'all'):
    train(folder, f'from_{mode}', **{'mesh.offload': mode, 'start.run': str(folder / 'none'), 'num_steps': 3,
                                     'data.tokenizer': str(folder / 'none' / 'tokenizer.json')})
  assert losses(folder, 'from_all') == [pytest.approx(line, rel=1e-6) for line in losses(folder, 'from_none')]


@pytest.mark.parametrize('loss', [1.0, np.nan])
def test_a_skipped_update_changes_nothing_in_host_memory(loss):
  optimizer, mesh = as_optimizer(optax.adam(0.1)), make_mesh(MeshConfig())
  held = NamedSharding(mesh, PartitionSpec('data'), memory_kind='pinned_host')
  params, grads = {'w': jnp.arange(16.0)}, {'w': jnp.full(16, loss)}
  state = jax.tree.map(lambda x: jax.device_put(x, held) if x.ndim else x, optimizer.init(params))
  step = jax.jit(lambda *args: guarded_update(optimizer, *args, loss=jnp.float32(loss), extra_loss=jnp.float32(0)))
  new, after, report = step(grads, state, params)
  _, expected, _ = step(grads, optimizer.init(params), params)
  assert report['skipped'] == np.isnan(loss) and after[0].mu['w'].sharding.memory_kind == 'pinned_host'
  assert np.array_equal(new['w'], params['w']) == np.isnan(loss)
  for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(x, y)
