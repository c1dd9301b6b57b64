"""A run's folder may come from anywhere: nothing in it is executed, and nothing is written through its links."""

import hashlib
import json
import re
import shutil

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from pair_runs import write_pair_config, write_pairs
from program import ROOT, without_waiting

from llm_jax import main
from llm_jax.base import plugins
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.process import run_as_program
from llm_jax.commands import evaluate, export, generate
from llm_jax.extras.commands import serve
from llm_jax.extras.figures import write_picture
from llm_jax.infer.load import read_config

SETTINGS = {
    'num_steps': 2, 'batch_tokens': 128, 'tokens_per_device': 128, 'data.task': 'prompt_answer', 'data.seq_len': 16,
    'optim.warmup_cosine.warmup_steps': 1, 'eval.every': 2, 'eval.max_tokens': 64, 'eval.sample_tokens': 0}
PACKAGE = ROOT / 'llm_jax'
PLUGIN = 'from pathlib import Path\nPath({mark!r}).touch()\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('security')
  pairs = write_pairs(folder / 'pairs.jsonl', [(f'a w{i} c{i % 3}', f'c{i % 3} b') for i in range(40)])
  write_pair_config(folder / 'tiny.py', pairs, 'decoder', SETTINGS)
  return folder


@pytest.fixture(scope='module')
def trained(folder):
  """A run of two steps into whose folder links to files and folders outside were put before; and these."""
  run, outside = folder / 'run', folder / 'outside'
  run.mkdir()
  outside.mkdir()
  for name in ('config.json', 'status.json', 'launches.jsonl', 'metrics.jsonl', 'tokenizer.json'):
    plant(run / name, outside / name)
  (outside / 'status.json').unlink()  # a link that leads nowhere yet
  train(folder, 'run')
  return run, outside


@pytest.fixture
def run(trained, tmp_path):
  """A copy of the trained run."""
  return shutil.copytree(trained[0], tmp_path / 'run')


@pytest.fixture
def mark(tmp_path):
  """A file that hostile code would make."""
  return tmp_path / 'MARK'


def train(folder, name, *flags):
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder / name}', *flags])


def plant(link, target):
  """Puts a link where the package would write; its target has content of its own."""
  target.write_text('precious')
  link.symlink_to(target)


def change_config(run, change):
  values = json.loads((run / 'config.json').read_text())
  change(values)
  (run / 'config.json').write_text(json.dumps(values))


def touch(mark):
  return f"sh -c 'touch {mark}'"


def with_command(run, mark):
  change_config(run, lambda values: values['eval'].update(validator=touch(mark)))


REFUSED = ("config.eval.validator: the run's config.json has a command, and commands from a run's folder are not "
           'executed')


def test_a_validators_command_in_a_config_json_is_not_executed(run, mark, tmp_path):
  with_command(run, mark)
  for command, flags in [
      (evaluate.main, [f'--workdir={run}', '--answers=1']),
      (main.main, [f'--config={run}/config.json', f'--workdir={tmp_path}/again', '--config.eval.answers=1'])]:
    with pytest.raises(ConfigError) as e:
      command(flags)
    assert str(e.value).startswith(REFUSED) and '--validator' in str(e.value)
  for command, flags in [  # which run no validator
      (generate.main, [f'--workdir={run}', '--num_tokens=2']), (evaluate.main, [f'--workdir={run}', '--answers=0']),
      (evaluate.main, [f'--workdir={run}', '--answers=1', '--validator=']),
      (export.main, [f'--workdir={run}', f'--out={tmp_path}/exported'])]:
    command(flags)
  assert not mark.exists()


