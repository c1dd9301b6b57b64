"""The commands schedules, plot, check and sweep."""

import json

import matplotlib.image
import pytest
from program import finish, start, write_config

from llm_jax.base.builder import to_dict
from llm_jax.base.errors import ConfigError, DataError, UserError
from llm_jax.config_file import combinations, open_config
from llm_jax.extras.commands import check, plot, schedules, sweep

SWEEP = """
from tiny import get_config as tiny

def get_config():
  config = tiny()
  config.num_steps = 8
  config.eval.every = 4
  config.eval.sample_tokens = 0
  return config

def sweep():
  return {'optim.learning_rate': [1e-5, 3e-3], 'optim.chain': [('adamw',)]}
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('commands')
  write_config(folder)
  (folder / 'swept.py').write_text(f'import sys\nsys.path.insert(0, {str(folder)!r})\n' + SWEEP)
  return folder


def test_schedules_are_plotted_and_summarized(folder, capsys):
  schedules.main([f'--config={folder}/tiny.py', f'--config={folder}/swept.py', f'--out={folder}/x.png',
                  '--config.optim.constant.warmup_steps=3'])
  printed = capsys.readouterr().out.splitlines()
  assert len(printed) == 2 and 'constant, 60 steps, first 0.001, maximum 0.003, last 0.003' in printed[0]
  assert min(matplotlib.image.imread(folder / 'x.png').shape[:2]) > 100


def test_curves_of_several_runs_are_plotted(tmp_path, capsys):
  for name, steps in (('a', 200), ('b', 20)):
    (tmp_path / name).mkdir()
    lines = [{'step': step, 'val/accuracy': 1 - 1 / step} for step in range(1, steps)]
    (tmp_path / name / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  runs = ['--workdir', str(tmp_path / 'a'), str(tmp_path / 'b')]
  pictures = []
  for flags in ([], ['--log_x']):
    plot.main([*runs, '--metric', 'val/accuracy', f'--out={tmp_path}/x.png', *flags])
    pictures.append(matplotlib.image.imread(tmp_path / 'x.png'))
  assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()
  with pytest.raises(ConfigError, match=r'--metric: no values of loss; known: step, val/accuracy'):
    plot.main([*runs, '--metric', 'loss'])


def test_check_reports_missing_packages(monkeypatch, capsys):
  monkeypatch.setattr(check, 'CORE', (*check.CORE, 'no-such-package'))
  with pytest.raises(ConfigError, match='no-such-package: required but not installed'):
    check.main([])
  assert 'no-such-package MISSING' in capsys.readouterr().out


def test_check_reports_devices_and_whether_a_config_runs(folder, capsys):
  check.main([])
  printed = capsys.readouterr().out
  for word in ('devices', 'cpu', 'memory', 'disk', 'jax ', 'safetensors', 'attention', 'dtype auto'):
    assert word in printed
  check.main([f'--config={folder}/tiny.py', '--step', '--config.num_steps=3'])
  printed = capsys.readouterr().out
  assert 'runs: the loss of step 1 is' in printed and 'GiB are free' in printed
  assert 'tensorboard' not in printed.split('training a step')[-1].split('devices: ')[-1], 'of a temporary folder'
  check.main(['--config=gpt_small', '--format=json'])
  captured = capsys.readouterr()
  found = json.loads(captured.out)  # nothing else on stdout
  assert found['devices']['platform'] == 'cpu' and found['packages']['jax'] and found['config']['valid']
  assert 'runs' not in found['config'], 'trained without --step'
  assert 'starting JAX ...' in captured.err
  with pytest.raises(ConfigError):
    check.main(['--config=gpt_small', '--format=json', '--config.num_steps=0'])
  error = json.loads(capsys.readouterr().out)['error']
  assert 'num_steps' in error['message'] and error['exit_code'] == 78
  with pytest.raises(DataError, match='nowhere'):
    check.main([f'--config={folder}/tiny.py', '--step', '--config.data.path=nowhere'])
  assert 'does NOT run' in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_trains_unfinished_trials_and_compares(folder):
  first = finish(start(folder, 'sweep', '--config=swept.py', '--workdir=sweep', '--processes=2'))
  assert 'trial 2 of 2' in first
  result = json.loads((folder / 'sweep' / 'sweep.json').read_text())
  best, worst = result['trials']
  assert result['metric'] == 'val/loss' and best['best'] < worst['best']
  assert best['settings']['optim.learning_rate'] == 3e-3 and {best['state'], worst['state']} == {'finished'}
  assert '| 0.003 | adamw | ' in (folder / 'sweep' / 'sweep.md').read_text()
  assert (folder / 'sweep' / 'sweep.png').stat().st_size > 1000
  written = {p: p.stat().st_mtime_ns for p in folder.glob('sweep/0*/metrics.jsonl')}
  (folder / 'sweep' / best['name'] / 'status.json').unlink()
  again = finish(start(folder, 'sweep', '--config=swept.py', '--workdir=sweep'))
  assert 'already at step 8' in (folder / 'sweep' / best['name'] / 'output.txt').read_text() and 'trial 2 of 2' in again
  other = folder / 'sweep' / worst['name'] / 'metrics.jsonl'
  assert other.stat().st_mtime_ns == written[other], 'a finished trial was trained again'


@pytest.mark.slow
def test_a_failed_trial_does_not_stop_the_others(folder):
  text = (folder / 'swept.py').read_text().replace("{'optim.learning_rate': [1e-5, 3e-3], 'optim.chain': [('adamw',)]}",
                                                   "[{'data.path': 'nowhere'}, {'seed': 3}]")
  (folder / 'failing.py').write_text(text)
  with pytest.raises(UserError, match=r'not finished: 000_path=nowhere; see output\.txt'):
    sweep.main([f'--config={folder}/failing.py', f'--workdir={folder}/failing'])
  assert [t['state'] for t in json.loads((folder / 'failing' / 'sweep.json').read_text())['trials']] == [
      'finished', 'failed']


def test_invalid_sweeps_are_reported_before_training(folder, tmp_path):
  with pytest.raises(ConfigError, match=r'has no sweep\(\)'):
    sweep.main([f'--config={folder}/tiny.py'])
  text = (folder / 'swept.py').read_text().replace('1e-5, 3e-3', '1e-3, -1.0')
  (folder / 'wrong.py').write_text(text)
  with pytest.raises(ConfigError, match='learning_rate must be positive'):
    sweep.main([f'--config={folder}/wrong.py', f'--workdir={tmp_path}/x'])
  assert not (tmp_path / 'x').exists()
  text = (folder / 'swept.py').read_text().replace("[('adamw',)]", "[('adam',)]")
  (folder / 'other.py').write_text(text)
  trial = tmp_path / 'x' / '001_learning_rate=0.003,chain=adam'
  trial.mkdir(parents=True)
  (trial / 'metrics.jsonl').touch()
  source = open_config(folder / 'other.py')
  configs = [to_dict(source.resolve(source.trials[1] | {'seed': 5}, cpu_only=cpu_only)) for cpu_only in (True, False)]
  (trial / 'trial.json').write_text(json.dumps(configs))
  with pytest.raises(ConfigError, match=r'other settings; .*\n  config.seed: trained with 5, now 0$'):
    sweep.main([f'--config={folder}/other.py', f'--workdir={tmp_path}/x'])
  assert combinations({'a': [1, 2], 'b': [3, 4]}) == ({'a': 1, 'b': 3}, {'a': 1, 'b': 4}, {'a': 2, 'b': 3},
                                                      {'a': 2, 'b': 4})
