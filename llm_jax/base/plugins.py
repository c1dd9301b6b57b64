"""Plug-ins: Python files and modules of the user that register parts. A run records which ones it was trained with.

A plug-in runs only if the user names it: by --plugin, in a config file, or with --trust for the copy in a run's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import check_no_link, write_file

NOTES = 'plugins.json'  # in a run's folder: name, path and sha256 of each; the subfolder plugins/ has their sources


class Plugin(NamedTuple):
  name: str  # of the module, or of the file without .py
  path: str
  sha256: str
  source: bytes


_loaded: dict[str, Plugin] = {}  # by name


def add_flags(parser: argparse.ArgumentParser, *, trust: bool) -> None:
  """Adds --plugin and, if `trust`, --trust."""
  parser.add_argument('--plugin', action='append', default=[], metavar='FILE_OR_MODULE',
                      help='Python code that registers models, losses, ...; may be given several times')
  if trust:
    parser.add_argument('--trust', action='store_true',
                        help="execute the plug-ins and the validator command that are stored in the run's folder")


def load_all(names: Iterable[str], folder: Path | None = None) -> None:
  """Runs plug-ins: modules, or .py files, searched for in `folder` and then here. Raises ConfigError."""
  for name in names:
    load_plugin(name, folder)


def load_plugin(name: str, folder: Path | None = None) -> Plugin:
  """Runs one plug-in; not again unless its source has changed. Raises ConfigError."""
  if not name.endswith('.py'):
    try:
      return note(importlib.import_module(name).__file__ or '', name)
    except ImportError as e:
      raise ConfigError(f'--plugin: module {name!r} cannot be imported: {e}; name a file with its .py') from None
  paths = [base / Path(name).expanduser() for base in (folder, Path()) if base is not None]
  path = next((path for path in paths if path.is_file()), None)
  if path is None:
    raise ConfigError(f'--plugin: no such file: {name}; tried {", ".join(map(str, paths))}')
  return load_file(path, name_of(path))


def name_of(path: Path) -> str:
  """The name under which a file is noted: an identifier."""
  return re.sub(r'\W|^(?=\d)', '_', path.stem)


def load_file(path: Path, name: str) -> Plugin:
  plugin = read_plugin(path, name)
  check_name(plugin)
  if name not in _loaded or _loaded[name].sha256 != plugin.sha256:
    run_file(path, f'llm_jax_plugin_{name}', '--plugin')
  return note(plugin.path, name)


def run_file(path: Path, module_name: str, flag: str) -> object:
  """Executes a file as a module. Raises ConfigError with the line that failed."""
  spec = importlib.util.spec_from_file_location(module_name, path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'{flag}: {path} is not a Python file')
  module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except ConfigError:
    raise
  except Exception as e:  # whatever a user's file may raise
    raise ConfigError(f'{flag}: {path}{line_in(path, e)}: {type(e).__name__}: {e}') from e
  return module


def line_in(path: Path, error: BaseException) -> str:
  """', line 12': where in the file an error was raised; '' if elsewhere."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if os.path.realpath(frame.filename) == os.path.realpath(path)]
  return f', line {lines[-1]}' if lines else ''


def read_plugin(path: Path | str, name: str) -> Plugin:
  source = Path(path).read_bytes()
  return Plugin(name, str(path), hashlib.sha256(source).hexdigest(), source)


def note(path: str, name: str) -> Plugin:
  """Records a plug-in that has run, for the notes of runs."""
  plugin = read_plugin(path, name)
  check_name(plugin)
  _loaded[name] = plugin
  return plugin


def check_name(plugin: Plugin) -> None:
  """Raises ConfigError if another plug-in has the name, under which the notes of a run could hold only one."""
  other = _loaded.get(plugin.name, plugin)
  if other.sha256 != plugin.sha256 and Path(other.path).resolve() != Path(plugin.path).resolve():
    raise ConfigError(f'--plugin: {other.path} and {plugin.path} are both named {plugin.name}; rename one of them')


def write_notes(workdir: Path) -> None:
  """Writes name, path, sha256 and a copy of each plug-in to the run's folder. Raises OSError, StorageError."""
  if not _loaded:
    return
  folder = check_no_link(workdir / 'plugins')
  folder.mkdir(exist_ok=True)
  for plugin in _loaded.values():
    write_file(folder / f'{plugin.name}.py', plugin.source)
  notes = [{'name': p.name, 'path': p.path, 'sha256': p.sha256} for p in _loaded.values()]
  write_file(workdir / NOTES, json.dumps(notes, indent=2))


def check_notes(workdir: Path, *, trust: bool = False, flag: str = '--workdir') -> list[str]:
  """Warnings about plug-ins that changed since training; with `trust`, runs the stored copies of unnamed ones.

  Raises ConfigError for a plug-in that has not been loaded, StorageError for damaged notes or copies.
  """
  for entry in _read_notes(workdir / NOTES):
    name, path, sha256 = entry['name'], entry['path'], entry['sha256']
    copy = workdir / 'plugins' / f'{name}.py'
    if name not in _loaded and trust:
      if not copy.is_file() or read_plugin(copy, name).sha256 != sha256:
        raise StorageError(f'{copy}: missing, or its sha256 is not {sha256[:12]}..., as {workdir / NOTES} records')
      load_file(copy, name)
    if name not in _loaded:
      raise ConfigError(f'{flag}: {workdir} was trained with the plug-in {name} ({path}, sha256 {sha256[:12]}...); '
                        f"pass it again with --plugin={path}, or execute the copy in the run's folder with --trust")
  return changes(workdir)


def changes(workdir: Path) -> list[str]:
  """Lines on plug-ins that are missing or differ from those that the run in `workdir` notes. Raises StorageError."""
  lines = []
  for entry in _read_notes(workdir / NOTES):
    name, sha256 = entry['name'], entry['sha256']
    now = _loaded.get(name)
    if now is None:
      lines.append(f'plug-in {name}: {workdir} was trained with it ({entry["path"]}), and it is not loaded now')
    elif now.sha256 != sha256:
      lines.append(f'plug-in {name}: {now.path} (sha256 {now.sha256[:12]}...) differs from the version that {workdir} '
                   f'was trained with (sha256 {sha256[:12]}...)')
  return lines


def _read_notes(path: Path) -> list[dict[str, str]]:
  if not path.is_file():
    return []
  try:
    notes = [{key: str(entry[key]) for key in ('name', 'path', 'sha256')} for entry in json.loads(path.read_text())]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
  for entry in notes:
    if not all(part.isidentifier() for part in entry['name'].split('.')):
      raise StorageError(f'{path}: {entry["name"]!r} is not a module name')
  return notes
