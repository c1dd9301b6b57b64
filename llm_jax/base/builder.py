"""The strict builder: nested mappings to frozen dataclasses; reports all problems at once, each with its path."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llm_jax.base.errors import ConfigError
from llm_jax.base.nearest import nearest
from llm_jax.base.registry import Registry


class Sections(Mapping[str, Any]):
  """Settings of registry entries by name, as a config holds them: immutable and hashable."""

  def __init__(self, settings: Mapping[str, Any] | None = None):
    self._settings = dict(settings or {})

  def __getitem__(self, name: str) -> Any:
    return self._settings[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._settings)

  def __len__(self) -> int:
    return len(self._settings)

  def __hash__(self) -> int:
    return hash(frozenset(self._settings.items()))

  def __repr__(self) -> str:
    return f'Sections({self._settings})'


def variant(registry: Registry, default: str) -> Any:
  """A dataclass field whose class is the registry's settings for its `name`."""
  return dataclasses.field(default_factory=lambda: registry.settings(default)(),
                           metadata={'registry': registry, 'default': default})


def sections(*registries: Registry) -> Any:
  """The field `sections` of a dataclass: the settings of those entries of `registries` that the dataclass names."""
  return dataclasses.field(default=Sections(), metadata={'registries': registries})


def registries_of(cls: type) -> tuple[Registry, ...]:
  """The registries whose entries are sections of this dataclass."""
  field = cls.__dataclass_fields__.get('sections')  # type: ignore[attr-defined]
  return field.metadata.get('registries', ()) if field else ()


PLUGIN_HINT = '; if a module of yours defines it, add --plugin=FILE'  # once in a message


def known_names(name: str, known: Iterable[str], *, extensible: bool | None = None) -> str:
  """'known: adam, adamw (did you mean 'adamw'?)': the end of a message on a name that is unknown.

  With `extensible`, which a registry is, it says how a plug-in is loaded.
  """
  extensible = isinstance(known, Registry) if extensible is None else extensible
  known = list(known)
  near = nearest(name, known)
  return (f'known: {", ".join(known) or "none"}' + (f' (did you mean {near!r}?)' if near else '')
          + (PLUGIN_HINT if extensible else ''))


# What others call a field: nanoGPT, Hugging Face, PyTorch.
SYNONYMS = {
    'lr': 'learning_rate', 'max_lr': 'learning_rate', 'steps': 'num_steps', 'max_steps': 'num_steps',
    'max_iters': 'num_steps', 'train_steps': 'num_steps', 'epochs': 'num_epochs', 'num_train_epochs': 'num_epochs',
    'batch_size': 'batch_tokens', 'micro_batch_size': 'tokens_per_device', 'device_batch_size': 'tokens_per_device',
    'block_size': 'seq_len', 'context_length': 'seq_len', 'sequence_length': 'seq_len', 'max_seq_len': 'seq_len',
    'n_layer': 'num_layers', 'n_layers': 'num_layers', 'num_hidden_layers': 'num_layers', 'depth': 'num_layers',
    'n_head': 'num_heads', 'n_heads': 'num_heads', 'num_attention_heads': 'num_heads', 'n_kv_head': 'num_kv_heads',
    'num_key_value_heads': 'num_kv_heads', 'n_embd': 'embed_dim', 'd_model': 'embed_dim', 'hidden_size': 'embed_dim',
    'd_ff': 'mlp_dim', 'intermediate_size': 'mlp_dim', 'bias': 'use_bias', 'rope_theta': 'rope_base',
    'wd': 'weight_decay', 'beta1': 'b1', 'beta2': 'b2', 'grad_clip': 'max_norm', 'warmup': 'warmup_steps',
    'warmup_iters': 'warmup_steps', 'dataset': 'path', 'data_path': 'path', 'data_dir': 'path',
    'eval_interval': 'every', 'log_interval': 'every', 'save_every': 'every', 'out_dir': 'workdir',
    'output_dir': 'workdir', 'max_new_tokens': 'num_tokens', 'max_tokens': 'num_tokens', 'n_samples': 'num_samples'}