def test_the_refusal_is_one_message_and_an_exit_code(run, mark, capsys, monkeypatch):
  with_command(run, mark)
  monkeypatch.setattr('sys.argv', ['llm-jax', f'--workdir={run}', '--answers=1'])
  monkeypatch.setattr('signal.signal', lambda *_: None)  # Ctrl-C goes on to end the tests
  capsys.readouterr()
  with pytest.raises(SystemExit) as e:
    run_as_program(evaluate.main)
  printed, message = map(without_waiting, capsys.readouterr())
  assert e.value.code == 78 and not printed and not mark.exists()
  warning, mesh, message = message.splitlines()  # of the changed config.json
  assert warning.startswith('WARNING: ') and mesh.startswith('mesh: ') and message.startswith(f'error: {REFUSED}')


@pytest.mark.parametrize('how', ['--validator', '--trust'])
def test_the_command_runs_if_the_user_names_it_or_trusts_the_folder(how, run, mark):
  with_command(run, mark)
  flag = f'--validator={touch(mark)}' if how == '--validator' else how
  evaluate.main([f'--workdir={run}', '--answers=1', flag])
  assert mark.exists()


def test_stages_of_a_config_json_bring_in_no_command(run, mark):
  """Neither a validator nor plug-ins can be set by a stage."""
  for entry in (f'eval.validator={touch(mark)}', f'plugins={mark}.py'):
    change_config(run, lambda values, entry=entry: values.update(stages={'late': {'begin': 1, 'set': [entry]}}))
    with pytest.raises(StorageError, match=r'config\.stages\.late: set: each entry'):
      evaluate.main([f'--workdir={run}', '--answers=1'])
    with pytest.raises(ConfigError, match=r'config\.stages\.late: set: each entry'):
      main.main([f'--config={run}/config.json', f'--workdir={run}'])
  assert not mark.exists()


def test_plugins_that_a_config_json_names_are_not_executed(run, mark):
  (run / 'evil.py').write_text(PLUGIN.format(mark=str(mark)))
  change_config(run, lambda values: values.update(plugins=['evil.py', str(run / 'evil.py')]))
  assert read_config(run, trust=False).plugins == ('evil.py', str(run / 'evil.py'))
  generate.main([f'--workdir={run}', '--num_tokens=2'])
  assert not mark.exists()


def plant_plugin(run, mark, name='lab', sha256=None):
  source = PLUGIN.format(mark=str(mark))
  (run / 'plugins').mkdir()
  if '/' not in name:
    (run / 'plugins' / f'{name}.py').write_text(source)
  sha256 = sha256 or hashlib.sha256(source.encode()).hexdigest()
  (run / 'plugins.json').write_text(json.dumps([{'name': name, 'path': f'{name}.py', 'sha256': sha256}]))


def test_the_copy_of_a_plugin_is_executed_only_with_trust(run, mark):
  plant_plugin(run, mark)
  for command, flags in [(generate.main, [f'--workdir={run}']), (evaluate.main, [f'--workdir={run}']),
                         (export.main, [f'--workdir={run}', f'--out={run}/x']),
                         (main.main, [f'--config={run}/config.json', f'--workdir={run}'])]:
    with pytest.raises(ConfigError, match=r'pass it again with --plugin=lab\.py, or .* with --trust') as e:
      command(flags)
    assert str(e.value).startswith('--config' if command is main.main else '--workdir')
  assert not mark.exists()
  read_config(run, trust=True)
  assert mark.exists() and plugins._loaded['lab'].path == str(run / 'plugins' / 'lab.py')


def test_a_run_is_resumed_with_the_copy_of_its_plugin_by_trust(run, folder, mark):
  """Named by a config file, or by the config.json of the run."""
  plant_plugin(run, mark)
  train(folder, run, '--trust')
  assert mark.exists() and plugins._loaded['lab'].path == str(run / 'plugins' / 'lab.py')
  mark.unlink()
  plugins._loaded.clear()
  main.main([f'--config={run}/config.json', f'--workdir={run}', '--trust'])
  assert mark.exists()


