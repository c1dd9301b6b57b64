"""Stages: growing batches read rows in the same order; longer rows, other mixtures; epochs."""

import json
import pickle

import numpy as np
import pytest
from program import write_config

from llm_jax import main
from llm_jax.api import load_config
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError, Interrupted
from llm_jax.base.stopping import StopSignal
from llm_jax.config import Config
from llm_jax.data import pipeline
from llm_jax.training import loop
from llm_jax.training.custom import Custom
from llm_jax.training.log import Epochs, read_metrics
from llm_jax.training.stages import config_at, make_stages


def config(**stages):
  return build(Config, {'num_steps': 100, 'batch_tokens': 64, 'tokens_per_device': 32, 'data': {'seq_len': 16},
                        'optim': {'warmup_cosine': {'warmup_steps': 2}}, 'stages': stages})


def test_each_stage_begins_at_its_row():
  stages = make_stages(config(more={'begin': 10, 'set': ['batch_tokens=128']},
                       longer={'begin': 30, 'set': ['data.seq_len=32', 'eval.every=5']}))
  assert [(s.begin, s.end, s.config.batch_tokens, s.config.data.seq_len) for s in stages] == [
      (0, 10, 64, 16), (10, 30, 128, 16), (30, 100, 128, 32)]
  assert [s.first_row(s.begin) for s in stages] == [0, 10 * 4, (10 * 4 + 20 * 8) // 2]
  assert stages[1].first_row(12) == 40 + 2 * 8
  assert {s.config.model.max_len for s in stages} == {32}, 'one model for all'
  assert config_at(stages[0].run, 10).batch_tokens == 64 and config_at(stages[0].run, 11).batch_tokens == 128
  assert config_at(stages[0].run, 200).data.seq_len == 32
  assert b'Config' not in pickle.dumps(stages[1].first_row), 'it goes to processes that do not have the plug-ins'
  [alone] = make_stages(config())
  assert alone.config == config() and alone.first_row(7) == 28


def test_rows_of_earlier_stages_are_counted_in_their_size():
  """What a mixture's weights from step 5 on begin with, asked in the second stage."""
  first, second = make_stages(config(more={'begin': 10, 'set': ['batch_tokens=128']}))
  assert [first.first_row(n) for n in (0, 5, 10)] == [second.first_row(n) for n in (0, 5, 10)] == [0, 20, 40]
  assert second.first_row(11) == 48


@pytest.mark.parametrize(('stages', 'words'), [
    ({'a': {'begin': 0}}, ['stages.a', 'begin', 'got 0']),
    ({'a': {'begin': 100}}, ['before num_steps 100', 'got 100']),
    ({'a': {'begin': 5}, 'b': {'begin': 5}}, ['different steps']),
    ({'a': {'begin': 5, 'set': ['model.num_layers=3']}}, ['stages.a', 'model.num_layers=3', 'not of model']),
    ({'a': {'begin': 5, 'set': ['batch_tokens']}}, ['stages.a', 'FIELD=VALUE']),
    ({'a': {'begin': 5, 'set': ['batch_token=128']}}, ['config.stages.a', 'did you mean config.batch_tokens']),
    ({'a': {'begin': 5, 'set': ['batch_tokens=100']}}, ['config.stages.a', 'batch_tokens 100', '96, 112']),
])
def test_invalid_stages_are_reported(stages, words):
  with pytest.raises(ConfigError) as e:
    make_stages(config(**stages))
  assert all(word in str(e.value) for word in words), e.value


STAGED = """
def get_config():
  import tiny
  config = tiny.get_config()
  config.num_steps = 9
  config.batch_tokens = 512
  config.tokens_per_device = None
  config.eval.every = 100
  config.eval.sample_tokens = 0
  config.checkpoint.every = 100
  config.stages = {'more': {'begin': 3, 'set': ('batch_tokens=1024',)},
                   'longer': {'begin': 6, 'set': ('data.seq_len=128', 'tokens_per_device=128')}}
  return config
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('plan')
  write_config(folder)
  (folder / 'staged.py').write_text(f'import sys\nsys.path.insert(0, {str(folder)!r})\n' + STAGED)
  return folder


def train(folder, name, *flags, config='staged'):
  main.main([f'--config={folder}/{config}.py', f'--workdir={folder / name}', *flags])
  return read_metrics(folder / name / 'metrics.jsonl')


@pytest.mark.slow
@pytest.mark.parametrize('stop', [2, 6])
def test_a_staged_run_reads_its_rows_and_resumes(folder, monkeypatch, stop):
  """Each row of the two first stages once and in order; stopped within a stage or between two, the same bits."""
  read = {}
  original = pipeline.train_batches

  def spy(make, rows_at, rows):
    read[len(rows), make(np.arange(1))['tokens'].shape[1]] = [rows_at(n) for n in range(10)]
    return original(make, rows_at, rows)

  monkeypatch.setattr(pipeline, 'train_batches', spy)
  whole = train(folder, f'whole{stop}')
  assert [line['step'] for line in whole] == list(range(1, 10))
  assert read[16, 32][:4] == [0, 16, 32, 48] and read[32, 32][3] == 3 * 16, 'batch 3 begins where batch 2 ended'
  assert read[8, 128][6] == 3 * (16 + 32) * 32 // 128
  for line, full in zip(whole, [512] * 3 + [1024] * 6, strict=True):
    assert full - 32 < line['train/num_tokens'] <= full  # one of all rows, the last of the text, is shorter

  asked = iter(range(1, 10))
  with monkeypatch.context() as patch:
    patch.setattr(StopSignal, 'reached', lambda self: next(asked) == stop)
    with pytest.raises(Interrupted):
      train(folder, f'cut{stop}')
  assert [line['step'] for line in whole if 'val/loss' in line] == [9], 'where a stage ends nothing is validated'
  cut = train(folder, f'cut{stop}')
  assert [line['train/loss'] for line in cut] == [line['train/loss'] for line in whole]
  assert cut[-1]['val/loss'] == whole[-1]['val/loss']
  kept = json.loads((folder / f'whole{stop}' / 'config.json').read_text())
  assert kept['batch_tokens'] == 512 and kept['stages']['more']['begin'] == 3, 'config.json repeats the run'


@pytest.mark.slow
def test_the_best_is_reset_when_the_data_change(folder):
  """Rows of 128 tokens have lower losses than those of 32 whatever was learnt."""
  train(folder, 'scores', '--config.eval.every=2', '--config.optim.learning_rate=1e-6', '--config.eval.patience=3')
  saved = [json.loads(path.read_text()) for path in sorted((folder / 'scores').glob('checkpoints/*/meta/metadata'))]
  assert [(meta['step'], meta['best']['since']) for meta in saved][-1] == (9, 6)
  assert saved[-1]['best']['stale'] < 3


@pytest.mark.slow
def test_a_goal_reached_in_a_stage_ends_the_run(folder):
  flags = ['--config.eval.every=2', '--config.eval.goal=val/loss < 100']
  assert [line['step'] for line in train(folder, 'goal', *flags)] == [1, 2]
  assert [line['step'] for line in train(folder, 'goal', *flags)] == [1, 2]
  status = json.loads((folder / 'goal' / 'status.json').read_text())
  assert status['state'] == 'finished' and status['step'] == 2 and status['best'] > 0


@pytest.mark.parametrize('flag', [pytest.param('eval.monitor=val/acuracy', marks=pytest.mark.slow),
                                  pytest.param('eval.goal=val/acuracy > 1', marks=pytest.mark.slow),
                                  'optim.reduce_on_plateau.metric=val/acuracy'])
def test_an_unknown_metric_is_reported_before_training(folder, tmp_path, flag):
  chain = ['--config.optim.chain=adamw,reduce_on_plateau'] if 'plateau' in flag else []
  with pytest.raises(ConfigError, match=r'val/acuracy is not a result .*known: val/accuracy'):
    train(folder, tmp_path / 'x', f'--config.{flag}', *chain, config='tiny')


@pytest.mark.slow
def test_an_epoch_reads_each_row_once_and_logs_means(folder):
  lines = train(folder, 'epochs', '--config.num_epochs=2', '--config.batch_tokens=2048', '--config.eval.every=1000',
                '--config.eval.sample_tokens=0', config='tiny')
  ends = [line['step'] for line in lines if 'epoch/number' in line]
  assert [line['epoch/number'] for line in lines if 'epoch/number' in line] == [1, 2]
  assert lines[-1]['step'] == ends[-1] or lines[-1]['step'] == ends[-1] + 1
  first = [line['train/loss'] for line in lines if line['step'] <= ends[0]]
  assert lines[ends[0] - 1]['epoch/loss'] == pytest.approx(np.mean(first), rel=1e-5)


def test_epoch_means_continue_after_a_resume():
  values = [{'loss': float(n), 'grad_norm': 1.0} for n in range(10)]
  at = lambda step: int(step // 4.5)  # noqa: E731
  whole = Epochs(at, {})
  told = [whole.add(step, v) for step, v in enumerate(values, 1)]
  assert [step for step, t in enumerate(told, 1) if t] == [5, 9]
  assert told[4] == {'epoch/number': 1, 'epoch/loss': 2.0, 'epoch/grad_norm': 1.0}
  first = Epochs(at, {})
  for step in (1, 2):
    first.add(step, values[step - 1])
  second = Epochs(at, json.loads(json.dumps(first.sums)))
  assert [second.add(step, values[step - 1]) for step in range(3, 11)] == told[2:]
  assert not any(Epochs(lambda step: 0, {}).add(step, values[0]) for step in range(1, 5))


@pytest.mark.parametrize(('values', 'word'), [
    ({'num_epochs': -1.0}, 'num_epochs -1'), ({'num_epochs': 1.0, 'stages': {'a': {'begin': 3}}}, 'without stages'),
    ({'stages': {'a': {'begin': 3}}, 'data': {'streaming': True, 'split': 'count', 'val_documents': 1}}, 'streaming')])
def test_conflicting_settings_are_reported(values, word):
  with pytest.raises(ConfigError, match=word):
    build(Config, values)


@pytest.mark.slow
def test_yielded_metrics_equal_logged_ones(folder):
  events = list(loop.train(load_config(folder / 'staged.py'), folder / 'yielded', Custom()))
  assert [e.step for e in events] == list(range(1, 10)) and 'val/loss' in events[-1].metrics
  status = events[-1].status()
  assert status['step'] == 9 and status['state'] == 'finished'
  assert json.loads((folder / 'yielded' / 'status.json').read_text())['state'] == 'finished'

