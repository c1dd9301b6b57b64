"""Config files and presets: how they are found, and loaded with overrides into a Config.

A config file is Python: `get_config()` returns a ConfigDict made by `base()`; an optional `on_cpu(config)` changes it
for machines without an accelerator. The command line overrides both.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.base import plugins
from llm_jax.base.builder import build, nearest_fields, override, to_dict
from llm_jax.base.errors import ConfigError
from llm_jax.base.files import check_run, list_runs
from llm_jax.base.nearest import nearest
from llm_jax.base.redaction import check_given, public
from llm_jax.base.registry import has_registered
from llm_jax.base.storage import read_start
from llm_jax.config import Config, differences
from llm_jax.infer.importers import importer_of
from llm_jax.infer.validators import UNTRUSTED, VALIDATORS
from llm_jax.models.registry import MODELS
from llm_jax.optim.chain import without_replaced

OF_PATH = ('sha256', 'format', 'field', 'separator', 'query', 'dtype', 'eot_id', 'val_path', 'test_path')


@dataclasses.dataclass(frozen=True)
class ConfigFile:
  """The contents of a config file, before the machine is known."""

  path: Path
  full: dict
  on_cpu: dict | None  # the values with the file's on_cpu applied; None: the file has none
  trials: tuple[dict[str, Any], ...] = ()  # overrides for each trial of the file's sweep(), if it has one

  def resolve(self, overrides: Mapping[str, Any], *, cpu_only: bool) -> Config:
    """The Config, with `overrides` ({'model.num_layers': '4'}) applied last. Raises ConfigError."""
    values = self.on_cpu if cpu_only and self.on_cpu is not None else self.full
    values = json.loads(json.dumps(values))
    if {'optim.chain', 'optim.schedule'} & overrides.keys():
      values['optim'] = without_replaced(values.get('optim', {}), overrides)
    if str(overrides.get('data.path', path := values.get('data', {}).get('path'))) != str(path):
      values['data'] = without_path(values['data'])
    if 'model.name' in overrides:
      values['model'] = model_values(values.get('model', {}), str(overrides['model.name']))
    if overrides.get('start.run'):
      take_over(values, overrides)
    override(values, overrides)
    public(values)  # remembers the secrets, which messages then lack
    if self.path.suffix == '.json':
      check_given(values)
    return build(Config, values)

  def cpu_note(self, name: str, overrides: Mapping[str, Any]) -> list[str]:
    """A line on the fields that on_cpu changes where it is applied, if it changes some; `name`: of the file."""
    number = len(differences(self.full, self.on_cpu or self.full).keys() - overrides.keys())
    return [f'no accelerator: on_cpu of {name} changes {number} field(s) (--full_size: do not); list them: llm-jax '
            f'config --config={name}'] if number else []

  def check(self, overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError for a config that cannot be trained on any machine; does not start JAX."""
    problems = []
    for cpu_only in (False, True):
      try:
        self.resolve(overrides, cpu_only=cpu_only).data.check_paths()
        return
      except ConfigError as e:
        problems.append(e)
    raise problems[-1]


