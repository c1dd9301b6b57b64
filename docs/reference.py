"""The generated pages of the documentation site, as a hook of MkDocs: README.md and its neighbours, commands, config
sections and registries. `make docs` builds the site."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib
import io
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from llm_jax import __main__ as program
from llm_jax.base.builder import registries_of
from llm_jax.base.fields import comments_of, type_name
from llm_jax.config import Config

ROOT = Path(__file__).parent.parent
# Pages outside docs/: page of the site, file.
OUTSIDE = {'index.md': 'README.md', 'changelog.md': 'CHANGELOG.md', 'contributing.md': 'CONTRIBUTING.md'}
RESULTS = 'benchmarks/results/'  # pages that performance.md links to
# Titles and pages. Pages that do not exist are left out, and pages of docs/ that are not named here come last.
NAV = {
    'Start': {'Install and first run': 'index.md', 'Questions': 'faq.md'},
    'Use': {'Your data': 'data.md', 'Conversations': 'chat.md', 'Models and losses': 'models.md',
            'Published models': 'huggingface.md',
            'Optimizers and schedules': 'optimizers.md',
            'Runs and checkpoints': 'checkpoints.md', 'Reliability': 'reliability.md',
            'Watching a run': 'watching.md', 'Evaluating a run': 'evaluation.md',
            'From Python': 'python.md',
            'Several devices': 'multi_device.md', 'Planning a run': 'scaling.md', 'Serving': 'serving.md',
            'Your own parts': 'extend.md'},
    'Reference': {'Commands': 'commands/', 'Config': 'config/', 'Registries': 'registries.md', 'Python API': 'api.md'},
    'Background': {'Design': 'design.md', 'Conventions': 'conventions.md', 'Measurements': 'performance.md',
                   'Features and their tests': 'seeds.md', 'Contributing': 'contributing.md',
                   'Changelog': 'changelog.md'},
}
API = {
    'Functions': ('llm_jax.api.load_config', 'llm_jax.api.train', 'llm_jax.api.load'),
    'Objects': ('llm_jax.api.Training', 'llm_jax.training.session.Event', 'llm_jax.infer.trained.Trained',
                'llm_jax.infer.trained.Evaluation'),
    'Parts of your own': ('llm_jax.base.registry.register', 'llm_jax.base.registry.Registry',
                          'llm_jax.base.plugins.load_plugin'),
    'Errors': ('llm_jax.base.errors',),
}


def on_files(files: Any, config: Any) -> Any:
  """Adds the generated pages, and sets the navigation to the pages that exist."""
  pages = {page: outside(ROOT / name) for page, name in OUTSIDE.items()}
  pages |= {f'results/{path.name}': path.read_text() for path in (ROOT / RESULTS).glob('*.md')}
  pages |= command_pages() | config_pages() | {'registries.md': registries_page(), 'api.md': api_page()}
  for page, text in pages.items():
    files.append(File.generated(config, page, content=text))
  written = [file.src_uri for file in files.documentation_pages()]
  config.nav = navigation(written)
  return files


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Links to results as the site has them, and | in a table's code without the backslash that GitHub needs."""
  def plain(line: str) -> str:
    return re.sub(r'`[^`]*`', lambda code: code[0].replace(r'\|', '|'), line)
  lines = markdown.replace(f'](../{RESULTS}', '](results/').split('\n')
  return '\n'.join(plain(line) if line.startswith('|') else line for line in lines)


def navigation(written: list[str]) -> list[Any]:
  """NAV as MkDocs wants it; a folder stands for its pages."""
  nav: list[Any] = []
  for section, entries in NAV.items():
    pages: list[Any] = []
    for title, page in entries.items():
      inside = sorted((name for name in written if page.endswith('/') and name.startswith(page)),
                      key=lambda name: (not name.endswith('index.md'), name))
      pages += [{title: inside}] if inside else [{title: page}] if page in written else []
    nav.append({section: pages})
  named = [page for entries in NAV.values() for page in entries.values()]
  others = [page for page in written if page not in named and '/' not in page]
  return [*nav, *([{'More': others}] if others else [])]


def outside(path: Path) -> str:
  """A page of the repository's root, with its links as they are from docs/."""
  names = {file: page for page, file in OUTSIDE.items()}
  text = path.read_text().replace('](docs/', '](')
  return re.sub(r'\]\((README|CHANGELOG|CONTRIBUTING)\.md', lambda m: f']({names[m[1] + ".md"]}', text)


def command_pages() -> dict[str, str]:
  os.environ['COLUMNS'] = '100'
  pages = {}
  for command, (_, line) in program.commands().items():
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
      program.main([*command.split(), '--help'])
    pages[f'commands/{command.replace(" ", "_")}.md'] = (
        f'# llm-jax {command}\n\n{line[0].upper()}{line[1:]}.\n\n```text\n{printed.getvalue()}```\n')
  return pages


