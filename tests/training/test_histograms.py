"""Histograms: of the gradient and update that the step computes, on a mesh, with microbatches and frozen parameters."""

import jax
import numpy as np
import optax
import pytest
from program import write_config

import llm_jax
from llm_jax.base.errors import ConfigError
from llm_jax.base.loggers import LOGGERS, Logger
from llm_jax.base.registry import register
from llm_jax.base.trees import by_name
from llm_jax.optim.chain import as_optimizer
from llm_jax.training.histograms import NUM_BINS, noting, statistics


class InMemory(Logger):
  seen: dict = {}  # noqa: RUF012

  def __init__(self, run):
    self.seen.clear()

  def histograms(self, step, values):
    self.seen[step] = values

  def scalars(self, step, values):
    for name, value in values.items():
      self.seen.setdefault(name, {})[step] = value


register(LOGGERS, 'in_memory', InMemory)


def test_statistics_are_those_of_numpy():
  x = np.random.default_rng(0).normal(size=(3, 40, 5)).astype(np.float32)
  x[2] = 0.0
  low, high, counts, total, squares = map(np.asarray, statistics(x))
  for layer in range(3):
    edges = np.linspace(low[layer], high[layer], NUM_BINS + 1)
    assert (low[layer], high[layer]) == (x[layer].min(), x[layer].max()) and counts[layer].sum() == 200
    assert layer == 2 or np.abs(counts[layer] - np.histogram(x[layer], edges)[0]).max() <= 1
  np.testing.assert_allclose(total, x.sum((1, 2)), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(squares, (x**2).sum((1, 2)), rtol=1e-4)
  assert counts[2].tolist() == [200] + [0] * (NUM_BINS - 1)


def test_the_noting_optimizer_keeps_what_it_gets_and_returns():
  params, grads = {'w': np.ones(3, np.float32)}, {'w': np.arange(3, dtype=np.float32)}
  tx = as_optimizer(optax.sgd(0.5))
  updates, (state, *noted) = noting(tx).update(grads, (tx.init(params), params, params), params)
  np.testing.assert_allclose(updates['w'], -0.5 * grads['w'])
  assert state == tx.init(params) and noted[0]['w'] is not None
  np.testing.assert_allclose(noted[0]['w'], grads['w'])
  np.testing.assert_allclose(noted[1]['w'], updates['w'])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('histograms')
  write_config(folder)
  (folder / 'text.txt').write_text('abcdefgh' * 4000)  # so that all batches are equal
  return folder


def config(folder, **settings):
  return llm_jax.load_config(folder / 'tiny.py', **{
      'num_steps': 6, 'eval.every': 0, 'eval.prompts': ('',), 'log.every': 1, 'log.histograms_every': 2,
      'log.loggers': ('in_memory', 'jsonl'),
      'data.path': str(folder / 'text.txt'), 'data.tokenizer': 'char', 'model.dropout': 0.0, 'model.dtype': 'float32',
      'optim.groups.tables.pattern': 'embed', 'optim.groups.tables.frozen': True,
      'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2, 'batch_tokens': 256, 'tokens_per_device': 32} | settings)


@pytest.mark.slow
def test_histograms_are_those_of_the_next_equal_step(folder):
  weights = {}

  def keep(event):
    assert event.session.program.num_microbatches == 2
    weights[event.session.step] = by_name(jax.device_get(event.session.state.trainable))

  settings = config(folder, **{'checkpoint.every': 1})  # so that each step is complete when its event comes
  metrics = {line['step']: line for line in llm_jax.train(settings, folder / 'run', callbacks=keep)}
  seen = dict(InMemory.seen)
  steps = sorted(step for step in seen if isinstance(step, int))
  assert len(steps) == 3
  for step in steps[:2]:
    found = seen[step]
    assert not [name for name in found if 'embed' in name], 'frozen parameters have none'
    for name, leaf in weights[step].items():
      stacked = name.startswith('blocks/')
      for layer, values in enumerate(leaf if stacked else leaf[None]):
        suffix = f'/{layer:02}' if stacked else ''
        histogram = found[f'weights/{name}{suffix}']
        assert (histogram.low, histogram.high) == (values.min(), values.max())
        assert histogram.total == pytest.approx(values.sum(dtype=np.float64), rel=1e-4, abs=1e-4)
        edges = np.linspace(histogram.low, histogram.high, NUM_BINS + 1)
        expected = np.searchsorted(np.sort(values.ravel()), edges[1:-1], 'right')
        assert len(histogram.counts) == NUM_BINS and histogram.counts.sum() == values.size
        assert np.abs(np.cumsum(histogram.counts)[:-1] - expected).max() <= (values.size if not values.any() else 2)
        moved = (weights[step + 1][name][layer] if stacked else weights[step + 1][name]) - values
        update = found[f'updates/{name}{suffix}']
        assert np.sqrt(update.squares) == pytest.approx(np.linalg.norm(moved), rel=1e-2, abs=1e-6), name
        if values.ndim > 1:
          assert seen[f'update_ratio/{name}{suffix}'][step] == pytest.approx(
              np.linalg.norm(moved) / np.linalg.norm(values), rel=1e-2, abs=1e-6)
    norm = np.sqrt(sum(h.squares for name, h in found.items() if name.startswith('gradients/')))
    assert norm == pytest.approx(metrics[step + 1]['train/grad_norm'], rel=1e-3)


@pytest.mark.slow
def test_logging_histograms_changes_nothing(folder):
  losses = [[line['train/loss'] for line in llm_jax.train(config(folder, **{'log.histograms_every': every}),
                                                          folder / f'every_{every}')] for every in (0, 2)]
  assert losses[0] == losses[1]


def test_the_period_must_be_one_of_logged_steps(folder):
  with pytest.raises(ConfigError, match=r'histograms_every must be 0 or a multiple of every, 3; got 4'):
    config(folder, **{'log.every': 3, 'log.histograms_every': 4})