def leaf_paths(cls: type) -> Iterator[str]:
  """Paths of all fields of a config class, with the settings of the registry entries that are loaded."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    hint, registry = hints[field.name], field.metadata.get('registry')
    if field.metadata.get('registries'):
      parts = {name: r.settings(name) for r in registries_of(cls) for name in r.loaded()}
    elif registry is not None:
      parts = {field.name: registry.settings(field.metadata['default'])}
    elif dataclasses.is_dataclass(hint):
      parts = {field.name: typing.cast(type, hint)}
    else:
      parts = {}
      yield field.name
    for name, part in parts.items():
      yield from (f'{name}.{path}' for path in leaf_paths(part))


def nearest_fields(name: str, cls: type) -> list[str]:
  """Up to three paths of fields of `cls` whose last name is or resembles that of `name`; the shortest first."""
  leaf, usual = name.rpartition('.')[2], set[str]()
  with contextlib.suppress(TypeError, ValueError):  # a class without defaults for all of its fields
    usual = set(_paths(to_dict(cls())))  # of entries that are named by default
  paths = sorted(leaf_paths(cls), key=lambda path: (path not in usual, path.count('.'), path))
  leaves = {path.rpartition('.')[2] for path in paths}
  near = SYNONYMS[leaf] if SYNONYMS.get(leaf) in leaves else nearest(leaf, sorted(leaves), cutoff=0.75)
  found = [path for path in paths if path.rpartition('.')[2] == near]
  named = [path for path in found if path.rpartition('.')[0] == name.rpartition('.')[0]]
  return list(dict.fromkeys(named + found))[:3]


def _paths(values: Any, path: str = '') -> Iterator[str]:
  for name, value in values.items():
    yield from _paths(value, f'{path}{name}.') if isinstance(value, dict) and value else [f'{path}{name}']


def check_names(field: str, names: Iterable[str], registry: Registry) -> None:
  """Raises ValueError for a name that the registry does not have."""
  for name in names:
    if name not in registry:
      raise ValueError(f'{field} names {name!r}, which is unknown; {known_names(name, registry)}')


def keep_named(config: Any, names: Iterable[str], where: str) -> None:
  """Reduces config.sections to the entries in `names`, with defaults where nothing was set; called in __post_init__.

  Raises ValueError for settings of an entry that is not named; `where` explains it, as in 'chain does not name it'.
  """
  registries, given = registries_of(type(config)), config.sections
  kept = {}
  for name in dict.fromkeys(names):
    registry = next((r for r in registries if name in r), None)
    if registry is not None:
      settings = registry.section(name, given)
      if dataclasses.fields(settings):
        kept[name] = settings
  for name in sorted(set(given) - set(kept)):
    registry = next(r for r in registries if name in r)
    if given[name] != registry.settings(name)():
      raise ValueError(f'{name} is set, but {where}: it would have no effect')
  object.__setattr__(config, 'sections', Sections(kept))


def to_dict(config: Any) -> Any:
  """Nested plain dicts and lists, ready for JSON; sections of registry entries become keys beside the other fields."""
  if dataclasses.is_dataclass(config):
    values = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return values | values.pop('sections') if registries_of(type(config)) else values
  if isinstance(config, Mapping):
    return {name: to_dict(value) for name, value in config.items()}
  return [to_dict(value) for value in config] if isinstance(config, (tuple, list)) else config


def build(cls: type, values: Mapping, path: str = 'config') -> Any:
  """The dataclass from nested mappings; absent fields take their defaults. Raises ConfigError, all problems at once."""
  problems = Problems(cls, path)
  result = _build(cls, values, path, problems)
  if problems:
    before, hint, after = '\n'.join(problems).partition(PLUGIN_HINT)
    raise ConfigError(before + hint + after.replace(PLUGIN_HINT, ''))
  return result


class Problems(list[str]):
  """Messages, and the class that is built, whose fields are suggested."""

  def __init__(self, root: type, path: str):
    self.root, self.path = root, path

  def unknown(self, path: str, fields: Iterable[str], entries: Iterable[str]) -> None:
    """Adds a message on a name that is neither among the fields nor the registry entries of its section."""
    section, _, name = path.rpartition('.')
    wanted, known = SYNONYMS.get(name, name), [*fields, *entries]
    near = nearest(name, known) if wanted == name else wanted if wanted in known else None
    paths = [f'{section}.{near}'] if near else [
        f'{self.path}.{found}' for found in nearest_fields(path.removeprefix(f'{self.path}.'), self.root)]
    hint = f'did you mean {" or ".join(paths)}?' if paths else f'known: {", ".join(fields)}'
    self.append(f'{path}: no such field; {hint}')


class Text(str):
  """A value as typed on the command line: parsed by the type of its field."""


def _build(cls: type, values: Any, path: str, problems: Problems) -> Any:
  if not isinstance(values, Mapping):
    problems.append(f'{path}: expects a section of fields, got {values!r}')
    return None
  registries = registries_of(cls)
  fields = {f.name: f for f in dataclasses.fields(cls) if not (registries and f.name == 'sections')}
  hints = typing.get_type_hints(cls)
  before = len(problems)
  built: dict[str, Any] = {}
  of_entries = {}
  for name, value in values.items():
    registry = next((r for r in registries if name in r), None)
    if name in fields and 'registry' in fields[name].metadata:
      built[name] = _build_variant(fields[name], value, f'{path}.{name}', problems)
    elif name in fields:
      built[name] = _convert(hints[name], value, f'{path}.{name}', problems)
    elif registry is not None:
      of_entries[name] = _build(registry.settings(name), value, f'{path}.{name}', problems)
    else:
      problems.unknown(f'{path}.{name}', fields, (n for r in registries for n in r))
  if len(problems) > before:
    return None
  if of_entries:
    built['sections'] = Sections(of_entries)
  try:
    return cls(**built)
  except ValueError as e:
    problems.extend(f'{path}: {line}' for line in str(e).splitlines())
    return None


def _build_variant(field: dataclasses.Field, value: Any, path: str, problems: Problems) -> Any:
  registry, default = field.metadata['registry'], field.metadata['default']
  if dataclasses.is_dataclass(value):
    return value
  name = str(value.get('name', default)) if isinstance(value, Mapping) else default
  if name not in registry:
    problems.append(f'{path}.name: {name!r} is unknown; {known_names(name, registry)}')
    return None
  return _build(registry.settings(name), value, path, problems)


def _convert(hint: Any, value: Any, path: str, problems: Problems) -> Any:
  """`value` converted to the type `hint`; appends to `problems` what does not fit."""
  if dataclasses.is_dataclass(hint):
    return _build(typing.cast(type, hint), value, path, problems)
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):  # X | None
    if value is None or (isinstance(value, Text) and value.lower() == 'none'):
      return None
    return _convert(next(a for a in args if a is not type(None)), value, path, problems)
  if origin is tuple:
    if isinstance(value, Text):
      value = _parse_tuple(value, args[0])
    if not isinstance(value, (list, tuple)):
      value = (value,)
    return tuple(_convert(args[0], item, f'{path}[{i}]', problems) for i, item in enumerate(value))
  if origin is dict:
    if not isinstance(value, Mapping):
      problems.append(f'{path}: expects named sections of fields, got {str(value)!r}')
      return {}
    return {name: _convert(args[1], item, f'{path}.{name}', problems) for name, item in value.items()}
  if origin is typing.Literal:
    if value not in args:
      near = nearest(str(value), map(str, args))
      hint = f' (did you mean {near!r}?)' if near else ''
      problems.append(f'{path}: {str(value)!r} is not one of {", ".join(map(repr, args))}{hint}')
    return str(value)
  return _scalar(hint, value, path, problems)


def _scalar(hint: type, value: Any, path: str, problems: Problems) -> Any:
  if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
    return str(value)  # also from a number, such as the step of a checkpoint
  parsed = _parse(value) if isinstance(value, Text) else value
  if hint is float and isinstance(parsed, int) and not isinstance(parsed, bool):
    parsed = float(parsed)
  if hint is float and isinstance(parsed, float) and not math.isfinite(parsed):
    problems.append(f'{path}: expects a finite number, got {value}')
  elif type(parsed) is not hint:
    kind = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text'}[hint]
    problems.append(f'{path}: expects {kind}, got {str(value)!r}')
  return parsed


def _parse(text: str) -> Any:
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    return float(text) if text.lower() in ('nan', 'inf', '-inf') else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _parse_tuple(text: str, kind: type) -> Any:
  """The items of (1,2) or 1,2 or a,b or 'a,b' or (). Empty text is one empty string for `kind` str, else no items."""
  value = text if kind is str and text.lstrip()[:1] not in ('(', '[', '"', "'") else _parse(text)
  if value is not text:
    return value
  return [Text(part.strip()) for part in text.split(',')] if text or kind is str else ()


def override(values: dict, overrides: Mapping[str, Any]) -> None:
  """Sets values by path in nested dicts: {'model.num_layers': '4'}. Text is parsed later, by the type of its field.

  Raises ConfigError where a path leads through a value or names a section.
  """
  problems = []
  for path, text in overrides.items():
    *groups, leaf = path.split('.')
    node: Any = values
    for group in groups:
      node = node.setdefault(group, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
      problems.append(f'config.{path}: no such field; config.{".".join(groups)} is a value, not a section')
    elif isinstance(node.get(leaf), dict):
      problems.append(f'config.{path}: is a section; set one of its fields: {", ".join(node[leaf])}')
    else:
      node[leaf] = Text(text) if isinstance(text, str) else text
  if problems:
    raise ConfigError('\n'.join(problems))
