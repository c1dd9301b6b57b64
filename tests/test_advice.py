"""Mistakes of a first try: what is refused before data are read, and that the advice of messages works as printed."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from program import write_config

from llm_jax import main
from llm_jax.__main__ import COMMANDS
from llm_jax.base.builder import leaf_paths, registries_of
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.config import Config, EvalConfig, LogConfig
from llm_jax.config_file import open_config
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.extras.commands import config_fields
from llm_jax.losses.config import LOSSES, LossConfig
from llm_jax.losses.term import Term
from llm_jax.models.registry import MODELS
from llm_jax.optim.chain import OptimConfig
from llm_jax.training.program import example_features
from llm_jax.training.resolve import resolve

REPO = Path(__file__).parents[1]
PACKAGE = REPO / 'llm_jax'


def test_my_data_without_a_path_is_refused_before_jax_starts(capsys):
  """With a platform that is not there, JAX would fail first."""
  done = subprocess.run([sys.executable, '-m', 'llm_jax', 'train', '--config=my_data'], capture_output=True, text=True,
                        env=os.environ | {'JAX_PLATFORMS': 'cuda', 'PYTHONPATH': str(REPO)})
  assert done.returncode == 78 and done.stderr.count('\n') == 1
  assert '--config.data.path=PATH' in done.stderr and "'notes/**/*.md'" in done.stderr
  config_fields.main(['--config=my_data', 'data'])  # its fields can be read all the same
  assert "path = ''" in capsys.readouterr().out


def test_a_source_of_a_mixture_without_a_path_is_named():
  flags = {'data.sources.a.path': '', 'data.sources.b.path': 'stdlib'}
  with pytest.raises(ConfigError, match=r'config.data.sources.a.path is empty: .*--config.data.sources.a.path=stdlib'):
    open_config('gpt_small').check(flags)


UNKNOWN_RESULTS = [
    (['eval.monitor=val/los'], 'eval.monitor val/los', "did you mean 'val/loss'?"),
    (['eval.monitor=loss'], 'eval.monitor loss', "did you mean 'val/loss'?"),
    (['eval.goal=val/acuracy > 0.5'], 'eval.goal or capabilities val/acuracy', "did you mean 'val/accuracy'?"),
    (['eval.capabilities=val/exact_match > 0.5'], 'capabilities val/exact_match', 'known: val/accuracy'),
    (['optim.chain=adamw,reduce_on_plateau', 'optim.reduce_on_plateau.metric=val/mae'], 'reduce_on_plateau val/mae',
     'known: val/accuracy'),
    (['stages.more.begin=1', 'stages.more.set=eval.monitor=val/x'], 'stages.more: config: eval.monitor val/x',
     'known: val/accuracy'),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('advice')
  write_config(folder)
  lines = [f'{{"text": "a w{i} c{i % 3}", "answer": "c{i % 3} b"}}' for i in range(40)]
  (folder / 'pairs.jsonl').write_text('\n'.join(lines) + '\n')
  return folder


@pytest.mark.parametrize(('flags', 'what', 'hint'), UNKNOWN_RESULTS, ids=[flags[-1] for flags, _, _ in UNKNOWN_RESULTS])
def test_a_result_that_no_evaluation_has_is_refused_before_data_are_read(folder, flags, what, hint):
  with pytest.raises(ConfigError) as e:
    main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/x', '--config.data.path=nowhere',
               *(f'--config.{flag}' for flag in flags)])
  assert what in str(e.value) and hint in str(e.value)


@pytest.mark.parametrize('flags', [
    ['eval.monitor=val/bits_per_byte'], ['eval.every=0', 'eval.monitor=whatever'],
    ['data.sources.a.path=nowhere', 'data.sources.b.path=nowhere', 'eval.monitor=val/a/loss'],
    ['data.task=prompt_answer', 'data.packing=pad', 'eval.answers=2', 'eval.monitor=val/exact_match', 'eval.mode=max']])
def test_results_that_evaluations_can_have_pass(folder, flags):
  open_config(folder / 'tiny.py').check(dict(flag.split('=', 1) for flag in flags))


class Ones(dict):
  """Sums that are all 1."""

  def __missing__(self, name):
    return np.eye(2) if name == 'confusion' else np.float64(1)


@pytest.mark.parametrize('name', [name for name in LOSSES if LOSSES.settings(name)().evaluated])
def test_losses_declare_the_results_that_they_return(name):
  term = LOSSES.settings(name)(**({'mean': (0.0,), 'std': (1.0,)} if name == 'regression' else {}))
  assert set(term.summarize(Ones())) == set(term.results)


def test_a_loss_that_does_not_declare_its_results_is_not_checked_before_a_run():
  class Own(LOSSES.settings('next_token')):
    def summarize(self, sums):
      return {'loss': 1.0, 'own': 2.0}

  assert Own.results is None and Term.results is None and LossConfig().results


# Flags that are refused, and the flags that the message advises instead: a pattern of the message, with its groups
# filled in.
BEFORE_DATA = [
    (['batch_tokens=1000'], r'nearest possible: (\d+), (\d+)', ['batch_tokens={0}', 'batch_tokens={1}']),
    (['tokens_per_device=5'], r'set (\d+) or more', ['tokens_per_device={0}']),
    (['model.max_len=5'], r'is less than data.seq_len (\d+)', ['model.max_len={0}']),
    (['eval.monitor=val/los'], r"did you mean '(\S+)'\?", ['eval.monitor={0}']),
    (['data.path='], r'set --config.(data.path=\w+),', ['{0}']),
    (['model.num_heads=3'], r'nearest that do: (\d+), (\d+)', ['model.num_heads={0}', 'model.num_heads={1}']),
    (['model.dropuot=0.1'], r'did you mean config.(\S+)\?', ['{0}=0.1']),
    (['optim.chain=adamv'], r"did you mean '(\w+)'\?", ['optim.chain={0}']),
    (['data.packing=padd'], r"did you mean '(\w+)'\?", ['data.packing={0}']),
    (['data.streaming=true'], r'needs (split=count)', ['data.streaming=true;data.{0};data.val_documents=5']),
    (['data.tokenizer=bpee'], r'known: (\w+)', ['data.tokenizer={0}']),
    (['data.split=count'], r'(val_documents) must be at least (\d)', ['data.split=count;data.{0}={1}']),
    (['data.split=count'], r'set (val_fraction=0)', ['data.split=count;data.{0};eval.every=0']),
    (['eval.goal=accuracy'], r"as in '(.*?)'", ['eval.goal={0}']),
    (['loss.terms=classification'], r'needs data.task (\w+)',
     ['loss.terms=classification;data.task={0};data.packing=pad;eval.sample_tokens=0']),
]
WITH_DATA = [
    (['model.vocab_size=100'], r'leave it (None) or set it to (\d+) or more',
     ['model.vocab_size={0}', 'model.vocab_size={1}']),
    (['data.task=fim'], r'use one of: (\w+), (\w+)',
     ['data.task=fim;data.packing={0}', 'data.task=fim;data.packing={1}']),
    (['data.task=prompt_answer', 'data.packing=pad'], r'set (config.data.answer_field) to their field',
     ['data.task=prompt_answer;data.packing=pad;data.path=pairs.jsonl;data.field=text;data.answer_field=answer']),
    (['data.task=prompt_answer', 'data.packing=pad'], r'use a task that needs none: (\w+)',
     ['data.task={0};data.packing=pad']),
    (['data.path=pairs.jsonl', 'data.field=txt'], r'fields?:? .*?\b(text)\b', ['data.path=pairs.jsonl;data.field={0}']),
    (['eval.answers=2'], r'set (0)', ['eval.answers={0}']),
    (['data.packing=pad', 'data.stride=8'], r'set it to (None)', ['data.packing=pad;data.stride={0}']),
    (['data.packing=best_fit', 'data.truncate=middle'], r"is not one of '(\w+)'",
     ['data.packing=best_fit;data.truncate={0}']),
    (['model.einsum=packed'], r'train with (einsum=bitnet)', ['model.{0}']),
    (['data.path=missing.txt'], r'missing.txt', ['data.path=corpus']),
    (['eval.prompts=' + 'x ' * 99], r'at most (\d+)', ['eval.prompts=x']),
    (['batch_tokens=32'], r'nearest possible: (\d+)', ['batch_tokens={0}']),
]


def overrides(flags):
  return dict(flag.split('=', 1) for flag in flags)


def advised(message, pattern, advice):
  found = re.search(pattern, message)
  assert found, message
  return [overrides(text.format(*found.groups()).split(';')) for text in advice]


@pytest.mark.parametrize(('flags', 'pattern', 'advice'), BEFORE_DATA, ids=[case[0][-1] for case in BEFORE_DATA])
def test_advice_on_a_config_is_followed(folder, flags, pattern, advice):
  source = open_config(folder / 'tiny.py')
  with pytest.raises(ConfigError) as e:
    source.check(overrides(flags))
  for settings in advised(str(e.value), pattern, advice):
    source.check(settings)


@pytest.mark.parametrize(('flags', 'pattern', 'advice'), WITH_DATA, ids=[case[0][-1][:40] for case in WITH_DATA])
def test_advice_on_a_config_with_its_data_is_followed(folder, flags, pattern, advice, monkeypatch):
  monkeypatch.chdir(folder)
  source, fixed = open_config('tiny.py'), {'batch_tokens': '2048'}

  def build(settings):
    config = source.resolve(fixed | settings, cpu_only=True)
    config.split_batch(num_shards=8)
    data = open_data(config.data)
    example_features(resolve(config, data).data, data)

  with pytest.raises((ConfigError, DataError)) as e:
    build(overrides(flags))
  for settings in advised(str(e.value), pattern, advice):
    build(settings)


def messages():
  """(file and line, text with {} for values) of every string of the package that is no docstring."""
  for path in sorted(PACKAGE.rglob('*.py')):
    tree = ast.parse(path.read_text())
    skipped = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    skipped |= {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
      if id(node) not in skipped and isinstance(node, ast.Constant | ast.JoinedStr):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = ''.join(str(part.value) if isinstance(part, ast.Constant) else '{}' for part in parts)
        yield f'{path.relative_to(REPO)}:{node.lineno}', text


def known_fields():
  """The paths of all fields and sections, with those of all registry entries."""
  for cls in (DataConfig, EvalConfig, LogConfig, LossConfig, OptimConfig):
    for registry in registries_of(cls):
      for name in registry:
        registry.settings(name)
  paths = [*leaf_paths(Config), *(f'model.{path}' for name in MODELS for path in leaf_paths(MODELS.settings(name)))]
  return {'.'.join(path.split('.')[:n]) for path in paths for n in range(1, path.count('.') + 2)}


def test_fields_in_messages_exist():
  found, known, unknown = 0, known_fields(), []
  for where, text in messages():
    for path in re.findall(r'(?<![\w.])config\.((?:[a-z_0-9]+\.)*[a-z_0-9]+)', text.replace('config.json', '')):
      found += 1
      unknown += [] if path in known else [f'{where}: config.{path}']
  assert found > 150 and not unknown


# Flags of every program, of TensorBoard, of `data prepare` for its fields, and of SentencePiece.
OTHER_FLAGS = {'--config', '--help', '--version', '--logdir', '--path', '--bos_id', '--eos_id'}


def test_commands_flags_and_extras_in_messages_exist():
  extras = tomllib.loads((REPO / 'pyproject.toml').read_text())['project']['optional-dependencies']
  sources = {path: path.read_text() for path in PACKAGE.rglob('*.py')}
  flags = {flag for text in sources.values() for flag in re.findall(r"add_argument\((?:'-\w', )?'(--\w+)'", text)}
  found, unknown = set(), []
  for where, text in messages():
    for command in re.findall(r'llm-jax ((?:data )?[a-z]+)(?= |$|\.|;|\)|`|,|\?)', text):
      found.add(command)
      unknown += [] if command in COMMANDS else [f'{where}: llm-jax {command}']
    for extra in re.findall(r"llm_jax\[(\w+)\]", text):
      found.add(extra)
      unknown += [] if extra in extras else [f'{where}: llm_jax[{extra}]']
    for flag in re.findall(r'(?<![\w-])(--[a-z_]+)(?=[ =,;.)]|$)', text):
      found.add(flag)
      unknown += [] if flag in flags | OTHER_FLAGS else [f'{where}: {flag}']
  assert {'predict', 'data', '--workdir'} <= found and not unknown
