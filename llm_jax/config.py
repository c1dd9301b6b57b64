"""The root Config, and the one door to it: a strict builder from nested dicts to frozen dataclasses.

A config file is Python: `get_config()` returns a ConfigDict made by `base()`; `on_cpu(config)`, where it has one,
changes it for a machine that has only CPUs. What the command line sets wins over both. Past this door only
dataclasses exist.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from llm_jax.checkpoint import CheckpointConfig
from llm_jax.data import DataConfig
from llm_jax.errors import ConfigError
from llm_jax.models import MODELS
from llm_jax.optim import OptimConfig
from llm_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """When to evaluate, on how much of the validation part, and what to sample."""

  every: int = 250  # steps
  max_tokens: int | None = None  # evenly spread over the validation part; None: all of it
  prompts: tuple[str, ...] = ('',)  # one sample each; '' starts a new document
  sample_tokens: int = 128  # 0: no samples
  temperature: float = 0.8
  top_k: int = 0

  def __post_init__(self):
    if self.every < 1 or self.sample_tokens < 0 or self.temperature < 0 or self.top_k < 0:
      raise ValueError('every must be at least 1; sample_tokens, temperature and top_k not negative')
    if self.max_tokens is not None and self.max_tokens < 1:
      raise ValueError(f'max_tokens must be at least 1, or None for all; got {self.max_tokens}')


@dataclasses.dataclass(frozen=True)
class LogConfig:
  every: int = 10  # steps

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f'every must be at least 1; got {self.every}')


def _variant(classes: dict[str, type], default: str) -> Any:
  """A field whose dict picks its class by `name`."""
  return dataclasses.field(default_factory=classes[default], metadata={'classes': classes, 'default': default})


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run. Batches are counted in tokens; the number of microbatches follows."""

  num_steps: int = 1000
  seed: int = 0
  batch_tokens: int = 524288  # of one optimizer step, over all devices
  tokens_per_device: int = 16384  # that one device works on at a time: what its memory allows
  z_loss: float = 0.0
  model: Any = _variant({name: config for name, (_, config) in MODELS.items()}, 'decoder')
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()

  def __post_init__(self):
    seq_len, problems = self.data.seq_len, []
    if self.num_steps < 1:
      problems.append(f'num_steps must be at least 1; got {self.num_steps}')
    if not 0 <= self.seed < 2**32:
      problems.append(f'seed must lie in [0, 2^32); got {self.seed}')
    if self.z_loss < 0:
      problems.append(f'z_loss must not be negative; got {self.z_loss}')
    if self.batch_tokens < 1 or self.batch_tokens % seq_len:
      near = max(1, self.batch_tokens // seq_len) * seq_len
      problems.append(f'batch_tokens {self.batch_tokens} is not a whole number of rows of data.seq_len {seq_len}; '
                      f'nearest that are: {near}, {near + seq_len}')
    if self.tokens_per_device < seq_len:
      problems.append(f'tokens_per_device {self.tokens_per_device} does not hold one row of data.seq_len {seq_len}; '
                      f'the least is {seq_len}')
    if self.model.max_len is not None and self.model.max_len < seq_len:
      problems.append(f'model.max_len {self.model.max_len} is less than data.seq_len {seq_len}')
    warmup = getattr(getattr(self.optim, self.optim.schedule), 'warmup_steps', 0)
    if warmup >= self.num_steps:
      problems.append(f'optim.{self.optim.schedule}.warmup_steps {warmup} must be less than num_steps {self.num_steps}')
    if problems:
      raise ValueError('\n'.join(problems))

  @property
  def rows_per_batch(self) -> int:
    return self.batch_tokens // self.data.seq_len

  def split_batch(self, num_shards: int) -> tuple[int, int]:
    """(rows that one shard holds at a time, number of microbatches) for a batch dealt to `num_shards` devices.

    Raises ConfigError, with the nearest batches that can be dealt, when this one cannot.
    """
    rows = self.rows_per_batch
    if rows % num_shards:
      step = num_shards * self.data.seq_len
      near = self.batch_tokens // step * step
      raise ConfigError(f'config.batch_tokens: {self.batch_tokens} tokens are {rows} rows, which {num_shards} devices '
                        f'cannot share; nearest that they can: {", ".join(str(n) for n in (near, near + step) if n)}')
    rows //= num_shards
    held = max(n for n in range(1, self.tokens_per_device // self.data.seq_len + 1) if rows % n == 0)
    return held, rows // held


def base() -> ml_collections.ConfigDict:
  """Every field of Config at its default, as a locked ConfigDict: assigning to an unknown name fails."""
  return ml_collections.ConfigDict(to_dict(Config())).lock()


def to_dict(config: Any) -> dict:
  """Nested plain dicts, ready for JSON."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def build(cls: type, values: Mapping) -> Any:
  """The dataclass from nested mappings; absent fields take their defaults. Raises ConfigError, all problems at once."""
  problems: list[str] = []
  result = _build(cls, values, 'config', problems)
  if problems:
    raise ConfigError('\n'.join(problems))
  return result


class Text(str):
  """A value as typed on the command line: parsed by the type of its field."""


def _build(cls: type, values: Any, path: str, problems: list[str]) -> Any:
  if not isinstance(values, Mapping):
    problems.append(f'{path}: expects a group of fields, got {values!r}')
    return None
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  before = len(problems)
  built = {}
  for name, value in values.items():
    if name not in fields:
      near = difflib.get_close_matches(name, fields, n=1)
      hint = f'did you mean {path}.{near[0]}?' if near else f'known: {", ".join(fields)}'
      problems.append(f'{path}.{name}: no such field; {hint}')
    elif 'classes' in fields[name].metadata:
      built[name] = _build_variant(fields[name], value, f'{path}.{name}', problems)
    else:
      built[name] = _convert(hints[name], value, f'{path}.{name}', problems)
  if len(problems) > before:
    return None
  try:
    return cls(**built)
  except ValueError as e:
    problems.extend(f'{path}: {line}' for line in str(e).splitlines())
    return None


def _build_variant(field: dataclasses.Field, value: Any, path: str, problems: list[str]) -> Any:
  classes = field.metadata['classes']
  name = value.get('name', field.metadata['default']) if isinstance(value, Mapping) else None
  if isinstance(value, Mapping) and name not in classes:
    problems.append(f'{path}.name: {name!r} is unknown; known: {", ".join(classes)}')
    return None
  return _build(classes.get(name, classes[field.metadata['default']]), value, path, problems)


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
  """`value` as the type `hint` says, or a problem."""
  if dataclasses.is_dataclass(hint):
    return _build(typing.cast(type, hint), value, path, problems)
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):  # X | None
    if value is None or (isinstance(value, Text) and value.lower() == 'none'):
      return None
    return _convert(next(a for a in args if a is not type(None)), value, path, problems)
  if origin is tuple:
    if isinstance(value, Text):
      value = _parse_tuple(value)
    if not isinstance(value, (list, tuple)):
      value = (value,)
    return tuple(_convert(args[0], item, f'{path}[{i}]', problems) for i, item in enumerate(value))
  if origin is typing.Literal:
    if value not in args:
      near = difflib.get_close_matches(str(value), map(str, args), n=1)
      hint = f' (did you mean {near[0]!r}?)' if near else ''
      problems.append(f'{path}: {str(value)!r} is not one of {", ".join(map(repr, args))}{hint}')
    return str(value)
  return _scalar(hint, value, path, problems)


def _scalar(hint: type, value: Any, path: str, problems: list[str]) -> Any:
  if hint is str and isinstance(value, str):
    return str(value)
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


def _parse_tuple(text: str) -> Any:
  """(1,2) or 1,2 or a,b or ()."""
  value = _parse(text)
  return [Text(part.strip()) for part in text.split(',')] if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Source:
  """What a config file says, before it is known what machine it runs on."""

  path: Path
  full: dict
  on_cpu: dict | None  # the same with the file's on_cpu applied; None: it has none

  def resolve(self, overrides: Mapping[str, str], *, cpu_only: bool) -> Config:
    """The Config, `overrides` ('model.num_layers' -> '4') last. Raises ConfigError."""
    values = self.on_cpu if cpu_only and self.on_cpu is not None else self.full
    values = json.loads(json.dumps(values))
    problems = []
    for path, text in overrides.items():
      *groups, leaf = path.split('.')
      node = values
      for group in groups:
        node = node.setdefault(group, {}) if isinstance(node, dict) else None
      if not isinstance(node, dict):
        problems.append(f'config.{path}: no such field; config.{".".join(groups)} is a value, not a group')
      elif isinstance(node.get(leaf), dict):
        problems.append(f'config.{path}: is a group of fields; set one of {", ".join(node[leaf])}')
      else:
        node[leaf] = Text(text)
    if problems:
      raise ConfigError('\n'.join(problems))
    return build(Config, values)


def load(path: str | Path) -> Source:
  """Reads a config: a .py file (which is run: it is code you trust), or a run's config.json (which is only read)."""
  path = Path(path)
  if not path.is_file():
    known = sorted(map(str, path.parent.glob('*.py'))) or sorted(map(str, Path('configs').glob('*.py')))
    hint = f'; there are: {", ".join(known)}' if known else ''
    raise ConfigError(f'--config: no such file: {path}{hint}')
  if path.suffix == '.json':
    try:
      values = json.loads(path.read_text())
    except ValueError as e:
      raise ConfigError(f'--config: {path} is not valid JSON: {e}') from None
    if not isinstance(values, dict):
      raise ConfigError(f'--config: {path} holds no object with the fields of a config')
    return Source(path, values, None)
  spec = importlib.util.spec_from_file_location(f'llm_jax_config_{path.stem}', path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'--config: {path} is neither Python nor JSON')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    full, on_cpu = module.get_config(), None
    if hasattr(module, 'on_cpu'):
      on_cpu = module.get_config()
      module.on_cpu(on_cpu)
    return Source(path, full.to_dict(), on_cpu.to_dict() if on_cpu is not None else None)
  except Exception as e:  # whatever a user's file may raise
    raise ConfigError(f'--config: {path}: {type(e).__name__}: {e}') from e


def differences(old: Mapping, new: Mapping, path: str = '') -> dict[str, tuple[Any, Any]]:
  """{'model.num_layers': (12, 6)} for every leaf that differs between two nested dicts."""
  found: dict[str, tuple[Any, Any]] = {}
  for name in {**old, **new}:
    a, b = old.get(name), new.get(name)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      found |= differences(a, b, f'{path}{name}.')
    elif a != b:
      found[f'{path}{name}'] = (a, b)
  return found
