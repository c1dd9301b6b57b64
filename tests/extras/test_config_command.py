"""llm-jax config and configs, presets, and suggestions for mistyped names, run as a user does."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest

import llm_jax
from llm_jax import __main__ as program
from llm_jax import main
from llm_jax.base.builder import build, leaf_paths, nearest_fields, to_dict
from llm_jax.base.errors import ConfigError
from llm_jax.base.fields import comments_of, fields_of
from llm_jax.base.loggers import LOGGERS
from llm_jax.base.registry import Registry, register
from llm_jax.config import Config, EvalConfig, StageConfig
from llm_jax.config_file import open_config, presets
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.loaders import SOURCES
from llm_jax.data.open import Data
from llm_jax.data.rows.tasks import TASKS
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS
from llm_jax.extras.commands import config_fields, configs
from llm_jax.infer.validators import VALIDATORS
from llm_jax.layers.kernels import ATTENTION
from llm_jax.layers.linear import EINSUMS
from llm_jax.layers.mlp import MLPS
from llm_jax.layers.norm import NORMS
from llm_jax.layers.stack import REMAT
from llm_jax.losses.balance import BALANCES
from llm_jax.losses.config import LOSSES
from llm_jax.losses.metrics import ANSWER_METRICS, METRICS
from llm_jax.models.registry import MODELS
from llm_jax.optim.chain import SCHEDULES, TRANSFORMS
from llm_jax.training.resolve import resolve

REPO = Path(__file__).parents[2]


def test_fields_of_covers_every_value_of_the_config():
  config = open_config('gpt_small').resolve({}, cpu_only=True)

  def leaves(values, path=''):
    for name, value in values.items():
      if isinstance(value, dict) and value:
        yield from leaves(value, f'{path}{name}.')
      else:
        yield f'{path}{name}', value

  assert {field.path: to_dict(field.value) for field in fields_of(config)} == dict(leaves(to_dict(config)))


def test_comments_and_types_are_those_of_the_source():
  fields = {field.path: field for field in fields_of(Config())}
  assert fields['eval.sample_tokens'].comment == '0: no samples'
  assert fields['model.dtype'].comment.startswith('Of matrix operands;')  # a comment above the field
  assert fields['tokens_per_device'].kind == 'int | None'
  assert fields['data.packing'].kind == "'concat' | 'best_fit' | 'pad'"


def config_classes(cls, seen):
  """Adds `cls` and the classes of all sections below it, with those of all registry entries, to `seen`."""
  if cls in seen:
    return seen
  seen.add(cls)
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    registries = [*field.metadata.get('registries', ()), *filter(None, [field.metadata.get('registry')])]
    hint = hints[field.name]
    parts = [registry.settings(name) for registry in registries for name in registry]
    for part in [*parts, hint, *typing.get_args(hint)]:
      if dataclasses.is_dataclass(part):
        config_classes(part, seen)
  return seen


def has_source(cls):
  """Whether llm_jax declares the class; those made from the parameters of a part have no comments."""
  module = sys.modules[cls.__module__]
  return module.__name__.startswith('llm_jax.') and getattr(module, cls.__name__, None) is cls


def test_every_field_that_a_config_can_have_has_a_comment():
  classes = config_classes(Config, set())
  assert {'Config', 'EncDecConfig', 'Soap', 'SpanCorruption', 'BitNet'} <= {cls.__name__ for cls in classes}
  missing = []
  for cls in classes:
    hints, comments = typing.get_type_hints(cls), comments_of(cls)
    for field in dataclasses.fields(cls):
      is_value = not field.metadata.get('registries') and 'registry' not in field.metadata and not any(
          dataclasses.is_dataclass(part) for part in (hints[field.name], *typing.get_args(hints[field.name])))
      if is_value and has_source(cls) and not comments.get(field.name):
        missing.append(f'{cls.__name__}.{field.name}')
  assert not missing


def registries():
  """{name of the variable: names that it has}: all registries and other mappings that comments refer to."""
  return {name: set(value) for module in list(sys.modules.values()) if module.__name__.startswith('llm_jax.')
          for name, value in vars(module).items() if isinstance(value, Registry) or name in ('REMAT', 'LOCAL')}


def test_no_comment_names_a_registry_in_place_of_its_names():
  classes = config_classes(Config, set())
  found = {(cls.__name__, field): text for cls in classes for field, text in comments_of(cls).items()}
  empty = {name for name, names in registries().items() if not names}
  unreplaced = {where: text for where, text in found.items() for name in re.findall(r'[A-Z][A-Z_]+', text)
                if name in registries() and f'{name} (empty until a plug-in adds one)' not in text}
  assert not unreplaced and 'METRICS' in empty


@pytest.mark.parametrize(('field', 'registry'), [
    ('model.name', MODELS), ('model.mlp', MLPS), ('model.norm', NORMS), ('model.einsum', EINSUMS),
    ('model.attention', ATTENTION), ('model.remat', REMAT), ('data.path', SOURCES), ('data.format', FORMATS),
    ('data.tokenizer', TOKENIZERS), ('data.encoder_tokenizer', TOKENIZERS), ('data.task', TASKS),
    ('loss.terms', LOSSES), ('loss.balance', BALANCES), ('optim.schedule', SCHEDULES), ('optim.chain', TRANSFORMS),
    ('eval.answer_metrics', ANSWER_METRICS), ('eval.validator', VALIDATORS), ('log.loggers', LOGGERS)])
def test_a_field_that_names_entries_lists_all_of_them(field, registry, capsys):
  config_fields.main(['--config=gpt_small', '--format=json', field])
  comment = json.loads(capsys.readouterr().out)[field]['comment']
  assert ', '.join(registry) in comment
  config_fields.main(['--config=gpt_small', field])
  assert ', '.join(registry) in capsys.readouterr().out


def test_a_comment_lists_what_is_registered_now(monkeypatch):
  monkeypatch.setattr(METRICS, '_entries', {})
  assert 'METRICS (empty until a plug-in adds one)' in comments_of(EvalConfig)['metrics']
  register(METRICS, 'focal', lambda logits, batch: None)
  assert 'each one of focal, logged' in comments_of(EvalConfig)['metrics']


def test_comments_fit_the_width_of_a_terminal():
  config = open_config('gpt_small').resolve({}, cpu_only=True)
  fields = list(fields_of(config))
  for width in (80, 160):
    lines = config_fields.tree(fields, ['default'] * len(fields), width)
    assert max(map(len, lines)) <= width
    words = ' '.join(' '.join(lines).split())
    assert all(' '.join(field.comment.split()) in words for field in fields)


def test_config_prints_where_each_value_comes_from(tmp_path, capsys):
  (tmp_path / 'mine.py').write_text(textwrap.dedent('''
      from llm_jax.config import base
      def get_config():
        config = base()
        config.model.num_layers = 7
        config.num_steps = 5000
        return config
      def on_cpu(config):
        config.num_steps = 500
      '''))
  config_fields.main([f'--config={tmp_path / "mine.py"}', '--format=json', '--config.seed=3'])
  found = json.loads(capsys.readouterr().out)
  origins = {path: entry['from'] for path, entry in found.items()}
  assert origins['model.num_layers'] == 'file'
  assert origins['num_steps'] == 'on_cpu' and found['num_steps']['value'] == 500
  assert origins['seed'] == 'command line' and found['seed']['value'] == 3
  assert origins['batch_tokens'] == 'default'
  config_fields.main([f'--config={tmp_path / "mine.py"}', 'optim'])
  text = capsys.readouterr().out
  assert text.startswith('optim\n') and '    weight_decay = 0.1' in text and 'num_layers' not in text


@pytest.mark.parametrize('name, near', [
    ('optm', 'optim'), ('optimizer', 'optim'), ('optim.scedule', 'optim.schedule'), ('lr', 'optim.learning_rate'),
    ('schedule', 'optim.schedule'), ('model.n_layer', 'model.num_layers'), ('adam', 'optim.adamw')])
def test_a_missing_section_or_field_names_the_nearest(name, near):
  with pytest.raises(ConfigError, match=rf'gpt_small has no section or field {name}; did you mean {near}\?$'):
    config_fields.main(['--config=gpt_small', name])


def test_values_behind_their_flag_are_no_sections(capsys):
  config_fields.main(['--config=gpt_small', '--config.model.num_layers', '5', 'model'])
  text = capsys.readouterr().out
  assert text.startswith('model\n') and 'num_layers = 5 ' in text
  with pytest.raises(ConfigError, match='has no section or field nosection; sections: model, '):
    config_fields.main(['--config=gpt_small', 'model', 'nosection'])
  config_fields.main(['--diff', 'gpt_small', 'shakespeare_char', 'optim'])
  found = [line for line in capsys.readouterr().out.splitlines() if ' with its on_cpu' not in line]
  assert found and all(line.startswith('optim.') for line in found)
  with pytest.raises(ConfigError, match='gpt_small has no section or field optimizer; did you mean optim'):
    config_fields.main(['--diff', 'gpt_small', 'shakespeare_char', 'optimizer'])


def test_config_diff_prints_what_differs_between_a_file_and_a_run(tmp_path, capsys):
  config = open_config('gpt_small').resolve({'seed': '5'}, cpu_only=True)
  (tmp_path / 'config.json').write_text(json.dumps(to_dict(config)))
  config_fields.main(['--diff', 'gpt_small', str(tmp_path)])
  variant, *found = capsys.readouterr().out.splitlines()
  assert found == ['seed: 0 -> 5'] and variant.startswith('gpt_small: with its on_cpu, as there is no accelerator')
  config_fields.main(['--diff', str(tmp_path), 'gpt_small', '--full_size'])
  printed = capsys.readouterr().out
  assert 'gpt_small: in full size, without its on_cpu' in printed and 'model.num_layers: 4 -> 12' in printed
  with pytest.raises(ConfigError, match=r'^--diff: no such file: nowhere'):
    config_fields.main(['--diff', 'gpt_small', 'nowhere'])


def test_a_missing_run_names_runs_and_not_presets(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('gpt_deep', 'other'):
    (tmp_path / 'runs' / name).mkdir(parents=True)
    (tmp_path / 'runs' / name / 'config.json').touch()
  for name, hint in (('runs/gpt_dep', 'does not exist; did you mean runs/gpt_deep?'),
                     ('runs/xyz', 'does not exist; runs here: runs/gpt_deep, runs/other'),
                     ('runs', 'does not contain a run (no config.json); runs here: runs/gpt_deep, runs/other')):
    with pytest.raises(ConfigError) as error:
      config_fields.main(['--diff', name, 'gpt_small'])
    assert str(error.value) in (f'--diff: {name} {hint}', f'--diff: no such file: {name}; {hint}')
  with pytest.raises(ConfigError, match=r'no such file: gpt_dep; did you mean runs/gpt_deep\?$'):
    config_fields.main(['--diff', 'gpt_dep', 'gpt_small'])


@pytest.mark.parametrize('name', ['gpt_small', 'package'])
def test_config_diff_leaves_out_what_a_run_fills_in(name, tmp_path, capsys):
  source = open_config(name).resolve({}, cpu_only=True)
  config = resolve(source, Data({split: {} for split in ('train', 'val', 'test')}, None, 300, bos_id=0))
  (tmp_path / 'config.json').write_text(json.dumps(to_dict(config) | {'seed': 5}))
  config_fields.main(['--diff', name, str(tmp_path)])
  *_, found, filled = capsys.readouterr().out.splitlines()  # after a line on on_cpu, if the file has one
  assert found == 'seed: 0 -> 5'
  assert filled.startswith('left open by the file and filled in by the run: model.vocab_size, model.')
  steps = {'num_steps': (700, 33), 'num_epochs': (2.0, 0.0)}
  assert config_fields.filled_in(steps) == list(steps) and not config_fields.filled_in({'num_steps': (700, 33)})


def test_configs_lists_presets_and_prints_a_file(tmp_path, capsys):
  configs.main([])
  lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
  assert set(lines) == set(presets()) == {path.stem for path in (REPO / 'configs').glob('*.py')}
  configs.main(['gpt_small'])
  (tmp_path / 'mine.py').write_text(capsys.readouterr().out)
  mine, preset = (open_config(path).resolve({}, cpu_only=True) for path in (tmp_path / 'mine.py', 'gpt_small'))
  assert mine == preset


@pytest.mark.parametrize('name', ['gpt_small', 'gpt_small.py', 'configs/gpt_small.py', 'configs/gpt_small'])
def test_a_preset_is_found_from_any_folder_after_files_there(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert open_config(name).path == presets()['gpt_small']
  own = tmp_path / 'configs' / 'gpt_small.py'
  own.parent.mkdir()
  own.write_text(presets()['gpt_small'].read_text())
  assert open_config(name).path.resolve() == own


@pytest.mark.parametrize('name, message', [
    ('gpt_smal.py', 'did you mean gpt_small'), ('configs/shakespeare', 'did you mean .*shakespeare_char'),
    ('/nowhere/gpt_small.py', 'no such file: /nowhere/gpt_small.py; did you mean'), ('xyz', 'presets: bitnet, ')])
def test_a_missing_config_names_the_nearest(name, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=message):
    open_config(name)


@pytest.mark.parametrize('name, near', [
    ('num_step', 'num_steps'), ('optim.lr', 'optim.learning_rate'), ('lr', 'optim.learning_rate'),
    ('n_layer', 'model.num_layers'), ('block_size', 'data.seq_len'), ('data.val_frac', 'data.val_fraction'),
    ('batch_size', 'batch_tokens')])
def test_an_unknown_field_names_the_nearest_of_any_section(name, near):
  assert near in set(leaf_paths(Config))
  assert nearest_fields(name, Config)[0] == near
  section, _, leaf = name.rpartition('.')
  with pytest.raises(ConfigError, match=f'config.{name}: no such field; did you mean config.{near}'):
    build(Config, {section: {leaf: 1}} if section else {leaf: 1})


def test_a_class_without_defaults_suggests_its_fields():
  assert nearest_fields('beginn', StageConfig) == ['begin']
  with pytest.raises(ConfigError, match=r'config.beginn: no such field; did you mean config.begin\?'):
    build(StageConfig, {'beginn': 3})


def test_a_name_like_no_field_suggests_none():
  assert nearest_fields('qqqqq', Config) == []


def test_a_mistyped_field_in_a_config_file_is_reported_with_its_line(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('from llm_jax.config import base\n'
                  'def get_config():\n  config = base()\n  config.model.num_layer = 3\n')
  with pytest.raises(ConfigError) as error:
    open_config(path)
  assert str(error.value) == (f'--config: {path}, line 4: num_layer: no such field; did you mean '
                              'config.model.num_layers?')


def command(*args, env=None, **kwargs):
  return subprocess.run([sys.executable, '-m', *args], capture_output=True, text=True, env=env, **kwargs)


@pytest.mark.parametrize('args, message', [
    (['--config=gpt_small', '--num_steps=10'], 'did you mean --config.num_steps=10'),
    (['--config=gpt_small', '--learning_rate=1e-3'], 'did you mean --config.optim.learning_rate=1e-3?'),
    (['--config=gpt_small', '--weight_decay=.1'], 'did you mean --config.optim.adamw.weight_decay=.1'),
    (['--config=gpt_small', '--warmup_iters=9'], 'did you mean --config.optim.warmup_cosine.warmup_steps=9'),
    (['--config=gpt_small', '--batch_size=32'], 'did you mean --config.batch_tokens, which counts tokens, not rows?'),
    (['--config=gpt_small', '--out_dir=x'], 'did you mean --workdir=x?'),
    (['--config=gpt_small', 'lr=3'], 'did you mean --config.optim.learning_rate=3?'),
    (['gpt_small'], 'did you mean --config=gpt_small?'),
    (['--config=gpt_small', '--worksdir=x'], 'did you mean --workdir=x?'),
    ([], '--config is missing: set it to a file or a preset')])
def test_a_wrong_flag_is_one_message_with_the_right_one(args, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError) as error:
    main.main(args)
  assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('args', [['llm_jax.main', '--config=gpt_small'], ['llm_jax', 'check']])
def test_a_platform_that_is_not_there_is_one_message(args, tmp_path):
  done = command(*args, cwd=tmp_path, env=os.environ | {'JAX_PLATFORMS': 'cuda'})
  [line] = [line for line in done.stderr.splitlines() if not line.endswith(' ...')]  # except what is waited for
  assert done.returncode == 78 and line.startswith('error: JAX_PLATFORMS=cuda: JAX cannot start this platform')


def test_a_missing_package_is_one_message(tmp_path):
  (tmp_path / 'sitecustomize.py').write_text('import sys\nsys.modules["optax"] = None\n')
  done = command('llm_jax.main', '--config=gpt_small', cwd=tmp_path,
                 env=os.environ | {'PYTHONPATH': os.pathsep.join([str(tmp_path), str(REPO)])})
  assert done.returncode == 78 and 'the package optax is not installed' in done.stderr, done.stderr
  assert done.stderr.count('\n') == 1


def test_a_users_file_that_misses_a_package_keeps_its_message(tmp_path):
  (tmp_path / 'lab.py').write_text('import nothere_pkg\n')
  done = command('llm_jax.main', '--config=gpt_small', '--plugin=lab.py', cwd=tmp_path)
  assert 'lab.py, line 1' in done.stderr and 'nothere_pkg' in done.stderr and 'pip install llm_jax' not in done.stderr


def test_the_package_shows_its_functions_with_their_types():
  assert {'load', 'train', 'load_config'} <= set(dir(llm_jax))
  assert (REPO / 'llm_jax' / 'py.typed').exists()
  assert command('llm_jax', '--version').stdout == f'llm_jax {llm_jax.__version__}\n'


def test_a_mistyped_command_names_the_nearest():
  assert 'did you mean llm-jax generate?' in command('llm_jax', 'genrate').stderr


def test_data_alone_and_help_list_commands(capsys):
  for argv in (['data'], ['data', '--help'], ['help']):
    program.main(argv)
    printed = capsys.readouterr().out
    assert 'data inspect' in printed and (' chat ' in printed) == (argv == ['help'])


def test_fields_fit_the_terminal_and_keep_their_comments(monkeypatch, capsys):
  config_fields.main(['gpt_small', 'data'])
  whole = capsys.readouterr().out
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', '80')
  config_fields.main(['gpt_small', 'data'])
  printed = capsys.readouterr().out
  assert max(map(len, printed.splitlines())) <= 80 < max(map(len, whole.splitlines()))
  assert printed.split() == whole.split() and '' not in printed.splitlines()
