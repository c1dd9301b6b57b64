"""Branches of runs, and warm starts from another run's weights."""

import dataclasses
import json

import numpy as np
import pytest
from program import write_config

from llm_jax import main
from llm_jax.base.builder import build, to_dict
from llm_jax.base.errors import ConfigError
from llm_jax.base.fields import DTYPES
from llm_jax.commands import evaluate
from llm_jax.config import Config
from llm_jax.training.log import read_metrics
from llm_jax.training.resume import check_same_parts, with_new_fields

FLAGS = ('--config.eval.every=4', '--config.checkpoint.every=4', '--config.checkpoint.keep_last=9',
         '--config.eval.sample_tokens=0', '--config.optim.schedule=wsd',
         '--config.optim.chain=clip_by_global_norm,adamw,ema', '--config.optim.ema.decay=0.5')


def train(folder, name, *flags):
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder / name}', '--config.num_steps=12', *FLAGS, *flags])
  return {line['step']: line for line in read_metrics(folder / name / 'metrics.jsonl')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('start')
  write_config(folder)
  train(folder, 'first')
  return folder


def start(folder, **settings):
  return [f'--config.start.{name}={value}' for name, value in {'run': folder / 'first', **settings}.items()]


@pytest.mark.slow
def test_a_branch_continues_its_trunk_and_can_cool_down(folder):
  """From a checkpoint in the middle: bitwise the same, or with a cool-down of the learning rate to zero."""
  first = {line['step']: line for line in read_metrics(folder / 'first' / 'metrics.jsonl')}
  same = train(folder, 'same', *start(folder, checkpoint=8, whole='true'))
  assert sorted(same) == [9, 10, 11, 12]
  assert all(same[n]['train/loss'] == first[n]['train/loss'] for n in same)
  assert same[12]['val/loss'] == first[12]['val/loss']
  cooled = train(folder, 'cooled', *start(folder, checkpoint=4, whole='true'), '--config.optim.wsd.decay_steps=8')
  rates = [cooled[n]['train/learning_rate'] for n in sorted(cooled)]
  assert sorted(cooled)[0] == 5 and rates == sorted(rates, reverse=True) and rates[-1] < 0.1 * rates[0]


@pytest.mark.slow
def test_a_warm_start_takes_weights_and_resets_the_step(folder, capsys):
  """The evaluated (averaged) weights are taken, and the new average starts from them too."""
  first = {line['step']: line for line in read_metrics(folder / 'first' / 'metrics.jsonl')}
  tuned = train(folder, 'tuned', *start(folder), '--config.optim.learning_rate=1e-12', '--config.eval.every=1')
  assert sorted(tuned) == list(range(1, 13))
  assert tuned[1]['val/loss'] == pytest.approx(first[12]['val/loss'], abs=1e-5)
  capsys.readouterr()
  evaluate.main([f'--workdir={folder}/first'])
  printed = capsys.readouterr().out
  assert json.loads(printed[printed.index('{'):])['loss'] == pytest.approx(first[12]['val/loss'], abs=1e-5)


@pytest.mark.slow
def test_bitnet_can_start_from_a_full_precision_run(folder):
  lines = train(folder, 'bits', *start(folder), '--config.model.einsum=bitnet', '--config.optim.learning_rate=1e-3')
  losses = [lines[n]['train/loss'] for n in sorted(lines)]
  assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.slow
def test_missing_weights_are_initialized_and_reported(folder, capsys):
  train(folder, 'untied', *start(folder), '--config.model.tie_embeddings=false', '--config.num_steps=1')
  assert 'not found, so initialized: head/w' in capsys.readouterr().out


@pytest.mark.parametrize(('settings', 'flags', 'words'), [
    pytest.param({'run': 'nowhere'}, [], ['config.start.run', 'nowhere', 'does not exist'], marks=pytest.mark.slow),
    ({'run': 'nowhere', 'whole': 'true'}, [], ['config.start.run', 'nowhere', 'no checkpoints']),
    pytest.param({'checkpoint': 7}, [], ['config.start.checkpoint', '4, 8, 12', "got '7'"], marks=pytest.mark.slow),
    ({'checkpoint': 7, 'whole': 'true'}, [], ['config.start.checkpoint', '4, 8, 12', "got '7'"]),
    ({}, ['--config.model.num_layers=3'], ['weights of other shapes', 'blocks/attn/q/w', '(2, ', '(3, ']),
    ({'whole': 'true'}, ['--config.model.num_layers=3'], ['another model', 'num_layers']),
    ({'whole': 'true'}, ['--config.optim.chain=clip_by_global_norm,adamw'], ['optim.chain']),
    ({}, ['--config.data.tokenizer=byte', '--config.model.vocab_size=none'], ['another tokenizer', 'tokenizer.json']),
    ({'whole': 'true', 'checkpoint': 'best'}, ['--config.optim.ema.decay=0.4', '--config.optim.adamw.mu_dtype=bfloat16',
                                               '--config.model.num_heads=4'], ['another model', 'num_heads']),
    ({'run': ''}, ['--config.start.whole=true'], ['start', 'run must be set']),
])
def test_invalid_starts_are_reported(folder, tmp_path, settings, flags, words):
  with pytest.raises(ConfigError) as e:
    train(folder, tmp_path / 'x', *start(folder, **settings), *flags,
          *(['--config.optim.ema.decay=0.999'] if any('chain' in flag for flag in flags) else []))
  assert all(word in str(e.value) for word in words), e.value


def test_a_run_from_before_the_dtypes_of_activations_is_one_of_float32():
  model = {name: 'float32' if name in DTYPES else value for name, value in to_dict(Config())['model'].items()}
  config = build(Config, {**to_dict(Config()), 'model': model})
  saved = {**to_dict(config), 'model': {name: value for name, value in model.items() if name not in DTYPES[1:]}}
  check_same_parts(with_new_fields(saved), config, True)
  other = dataclasses.replace(config, model=dataclasses.replace(config.model, stream_dtype='bfloat16'))
  with pytest.raises(ConfigError, match=r'config.model.stream_dtype: checkpoint float32, now bfloat16'):
    check_same_parts(with_new_fields(saved), other, True)