def config_pages() -> dict[str, str]:
  """A page for the fields of the root config, and one for each section."""
  root = [field for field in dataclasses.fields(Config) if not is_section(Config, field)]
  pages = {'config/index.md': '# Config\n\n' + INTRODUCTION + table(Config, 'config', root)}
  for field in dataclasses.fields(Config):
    if is_section(Config, field):
      first, *others = classes(Config, field, f'config.{field.name}')
      text = [describe('#', *first), *(describe('##', *other) for other in others)]
      if first[0] != f'config.{field.name}':  # one of several
        text = [f'# config.{field.name}\n', f'#{text[0]}', *text[1:]]
      pages[f'config/{field.name}.md'] = '\n'.join(text)
  return pages


INTRODUCTION = """All fields of a config, with their types, defaults and ranges, as the code declares them. Set one with
`--config.FIELD=VALUE`, or in a config file. `llm-jax config --config=NAME` prints those of a config with their values.

"""


def is_section(cls: type, field: Any) -> bool:
  hint = typing.get_type_hints(cls)[field.name]
  return 'registry' in field.metadata or any(dataclasses.is_dataclass(part) for part in (hint, *typing.get_args(hint)))


def classes(cls: type, field: Any, path: str) -> Iterator[tuple[str, type]]:
  """(path, class) of a section, and of those in it; a section that depends on a name once for each name."""
  hint = typing.get_type_hints(cls)[field.name]
  if 'registry' in field.metadata:
    registry = field.metadata['registry']
    found = [(f'{path} with name={name}', registry.settings(name)) for name in registry]
  elif typing.get_origin(hint) is dict:
    found = [(f'{path}.NAME', typing.get_args(hint)[1])]
  else:
    found = [(path, part) for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
  for name, part in found:
    yield name, part
    for inner in dataclasses.fields(part):
      if is_section(part, inner):
        yield from classes(part, inner, f'{path}.{inner.name}')
    for registry in registries_of(part):
      yield from ((f'{path}.{entry}', registry.settings(entry)) for entry in registry
                  if dataclasses.fields(registry.settings(entry)))


def describe(level: str, path: str, cls: Any) -> str:
  """A heading, the first paragraph of the class's docstring, and a table of its fields."""
  words = (cls.__doc__ or '').split('\n\n')[0]
  words = '' if words.startswith(f'{cls.__name__}(') else escape(' '.join(words.split())) + '\n\n'
  fields = [field for field in dataclasses.fields(cls) if not is_section(cls, field) and field.name != 'sections']
  return f'{level} {path}\n\n{words}{table(cls, path, fields)}'


def table(cls: type, path: str, fields: list[Any]) -> str:
  hints, comments = typing.get_type_hints(cls), comments_of(cls)
  rows = ['| Field | Type | Default | Range | Meaning |', '|---|---|---|---|---|']
  for field in fields:
    default = field.default_factory() if callable(field.default_factory) else field.default
    default = '' if default is dataclasses.MISSING else f'`{default!r}`'
    limits = field.metadata.get('range', (None, ''))[1]
    rows.append(f'| `{field.name}` | `{type_name(hints[field.name])}` | {default} | {limits} | '
                f'{escape(comments.get(field.name, ""))} |')
  return '\n'.join(rows) + '\n' if fields else ''


def registries_page() -> str:
  names = {}  # by kind
  for file in sorted((ROOT / 'llm_jax').rglob('*.py')):
    for name, kind in re.findall(r"^([A-Z_]+) = Registry\('(\w+)'", file.read_text(), re.M):
      names[kind] = ('.'.join(file.relative_to(ROOT).with_suffix('').parts), name)
  text = ['# Registries', '', 'All parts that a config can name, with their settings and defaults. '
          '[Your own parts](extend.md) join them by `register`.', '']
  for kind, (module, variable) in sorted(names.items()):
    registry = getattr(importlib.import_module(module), variable)
    text += [f'## {kind}', '', f'`{variable}` in `{module}`', '']
    text += ['| Name | Module | Settings |', '|---|---|---|'] if len(registry) else ['Empty until you add to it.']
    for name in registry:
      fields = [field for field in dataclasses.fields(registry.settings(name)) if field.name != 'sections']
      settings = ', '.join(f'`{field.name}={shown(field)}`' for field in fields)
      text.append(f'| `{name}` | `{registry.origin(name)}` | {settings} |')
    text.append('')
  return '\n'.join(text)


def shown(field: Any) -> str:
  if 'registry' in field.metadata or (callable(field.default_factory) and not field.default_factory()):
    return '...'
  return '' if field.default is dataclasses.MISSING else repr(field.default)


def api_page() -> str:
  text = ['# Python API', '', '[From Python](python.md) shows how these are used.', '']
  for title, names in API.items():
    text += [f'## {title}', '', *(f'::: {name}\n' for name in names)]
  return '\n'.join(text)


def escape(text: str) -> str:
  """A comment of the source as Markdown for a table."""
  return re.sub(r'([*_\[\]|`])', r'\\\1', html.escape(text, quote=False))
