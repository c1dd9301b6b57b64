"""Rewinds: the run goes back, leaves batches out, and its journal makes another run end with the same bits."""

import json
import random
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from program import write_config

import llm_jax
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError, DivergedError, StorageError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.config import Config
from llm_jax.extras.commands.check_workdir import check_steps
from llm_jax.infer.load import load_run
from llm_jax.training.event import Event
from llm_jax.training.rewind import FILE, gaps_after, read_journal
from llm_jax.training.stages import make_stages

STEPS = {'num_steps': 16, 'eval.every': 0, 'checkpoint.every': 4, 'checkpoint.keep_last': 9}


def journal(workdir):
  return [(entry['at'], entry['to']) for entry in read_journal(workdir)['rewinds']]


def once(step, steps):
  """A callback that rewinds a run that has no journal."""
  def callback(event):
    if event.step == step and not read_journal(event.session.checkpoints.workdir)['rewinds']:
      event.rewind(steps, 'asked to')
  return callback


def lines(config, workdir, **options):
  """What is logged of each step; of a step that is trained twice, the last."""
  return {line['step']: (line['train/loss'], line['train/grad_norm'])
          for line in llm_jax.train(config, workdir, **options)}


def written(workdir):
  return [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('rewind')


@pytest.fixture(scope='module')
def config(folder):
  return llm_jax.load_config(write_config(folder), **STEPS)


@pytest.fixture(scope='module')
def rewound(folder, config):
  """(lines, folder) of a run that went back from step 11 to step 8."""
  return lines(config, folder / 'rewound', callbacks=once(10, 2)), folder / 'rewound'


def test_a_rewound_run_ends_like_one_with_a_copy_of_its_journal(folder, config, rewound, capsys):
  found, workdir = rewound
  assert journal(workdir) == [(11, 8)], 'step 11 had begun'
  assert written(workdir) == list(range(1, 17)), 'each step once'
  (folder / 'replay').mkdir()
  shutil.copy(workdir / FILE, folder / 'replay')
  assert lines(config, folder / 'replay') == found
  plain = lines(config, folder / 'plain')
  assert [step for step in plain if plain[step] != found[step]] == list(range(9, 17))
  assert not list(workdir.glob('checkpoints/*corrupt*'))


def test_check_lists_checkpoints_that_were_set_aside(tmp_path):
  names = ['4.corrupt-1', '8.rewound-1']
  for name in names:
    (tmp_path / name).mkdir()
  assert [(row['step'], row['state']) for row in check_steps(tmp_path, adopt=False)] == [
      (name, 'set aside') for name in names]


def test_a_rewound_run_resumes_with_the_same_bits(folder, config, rewound):
  found, workdir = rewound
  shutil.copytree(workdir, copy := folder / 'resumed')
  for step in (12, 16):
    shutil.rmtree(copy / 'checkpoints' / str(step))
  assert lines(config, copy) == {step: values for step, values in found.items() if step > 8}
  shutil.rmtree(copy / 'checkpoints' / '8')  # before the batches that were left out
  for step in (12, 16):
    shutil.rmtree(copy / 'checkpoints' / str(step))
  assert lines(config, copy) == {step: values for step, values in found.items() if step > 4}


@pytest.mark.slow
def test_checkpoints_without_their_journal_are_not_used(folder, config, rewound, capfd):
  shutil.copytree(rewound[1], copy := folder / 'lost')
  (copy / FILE).unlink()
  again = lines(config, copy)
  error = capfd.readouterr().err
  assert 'step 16' in error and 'step 12' in error and 'rewinds.json' in error and 'step 8:' not in error
  assert again == {step: values for step, values in lines(config, folder / 'undisturbed').items() if step > 8}


def test_a_damaged_journal_ends_the_run(folder, config, rewound):
  shutil.copytree(rewound[1], copy := folder / 'damaged')
  content = (copy / FILE).read_text()
  (copy / FILE).write_text(content.replace('"at": 11', '"at": 12'))
  with pytest.raises(StorageError, match=r'rewinds.json: damaged.*--start_over'):
    lines(config, copy)


def test_without_an_earlier_checkpoint_the_run_ends(folder, config):
  with pytest.raises(DivergedError, match='no checkpoint to go back to'):
    lines(config, folder / 'none', callbacks=once(2, 100))


def test_batches_are_left_out_once_and_none_comes_twice():
  seed = time.time_ns() % 2**32
  print(f'{seed=}')
  rng = random.Random(seed)
  plain = build(Config, {
      'num_steps': 1000, 'batch_tokens': 64, 'tokens_per_device': 32, 'data': {'seq_len': 16}, 'stages': {
          'more': {'begin': 60, 'set': ['batch_tokens=128']}, 'long': {'begin': 140, 'set': ['data.seq_len=32']}}})
  stages = make_stages(plain)

  def position(step, skips):
    return next(stage for stage in stages if step < stage.end).with_gaps(skips).tokens_at(step)

  for _ in range(50):
    skips, step, used, rewinds = (), 0, [], sorted(rng.sample(range(1, 200), 5))
    while step < 200:
      used.append((step, position(step, skips)))
      step += 1
      if rewinds and step == rewinds[0]:
        target, before = rng.randrange(rewinds.pop(0)), skips
        skips = gaps_after(stages[-1].with_gaps(before), step, target)
        assert position(target, skips) == position(step, before), 'the next batch is a new one'
        assert all(position(s, skips) == position(s, before) for s in range(target)), 'the past is the same'
        step = target
    tokens = [count for _, count in used]
    assert tokens == sorted(set(tokens))
    kept = dict(used)  # of a step that was trained several times, the last
    assert [position(step, skips) for step in range(200)] == [kept[step] for step in range(200)], 'as by the journal'


@pytest.mark.slow  # rewinds by a callback of one's own have the same property
def test_spikes_rewind_until_there_were_too_many(folder):
  config = llm_jax.load_config(folder / 'tiny.py', **STEPS | {
      'num_steps': 60, 'optim.chain': ('skip_spikes', 'adamw'), 'optim.skip_spikes.window': 8,
      'optim.skip_spikes.threshold': 0.5, 'log.callbacks': ('rewind_spikes',), 'log.rewind_spikes.steps': 1,
      'log.rewind_spikes.spikes': 2, 'log.rewind_spikes.most': 2})
  with pytest.raises(DivergedError, match='after 2 rewinds'):
    lines(config, folder / 'spiked')
  rewinds = journal(folder / 'spiked')
  assert len(rewinds) == 2 and all(to < at for at, to in rewinds)
  assert 'spikes in the last 8 steps' in (folder / 'spiked' / FILE).read_text()


@pytest.mark.parametrize(('settings', 'words'), [
    ({'log.callbacks': ('rewind_spikes',)}, 'skip_spikes in config.optim.chain'),
    ({'log.callbacks': ('rewind_spikes',), 'log.rewind_spikes.steps': 0}, 'rewind_spikes.steps')])
def test_what_rewinds_need(folder, config, settings, words):
  wrong = llm_jax.load_config(folder / 'tiny.py', **STEPS | settings)
  with pytest.raises(ConfigError, match=words):
    lines(wrong, folder / 'wrong')


def test_a_stream_cannot_be_rewound():
  session = SimpleNamespace(program=SimpleNamespace(data=SimpleNamespace(train={})))
  with pytest.raises(ConfigError, match='store'):
    Event(3, {}, session).rewind(1, '')


@pytest.mark.slow
def test_a_branch_takes_over_the_journal(folder, rewound):
  config = llm_jax.load_config(folder / 'tiny.py', **STEPS | {
      'num_steps': 20, 'start.run': str(rewound[1]), 'start.whole': True})
  found = lines(config, folder / 'branch')
  longer = llm_jax.load_config(folder / 'tiny.py', **STEPS | {'num_steps': 20})
  shutil.copytree(rewound[1], copy := folder / 'longer')
  assert found == lines(longer, copy) and set(found) == set(range(17, 21))
  mesh = make_mesh(MeshConfig())
  jax.tree.map(np.testing.assert_array_equal, *(
      load_run(folder / workdir, mesh).params for workdir in ('branch', 'longer')))
