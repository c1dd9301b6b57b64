"""The Python API: configs, trainings that are iterated over, loaded runs; and the notebook."""

import gc
import json
import subprocess
import sys
import weakref

import jax
import pytest
from program import ROOT, environment, write_config

import llm_jax
from llm_jax import main
from llm_jax.base.errors import ConfigError
from llm_jax.training.log import read_metrics

SETTINGS = {'num_steps': 12, 'eval.every': 6, 'eval.sample_tokens': 0, 'checkpoint.every': 100, 'log.every': 1}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('api')
  write_config(folder)
  return folder


@pytest.fixture(scope='module')
def finished(folder):
  """(training, metrics of all iterations, results of method calls) of a training that was used while it ran."""
  training = llm_jax.train(llm_jax.load_config(folder / 'tiny.py', **SETTINGS), folder / 'run')
  rounds, asked = [], {}
  for metrics in training:
    rounds.append(metrics)
    if metrics['step'] == 4:
      asked = {'validated': training.validate(), 'text': training.generate('def ', num_tokens=6, seed=1),
               'status': training.status()}
    if metrics['step'] in (4, 9):
      training.save()
      names = [path.name for path in (folder / 'run' / 'checkpoints').iterdir()]
      asked.setdefault('saved', []).append(sorted(name for name in names if name.isdigit()))
  return training, rounds, asked


def test_each_iteration_is_a_logged_step(finished, folder):
  _, rounds, _ = finished
  lines = read_metrics(folder / 'run' / 'metrics.jsonl')
  assert [r['step'] for r in rounds] == [line['step'] for line in lines] == list(range(1, 13))
  assert all(r.items() >= line.items() for r, line in zip(rounds, lines, strict=True))
  assert [r['step'] for r in rounds if 'val/loss' in r] == [6, 12]


def test_methods_work_between_iterations(finished):
  _, _, asked = finished
  assert asked['validated']['val/loss'] > 0 and isinstance(asked['text'], str)
  assert asked['status']['state'] == 'training' and asked['status']['step'] == 4
  assert asked['status']['metrics']['train/tokens_per_second'] > 0 and asked['status']['seconds_left'] > 0
  assert asked['saved'] == [['5'], ['10', '6']]  # the state is a step ahead of the metrics; 6 is the best


def test_method_calls_do_not_change_losses(finished, folder):
  """The same run from the command line has bitwise the same losses."""
  _, rounds, _ = finished
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/plain',
             *(f'--config.{name}={value}' for name, value in SETTINGS.items())])
  plain = read_metrics(folder / 'plain' / 'metrics.jsonl')
  for name in ('train/loss', 'val/loss'):
    assert [line.get(name) for line in plain] == [r.get(name) for r in rounds]


def test_goodput_and_system_load_are_logged(finished):
  _, rounds, _ = finished
  shares = {name: x for name, x in rounds[-1].items() if name.startswith('goodput/')}
  assert sum(shares.values()) == pytest.approx(1)
  assert all(shares[f'goodput/{kind}'] > 0 for kind in ('step', 'start', 'data', 'evaluation', 'save', 'caller'))
  assert 0 <= rounds[-1]['system/host_memory'] <= 1 and rounds[-1]['system/process_bytes'] > 1e7


def test_a_run_for_generation_gives_the_same_text_without_holding_the_stacked_weights(finished, folder):
  trained = llm_jax.load(folder / 'run')
  text = trained.generate('def ', num_tokens=6)
  weights = [weakref.ref(x) for x in jax.tree.leaves(trained.run.params['blocks'])]
  trained = trained.for_generation()
  gc.collect()
  assert [x for x in weights if x() is not None] == []
  assert trained.generate('def ', num_tokens=6) == text
  with pytest.raises(ConfigError, match='for generation only'):
    trained.validate()