def test_two_plugins_of_one_name_are_refused_before_the_second_runs(tmp_path, mark):
  paths = [tmp_path / name / 'lab.py' for name in ('a', 'b')]
  for path in paths:
    path.parent.mkdir()
  paths[0].write_text('x = 1\n')
  paths[1].write_text(PLUGIN.format(mark=str(mark)))
  plugins.load_plugin(str(paths[0]))
  with pytest.raises(ConfigError, match=rf'--plugin: {paths[0]} and {paths[1]} are both named lab; rename one'):
    plugins.load_plugin(str(paths[1]))
  assert not mark.exists() and plugins._loaded['lab'].path == str(paths[0])
  paths[0].write_text('x = 2\n')
  plugins.load_plugin(str(tmp_path / 'b' / '..' / 'a' / 'lab.py'))  # the same file by another path, edited
  assert plugins._loaded['lab'].source == b'x = 2\n'
  paths[1].write_text('x = 2\n')
  plugins.load_plugin(str(paths[1]))  # a copy


def test_the_copy_of_a_module_is_executed_with_trust(run, mark):
  """Modules have dots in their names."""
  plant_plugin(run, mark, 'my_package.lab')
  read_config(run, trust=True)
  assert mark.exists()


def test_a_copy_that_the_notes_do_not_describe_is_refused_even_with_trust(run, mark):
  plant_plugin(run, mark, sha256='0' * 64)
  with pytest.raises(StorageError, match=r'plugins/lab\.py: missing, or its sha256 is not .*plugins\.json records'):
    read_config(run, trust=True)
  assert not mark.exists()


@pytest.mark.parametrize('name', ['../lab', '/tmp/lab', 'a/b', '..', '', 'lab\\x', 'lab.', 'lab\n'])
def test_names_of_plugins_are_names_of_modules(name, run, mark):
  plant_plugin(run, mark)
  notes = json.loads((run / 'plugins.json').read_text())
  (run / 'plugins.json').write_text(json.dumps([{**notes[0], 'name': name}]))
  with pytest.raises(StorageError, match='is not a module name'):
    read_config(run, trust=True)
  assert not mark.exists()


def test_a_config_file_that_registers_is_noted_under_a_name_that_can_be_read_back(tmp_path):
  path = tmp_path / '2-my config.py'
  path.write_text(PLUGIN.format(mark=str(tmp_path / 'ran')))
  plugins.note(str(path), plugins.name_of(path))
  plugins.write_notes(tmp_path)
  assert plugins.check_notes(tmp_path) == []
  plugins._loaded.clear()
  assert plugins.load_plugin(str(path)).name in plugins._loaded and plugins.check_notes(tmp_path) == []


def contents(folder):
  return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_training_writes_through_no_link(trained):
  run, outside = trained
  assert set(contents(outside).values()) == {'precious'} and not (outside / 'status.json').exists()
  for name in ('config.json', 'status.json', 'launches.jsonl', 'metrics.jsonl', 'tokenizer.json'):
    assert not (run / name).is_symlink() and (run / name).read_text() != 'precious'


def test_evaluating_writes_through_no_link(run, tmp_path):
  outside = tmp_path / 'outside'
  outside.mkdir()
  for name in ('evaluation.json', 'answers.jsonl'):
    plant(run / name, outside / name)
  evaluate.main([f'--workdir={run}', '--answers=2'])
  assert set(contents(outside).values()) == {'precious'}
  assert json.loads((run / 'evaluation.json').read_text())['loss'] > 0
  assert len((run / 'answers.jsonl').read_text().splitlines()) == 2


def test_pictures_are_written_through_no_link(tmp_path):
  plant(tmp_path / 'curve.png', tmp_path / 'outside')
  write_picture(tmp_path / 'curve.png', Figure(figsize=(1, 1)))
  assert (tmp_path / 'outside').read_text() == 'precious' and not (tmp_path / 'curve.png').is_symlink()
  assert matplotlib.image.imread(tmp_path / 'curve.png').shape[:2] == (120, 120)