def take_over(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
  """Takes over the model and the tokenizer of a published model that the command line names as start.run."""
  folder = read_start(str(overrides['start.run']))
  importer = importer_of(folder)
  if importer is not None:
    values['model'] = importer.model_values(folder)
    if 'data.tokenizer' not in overrides:
      values.setdefault('data', {})['tokenizer'] = importer.tokenizer(folder)


def without_path(data: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a data section without those that belong to its path; names of fields stay if the task needs two."""
  pairs = data.get('answer_field') or data.get('label_field')
  return {name: value for name, value in data.items() if name not in OF_PATH or (pairs and name == 'field')}


def model_values(model: Mapping[str, Any], name: str) -> dict[str, Any]:
  """The values of a model section that another model takes over: those that are set, in fields that it has too."""
  old = model.get('name', 'decoder')
  if name == old or name not in MODELS or old not in MODELS:
    return dict(model)
  defaults, fields = to_dict(MODELS.settings(old)()), to_dict(MODELS.settings(name)())
  return {field: value for field, value in model.items()
          if field in fields and field != 'name' and value != defaults.get(field)}


def presets() -> dict[str, Path]:
  """The configs that are installed with the package, by name."""
  package = Path(__file__).parent
  folder = next((f for f in (package / 'configs', package.parent / 'configs') if f.is_dir()), package)
  return {path.stem: path for path in sorted(folder.glob('*.py'))} if folder != package else {}


def find_config(name: str | Path, flag: str = '--config') -> Path:
  """The file that `flag` names: a path, else a preset by its name, such as gpt_small or configs/gpt_small.py.

  A run's folder stands for its config.json. Raises ConfigError with the nearest names; of runs, for a path that is
  neither a file nor a preset.
  """
  path, known = Path(name), presets()
  if path.is_file():
    return path
  if (path / 'config.json').is_file():
    return path / 'config.json'
  is_preset = str(path.parent) in ('.', 'configs') and path.suffix in ('', '.py')
  for file in (Path('configs') / f'{path.stem}.py', known.get(path.stem)) if is_preset else ():
    if file is not None and file.is_file():
      return file
  is_folder = path.is_dir()
  if (is_folder or not is_preset) and path.suffix not in ('.py', '.json') and not any(
      (path if is_folder else path.parent).glob('*.py')):
    return check_run(path, flag) / 'config.json'
  here = [str(file) for folder in (path.parent, Path('configs')) for file in sorted(folder.glob('*.py'))]
  files = {Path(file).stem: file for file in reversed([*known, *here, *list_runs(path)])}
  near = nearest(path.stem, files)
  hint = f'did you mean {files[near]}?' if near else f'presets: {", ".join(known) or "none"}'
  raise ConfigError(f'{flag}: no such file: {path}; {hint}')


def explain(error: Exception) -> str:
  """One line on an error of a config file; for a field that does not exist, with the nearest one."""
  unknown = re.match(r'[\'"]*Key "(\w+)" does not exist', str(error))
  if not unknown:
    return f'{type(error).__name__}: {error}'
  near = nearest_fields(unknown[1], Config)
  return f'{unknown[1]}: no such field' + (f'; did you mean config.{" or config.".join(near)}?' if near else '')


def open_config(path: str | Path, *, trust: bool = False, flag: str = '--config') -> ConfigFile:
  """Loads a .py config file, which is executed as trusted code, or a run's config.json, which is only parsed.

  `path` may be the name of a preset, or a run's folder; `flag` is the flag that named it. With `trust` the plug-ins in
  the run's folder are executed. Raises ConfigError.
  """
  path = find_config(path, flag)
  if path.suffix == '.json':
    return ConfigFile(path, read_values(path, flag, trust), None)
  module: Any = plugins.run_file(path, f'llm_jax_config_{path.stem}', flag)
  try:
    full, on_cpu = module.get_config(), None
    if hasattr(module, 'on_cpu'):
      on_cpu = module.get_config()
      module.on_cpu(on_cpu)
    trials = combinations(module.sweep()) if hasattr(module, 'sweep') else ()
    source = ConfigFile(path, full.to_dict(), on_cpu.to_dict() if on_cpu is not None else None, trials)
  except ConfigError:
    raise
  except Exception as e:  # a user's file may raise anything
    raise ConfigError(f'{flag}: {path}{plugins.line_in(path, e)}: {explain(e)}') from e
  if has_registered(module.__name__):
    plugins.note(str(path), plugins.name_of(path))
  plugins.load_all(source.full.get('plugins', ()), path.parent)
  return source


def read_values(path: Path, flag: str, trust: bool = False) -> dict:
  """The nested values of a run's config.json. Raises ConfigError if it is damaged or needs a plug-in.

  If `eval.validator` is a command, it is replaced by UNTRUSTED unless the folder is trusted.
  """
  try:
    values = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise ConfigError(f'{flag}: {path} is not valid JSON: {e}') from None
  if not isinstance(values, dict):
    raise ConfigError(f'{flag}: {path} does not contain a JSON object with the fields of a config')
  plugins.check_notes(path.parent, trust=trust, flag=flag)
  evaluation = values.get('eval')
  if isinstance(evaluation, dict) and not trust:
    command = str(evaluation.get('validator', ''))
    if command and command not in VALIDATORS:
      evaluation['validator'] = UNTRUSTED
  return values


def combinations(sweep: Any) -> tuple[dict[str, Any], ...]:
  """All combinations of {'seed': [0, 1], 'optim.learning_rate': [1e-3, 1e-2]}; a list of trials unchanged."""
  if isinstance(sweep, Mapping):
    return tuple(dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values()))
  return tuple(map(dict, sweep))
