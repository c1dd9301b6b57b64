"""Links, anchors, config fields, flags and commands in README.md, CONTRIBUTING.md and docs/ exist and run."""

import contextlib
import dataclasses
import functools
import io
import re
import subprocess
import sys
import typing

import pytest
from program import ROOT, environment

from llm_jax import __main__ as program
from llm_jax.base.builder import build, registries_of
from llm_jax.config import Config, base
from llm_jax.data.config import DataConfig

PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'launch' / 'README.md',
                      *sorted((ROOT / 'docs').glob('*.md')))}
BLOCK = re.compile(r'^```.*?^```', re.M | re.S)


def prose(page):
  """A page without its code blocks."""
  return BLOCK.sub('', PAGES[page])


def commands_of(page):
  """The commands of a page's code blocks, each in one line without its comment."""
  for language, block in re.findall(r'^```(\w*)\n(.*?)^```', PAGES[page], re.M | re.S):
    for line in () if language == 'python' else block.replace('\\\n', ' ').splitlines():
      command = re.sub(r'\s+#.*', '', line).strip()
      if re.match(r'(\S*/)?(llm-jax|python|tensorboard|make|pip|srun|sbatch|gcloud|bash|launch/\S+)\b', command):
        yield command


def python_blocks(page):
  return re.findall(r'^```python\n(.*?)^```', PAGES[page], re.M | re.S)


def anchors(text):
  """The anchors of headings, as GitHub makes them."""
  headings = re.findall(r'^#+ (.*)', BLOCK.sub('', text), re.M)
  return {re.sub(r'[^\w\- ]', '', re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).lower()).replace(' ', '-')
          for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_and_anchors_exist(page):
  broken = []
  for target in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
    path, _, anchor = target.partition('#')
    if '://' in target:
      continue
    file = (ROOT / page).parent / path if path else ROOT / page
    if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
      broken.append(target)
  assert not broken


@pytest.mark.parametrize('page', PAGES)
def test_files_of_the_repository_that_a_page_names_exist(page):
  names = re.findall(r'`((?:llm_jax|configs|tests|launch|benchmarks|docs)/[\w./]+\.\w+)`', prose(page))
  assert [name for name in names if not (ROOT / name).exists()] == []


def has_field(cls, path, added):
  """Whether a config class has a field at `path`; `added` are names that the page itself defines."""
  name, *rest = path
  if name in added:
    return True
  found = [registry.settings(name) for registry in registries_of(cls) if name in registry]
  for field in dataclasses.fields(cls):
    if field.name == name and 'registry' in field.metadata:  # a section whose class is that of the entry it names
      found += [field.metadata['registry'].settings(entry) for entry in field.metadata['registry']]
    elif field.name == name and not rest:
      return True
    elif field.name == name:
      hint = typing.get_type_hints(cls)[name]
      if typing.get_origin(hint) is dict:  # entries by a name that the user chooses
        hint, rest = typing.get_args(hint)[1], rest[1:]
      found += [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
  return any(not rest or has_field(part, rest, added) for part in found)


@pytest.mark.parametrize('page', PAGES)
def test_config_fields_exist(page):
  code = '\n'.join(python_blocks(page))
  added = set(re.findall(r"register\(\w+, '(\w+)'", code))  # parts that the page adds
  added |= set(re.findall(r'^  (\w+): \w+ = ', code, re.M)) if 'register(MODELS' in code else set()  # of its model
  paths = set(re.findall(r'(?:--|`)config\.([a-z]\w*(?:\.\w+)*)', PAGES[page])) - {'json', 'py'}
  assert [path for path in sorted(paths) if not has_field(Config, path.split('.'), added)] == []


def test_a_wrong_field_is_found():
  for path in ('optm.learning_rate', 'optim.rate', 'data.sources.a.pth', 'optim.adamw.beta1', 'model.depth'):
    assert not has_field(Config, path.split('.'), ()), path


@pytest.mark.parametrize('page', PAGES)
def test_settings_in_python_are_valid(page):
  """Those of a config file, as the pages print them."""
  for block in python_blocks(page):
    if re.search(r'^config\.', block, re.M) and 'def ' not in block:
      config = base()
      config.num_steps = 100_000
      exec(block, {'config': config})
      build(Config, config.to_dict())


@functools.cache
def flags_of(command):
  with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
    program.main([*command.split(), '--help'])
  return set(re.findall(r'--\w[\w-]*', printed.getvalue()))


def named_commands(text):
  """(command, flags) of each `llm-jax COMMAND ... --flag` and `python -m llm_jax COMMAND ...`."""
  for line in re.sub(r'\\\n', ' ', text).splitlines():
    for words in re.findall(r'(?:llm-jax|-m llm_jax) ([a-z][^`#|\]()]*)', line):
      command = ' '.join(words.split()[:2 if words.startswith('data ') else 1])
      yield command, [flag for flag in re.findall(r'(?<![\w-])--\w[\w-]*', re.sub(r'--config\.\S*', '', words))]


@pytest.mark.parametrize('page', PAGES)
def test_commands_and_flags_exist(page):
  wrong = []
  for command, flags in named_commands(PAGES[page]):
    if command not in program.commands():
      wrong.append(command)
    else:
      takes_fields = command.startswith('data ')  # whose flags are also the fields of config.data
      wrong += [f'{command} {flag}' for flag in flags if flag not in flags_of(command) | {'--help'}
                and not (takes_fields and has_field(DataConfig, flag[2:].split('.'), ()))]
  assert not wrong


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
  for module in ('mkdocs', 'material', 'mkdocstrings'):
    pytest.importorskip(module, reason='needs the extra docs')
  done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', f'--site-dir={tmp_path}'],
                        cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-4000:]
  loaded = [file.name for file in tmp_path.rglob('*.html')
            if re.search(r'<(script|img|link rel="stylesheet")[^>]*(src|href)="(https?:)?//', file.read_text())]
  assert not loaded, 'these pages load something from the network'