def test_a_loaded_run_validates_and_generates(finished, folder):
  training, rounds, _ = finished
  trained = llm_jax.load(folder / 'run')
  assert trained.validate()['loss'] == pytest.approx(rounds[-1]['val/loss'], abs=1e-5)
  assert llm_jax.load(folder / 'run', checkpoint=10).run.meta['step'] == 10
  for options in ({'temperature': -1.0}, {'top_p': 0.0}, {'top_k': -3}, {'num_tokens': 0}):
    [(name, value)] = options.items()
    with pytest.raises(ConfigError, match=f'{name} must .*got {value}'):
      trained.generate('def ', **options)
  assert trained.generate('def ', num_tokens=6, seed=3) == trained.generate('def ', num_tokens=6, seed=3)
  assert trained.status()['state'] == training.status()['state'] == 'finished'
  assert trained.status()['seconds_left'] == 0 < trained.status()['seconds']
  trained.export_results(folder / 'results.json')
  results = json.loads((folder / 'results.json').read_text())
  assert results['status']['best'] == min(r['val/loss'] for r in rounds if 'val/loss' in r)
  assert results['config']['num_steps'] == 12 and results['metrics'][-1]['step'] == 12
  assert list(llm_jax.train(training.config, folder / 'run')) == [], 'nothing is left to do'


@pytest.mark.slow
def test_an_interrupted_iteration_resumes_from_the_checkpoint(folder):
  config = llm_jax.load_config(folder / 'tiny.py', **SETTINGS | {'checkpoint.every': 4, 'log.every': 1})
  training = llm_jax.train(config, folder / 'left')
  for metrics in training:
    if metrics['step'] == 6:
      break
  assert training.status()['state'] == 'stopped'
  with pytest.raises(ConfigError, match='not running'):
    training.save()
  steps = [metrics['step'] for metrics in training]
  assert steps[0] in (5, 7) and steps[-1] == 12  # 6 was evaluated, so it may be the best and saved
  assert training.status()['state'] == 'finished'


def test_mistakes_raise_clear_errors(folder, tmp_path):
  with pytest.raises(ConfigError, match=r'did you mean config\.optim\.learning_rate'):
    llm_jax.load_config(folder / 'tiny.py', **{'optim.learnin_rate': 1.0})
  with pytest.raises(ConfigError, match=r"num_steps: expects a whole number, got '1\.5'"):
    llm_jax.load_config(folder / 'tiny.py', num_steps=1.5)
  training = llm_jax.train(llm_jax.load_config(folder / 'tiny.py', **{'data.path': 'nowhere'}), tmp_path)
  assert training.status() == {'state': 'none'}
  with pytest.raises(ConfigError, match='not running'):
    training.validate()
  with pytest.raises(Exception, match='nowhere'):
    next(iter(training))
  assert training.status()['state'] == 'failed' and 'nowhere' in training.status()['error']
  with pytest.raises(AttributeError, match='no attribute'):
    llm_jax.evaluat  # noqa: B018


@pytest.mark.slow
def test_the_notebook_runs(folder):
  """Runs the notebook's cells in order, unchanged except for the corpus, in a separate process."""
  cells = [''.join(cell['source']) for cell in json.loads((ROOT / 'docs' / 'notebook.ipynb').read_text())['cells']
           if cell['cell_type'] == 'code']
  corpus = {'data.path': str(folder / 'corpus'), 'data.vocab_size': 300}
  script = '\n'.join(cells).replace("'num_steps': 40", f"**{corpus!r}, 'num_steps': 40")  # not the large default corpus
  project = folder / 'project'  # opened, a notebook runs in its own folder
  (work := project / 'docs').mkdir(parents=True)
  (project / 'configs').symlink_to(ROOT / 'configs')
  done = subprocess.run([sys.executable, '-c', script + '\nprint(trained.config.num_steps)'], cwd=work, text=True,
                        env=environment(folder) | {'MPLBACKEND': 'agg'}, capture_output=True, timeout=240)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'WARNING' not in done.stderr, done.stderr
  assert done.stdout.splitlines()[-1] == '40' and (project / 'runs' / 'notebook' / 'results.json').is_file()
  assert 'finished 40' in done.stdout
