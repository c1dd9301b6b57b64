"""The flags of all commands: help, defaults, examples, and messages on mistakes."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from program import ROOT

from llm_jax.__main__ import COMMANDS
from llm_jax.base.errors import ConfigError

HEAVY = {'jax', 'numpy', 'ml_collections', 'flax', 'optax', 'orbax', 'grain', 'tensorboard', 'matplotlib', 'tokenizers'}


def parser_of(command):
  return importlib.import_module(f'llm_jax.{COMMANDS[command][0]}').parser()


@pytest.fixture
def runs(tmp_path, monkeypatch):
  """A folder with runs, as far as the parsers look into them."""
  monkeypatch.chdir(tmp_path)
  for name in ('chat_small', 'gpt_small', 'other', 'package'):
    (tmp_path / 'runs' / name).mkdir(parents=True)
    for file in ('config.json', 'metrics.jsonl'):
      (tmp_path / 'runs' / name / file).touch()
  return tmp_path


def test_no_help_imports_a_heavy_module():
  code = ('import io, contextlib, json, sys\nfrom llm_jax.__main__ import main\nfound = {}\n'
          'for command in json.loads(sys.argv[1]):\n'
          '  with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n'
          '    main([*command.split(), "--help"])\n'
          '  found[command] = sorted({name.split(".")[0] for name in sys.modules} & set(json.loads(sys.argv[2])))\n'
          'print(json.dumps(found))')
  done = subprocess.run([sys.executable, '-c', code, json.dumps(['', *COMMANDS]), json.dumps(sorted(HEAVY))], cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == {command: [] for command in ['', *COMMANDS]}


@pytest.mark.parametrize('command', COMMANDS)
def test_help_describes_the_command_and_the_default_of_each_flag(command):
  parser = parser_of(command)
  assert parser.command == command and parser.description.splitlines()[0].endswith('.')
  for action in parser._actions[1:]:
    needed = action.dest == 'workdir' or (not action.option_strings and action.nargs != '?')
    assert needed or 'default' in action.help or '(required)' in action.help, action.option_strings
  text = parser.format_help()
  assert text.startswith(f'usage: llm-jax {command} ') and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize('width', [60, 80, 120])
@pytest.mark.parametrize('command', COMMANDS)
def test_help_fits_the_terminal_and_its_examples_can_be_copied(command, width, monkeypatch):
  monkeypatch.setenv('COLUMNS', str(width))
  parser = parser_of(command)
  text = parser.format_help()
  assert not [line for line in text.splitlines() if len(line) > width and len(line.split()) > 1]
  joined = re.sub(r' *\\\n +', ' ', text)
  assert all(example.partition('  # ')[0] in joined for example in parser.examples)
  assert ' '.join(parser.description.split('\n\n')[0].split()) in ' '.join(text.split())


@pytest.mark.parametrize('command', COMMANDS)
def test_the_examples_of_a_command_parse(command, runs):
  examples = parser_of(command).examples
  assert examples
  for example in examples:
    words = re.split(r' [<>] ', example.partition('  #')[0])[0]
    program, *argv = shlex.split(words)
    assert [program, *argv[:len(command.split())]] == ['llm-jax', *command.split()]
    prefix = '--' if command.startswith('data') and '--config' not in example else '--config.'
    parser_of(command).parse(argv[len(command.split()):], prefix, words=command == 'config')


@pytest.mark.parametrize('command, flags, messages', [
    ('generate', '--workdr=runs/other --promt=x --num_token 5 --sed=1', [
        '--workdr=runs/other: no such flag; did you mean --workdir=runs/other?',
        '--promt=x: no such flag; did you mean --prompt=x?', '--num_token: no such flag; did you mean --num_tokens?',
        '--sed=1: no such flag; did you mean --seed=1?']),
    ('generate', '--workdir=runs/gpt_smal --num_tokens=many', [
        '--workdir: runs/gpt_smal does not exist; did you mean runs/gpt_small?',
        "--num_tokens: expects a whole number, got 'many'"]),
    ('generate', '--workdir=other', ['--workdir: other does not exist; did you mean runs/other?']),
    ('generate', '--workdir=runs', ['--workdir: runs does not contain a run (no config.json); runs here: '
                                    'runs/chat_small, runs/gpt_small, runs/other, runs/package']),
    ('generate', '', ['--workdir is missing; runs here: runs/chat_small, runs/gpt_small, runs/other, runs/package']),
    ('generate', '--workdir=runs/other --max_new_tokens=9', [
        '--max_new_tokens=9: no such flag; did you mean --num_tokens=9?']),
    ('data inspect', '--path runs/gpt_small runs/other runs/package', [
        'runs/gpt_small and 2 further files: the shell has expanded a pattern; quote it, such as '
        "--path='notes/*.md'"]),
    ('generate', 'runs/other hello', ['hello: values need the name of their flag; did you mean --prompt=hello?']),
    ('generate', '--seed=1 runs/othr', ['--workdir: runs/othr does not exist; did you mean runs/other?']),
    ('evaluate', 'runs/other --workdir=runs/package', [
        '--workdir: runs/package is not the run that is named too, runs/other; name one; for example: llm-jax evaluate '
        'runs/gpt_small']),
    ('plot', "--workdir runs/package --otu='a b.png'", ['--otu=a b.png: no such flag; did you mean --out=a b.png?']),
    ('runs', "--plt='my plot.png'", ['--plt=my plot.png: no such flag; did you mean --plot=my plot.png?']),
    ('configs', 'gpt_small more', ['more: one argument too many; usage: llm-jax configs [name] [--FLAG=VALUE ...]']),
    ('generate', '--workdir', ['--workdir: has no value; for example: llm-jax generate runs/gpt_small '
                               "--prompt='def main('"]),
    ('plot', '--workdir runs/othr runs/package', ['--workdir: runs/othr does not exist; did you mean runs/other?']),
    ('generate', f'--workdir={"x" * 300}', [f'--workdir: {"x" * 300} cannot be read: File name too long']),
    ('evaluate', '--workdir=runs/other --split=vall', ["--split: 'vall' is not one of val, test; did you mean val?"]),
    ('sweep', '--num_steps=3', ['--num_steps=3: no such flag; did you mean --config.num_steps=3 or '
                                '--config.profile.num_steps=3?',
                                '--config is missing: set it to a file or a preset, which llm-jax configs '
                                'lists; for example: llm-jax sweep --config=optimizer_race --processes=2']),
    ('train', '--config=gpt_small --full_size=yes', ["--full_size: takes no value; got 'yes'; for example: llm-jax "
                                                     'train --config=gpt_small']),
    ('train', '--config=x --config.num_steps', ['--config.num_steps: has no value']),
    ('data convert', 'a.pkl', ['the following arguments are required: output; for example: llm-jax data convert '
                               'old.pkl new.parquet'])])
def test_all_mistakes_are_one_message(command, flags, messages, runs):
  with pytest.raises(ConfigError) as error:
    parser_of(command).parse(shlex.split(flags))
  assert str(error.value).splitlines() == messages


@pytest.mark.parametrize('command', [
    name for name in COMMANDS if '--workdir' in parser_of(name)._option_string_actions
    and name not in ('train', 'sweep', 'check')])  # which write it, and which checks a config otherwise
def test_a_run_is_named_with_and_without_workdir_before_and_behind_flags(command, runs):
  [flag] = [flag for flag in ('--seed=1', '--port=1', '--data=x', '--top=1', '--out=x', '--log_x', '--step=1',
                             '--mesh=data=1')
            if flag.partition('=')[0] in parser_of(command)._option_string_actions][:1]
  needed = ['--out=y'] if command == 'export' else []
  found = [parser_of(command).parse([*needed, *argv]).workdir
           for argv in (['runs/other', flag], [flag, 'runs/other'], [flag, '--workdir', 'runs/other'])]
  assert found == 3 * [[Path('runs/other')] if command == 'plot' else Path('runs/other')]


def test_plot_takes_several_runs_in_any_place(runs):
  found = parser_of('plot').parse(['runs/other', '--log_x', 'runs/package', 'runs/gpt_small']).workdir
  assert found == [Path('runs/other'), Path('runs/package'), Path('runs/gpt_small')]


def test_overrides_take_both_forms(runs):
  args = parser_of('train').parse(['--config.model.num_layers', '4', '--config=x', '--config.data.path=a=b'])
  assert args.overrides == {'model.num_layers': '4', 'data.path': 'a=b'} and args.config == 'x'
  args = parser_of('train').parse(['--config=x', '--config.mesh.data', '-1', '--config.eval.min_delta', '-.5'])
  assert args.overrides == {'mesh.data': '-1', 'eval.min_delta': '-.5'}


def test_loading_the_api_imports_neither_orbax_nor_grain():
  """They take a second; Orbax is needed for the first checkpoint, Grain for batches."""
  code = "import sys, llm_jax.api; print(sorted({name.split('.')[0] for name in sys.modules} & {'orbax', 'grain'}))"
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.strip() == '[]', done.stderr