def test_only_write_picture_saves_figures():
  """And what else writes a file at a given path is known: the rest is base/files.py's."""
  in_cache = {'data/stores/writer.py', 'data/stores/cache.py', 'data/sources/content.py', 'extras/fetch.py',
              'extras/remote_store.py'}
  in_new_folder = {'base/watchdog.py'}  # processes/, which the launch has made
  to_devnull = {'base/process.py'}
  allowed = {'extras/figures.py'} | in_cache | in_new_folder | to_devnull
  writes = re.compile(r'\.write_text\(|\.write_bytes\(|\.savefig\(|open\([^)]*, [\'"][wa]')
  found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob('*.py') if writes.search(path.read_text())}
  assert found == allowed


@pytest.mark.parametrize(('name', 'flags'), [
    ('.lock', []), ('checkpoints', []), ('plugins', ['--plugin={folder}/lab.py']),
    ('profile/plugins', ['--config.profile.start=1'])])
def test_a_link_in_the_place_of_a_folder_or_the_lock_is_refused(name, flags, folder, tmp_path):
  (folder / 'lab.py').write_text('')
  (tmp_path / 'run' / name).parent.mkdir(parents=True)
  outside = tmp_path / 'outside'
  if name == '.lock':
    outside.write_text('precious')
  else:
    outside.mkdir()
  (tmp_path / 'run' / name).symlink_to(outside)
  with pytest.raises(StorageError) as e:
    train(folder, tmp_path / 'run', *(flag.format(folder=folder) for flag in flags))
  assert str(tmp_path / 'run') in str(e.value) and '\n' not in str(e.value)
  assert outside.read_text() == 'precious' if name == '.lock' else not list(outside.iterdir())


def test_a_link_to_a_checkpoint_leads_to_no_change_outside(run, folder):
  """Old checkpoints are removed; what a link in their place points to is not."""
  outside = run.parent / 'outside'
  shutil.move(run / 'checkpoints' / '2', outside)
  (run / 'checkpoints' / '2').symlink_to(outside)
  before = sorted(path.relative_to(outside) for path in outside.rglob('*'))
  try:
    train(folder, run, '--config.num_steps=4', '--config.checkpoint.keep_last=1', '--config.checkpoint.keep_best=0')
  except StorageError as e:
    assert '\n' not in str(e)
  assert sorted(path.relative_to(outside) for path in outside.rglob('*')) == before


# Calls that execute or trust what they read. formats/pickles.py reads plain data by an Unpickler that finds no classes.
UNSAFE = (r'pickle\.loads?\(|cloudpickle|dill\b|marshal\.loads?|shelve\.|joblib\.load|torch\.load|'
          r'yaml\.(unsafe_|full_)?load\(|trust_remote_code|allow_pickle=True|extractall\(|(?<![\w.])eval\(|os\.system\(|shell=True')


def test_no_code_calls_what_executes_its_input():
  paths = [path for folder in ('llm_jax', 'configs', 'launch', 'benchmarks') for path in (ROOT / folder).rglob('*.py')]
  found = [f'{path.relative_to(ROOT)}:{i}: {line.strip()}' for path in paths
           for i, line in enumerate(path.read_text().splitlines(), 1)
           if re.search(UNSAFE, line) and not line.strip().startswith('#')]
  assert len(paths) > 200 and not found, '\n'.join(found)


def test_nothing_listens_to_other_machines_unless_asked():
  """Serve by default; TensorBoard in the commands that are printed and documented."""
  default = next(action.default for action in serve.parser()._actions if action.dest == 'host')
  texts = [path for pattern in ('docs/*.md', 'launch/*', 'configs/*.py', '*.md', 'Makefile', 'llm_jax/**/*.py')
           for path in ROOT.glob(pattern) if path.is_file() and path.name != 'hosts.py']
  found = [f'{path.name}: {line}' for path in texts for line in path.read_text().splitlines()
           if re.search(r'bind_all|--host[= ]0\.0\.0\.0', line)]
  assert default == '127.0.0.1' and len(texts) > 100 and not found, '\n'.join(found)
