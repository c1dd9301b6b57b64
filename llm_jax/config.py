"""The root Config, and `base()`, from which config files start; they are found and loaded in config_file.py.

The strict builder (base/builder.py) turns the values of a file and of the command line into these frozen dataclasses;
the rest of the package uses only them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from llm_jax.base.builder import (
  Sections,
  check_names,
  keep_named,
  known_names,
  registries_of,
  sections,
  to_dict,
  variant,
)
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.conditions import condition
from llm_jax.base.errors import ConfigError
from llm_jax.base.loggers import LOGGERS
from llm_jax.base.profiling import ProfileConfig
from llm_jax.base.registry import Registry
from llm_jax.base.sharding import MeshConfig
from llm_jax.base.storage import read_workdir
from llm_jax.data.config import DataConfig
from llm_jax.infer.importers import importer_of
from llm_jax.losses.config import LossConfig
from llm_jax.losses.metrics import ANSWER_METRICS, METRICS
from llm_jax.models.registry import MODELS
from llm_jax.optim.chain import OptimConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """When to evaluate, on how much of the validation part, and what to sample."""

  every: int = 250  # steps; 0: no evaluations
  max_tokens: int | None = None  # evenly spread over the validation part; None: all
  prompts: tuple[str, ...] = ('',)  # one sample each; '' starts a new document
  sample_tokens: int = 128  # 0: no samples
  temperature: float = 0.8  # of samples; 0: always the most likely token
  top_k: int = 0  # samples are drawn from the k most likely tokens; 0: from all
  monitor: str = 'val/loss'  # the result that determines the best checkpoint and patience
  mode: Literal['min', 'max'] = 'min'  # whether lower or higher results are better
  patience: int = 0  # the run ends after this many evaluations without an improvement by min_delta; 0: never
  min_delta: float = 0.0  # least improvement of monitor that counts for patience, in its unit
  capabilities: tuple[str, ...] = ()  # conditions 'val/accuracy > 0.5': the first step that meets each is recorded
  goal: str = ''  # a condition that ends the run
  answers: int = 0  # number of prompts of the validation part to answer, for tasks with answers
  num_beams: int = 1  # for answers; 1: greedy
  metrics: tuple[str, ...] = ()  # additional metrics, each one of METRICS, logged as val/NAME
  answer_metrics: tuple[str, ...] = ()  # of answers, each one of ANSWER_METRICS, logged likewise
  # Of answers: one of infer.validators.VALIDATORS, or a command that reads stdin and exits with 0 if it is valid.
  validator: str = ''
  sections: Sections = sections(METRICS, ANSWER_METRICS)

  def __post_init__(self) -> None:
    for field in ('sample_tokens', 'temperature', 'top_k', 'patience', 'min_delta', 'answers'):
      if getattr(self, field) < 0:
        raise ValueError(f'{field} must not be negative; got {getattr(self, field)}')
    for text in self.conditions:
      condition(text)
    if self.every < 0 or self.num_beams < 1:
      raise ValueError(f'every must not be negative, and num_beams at least 1; got {self.every} and {self.num_beams}')
    if not self.every and (self.patience or self.conditions):
      raise ValueError('every is 0, so nothing is evaluated: patience, capabilities and goal would have no effect')
    check_names('metrics', self.metrics, METRICS)
    check_names('answer_metrics', self.answer_metrics, ANSWER_METRICS)
    keep_named(self, (*self.metrics, *self.answer_metrics), 'neither metrics nor answer_metrics names it')
    if self.max_tokens is not None and self.max_tokens < 1:
      raise ValueError(f'max_tokens must be at least 1, or None for all; got {self.max_tokens}')

  @property
  def conditions(self) -> tuple[str, ...]:
    """The capabilities and the goal."""
    return tuple(dict.fromkeys([*self.capabilities, *([self.goal] if self.goal else [])]))


@dataclasses.dataclass(frozen=True)
class StartConfig:
  """How a run starts: from scratch, from another run's weights, or as a branch with another run's whole state."""

  run: str = ''  # the other run's workdir; '': start from scratch
  checkpoint: str = 'latest'  # or best, or a step
  # Whether a published model is compared with transformers first; auto: if torch is installed and it fits in memory.
  check: Literal['auto', 'always', 'never'] = 'auto'
  whole: bool = False  # branch: also restore the optimizer state and the step; needs the same data

  def __post_init__(self) -> None:
    if not self.run and (self.whole or self.checkpoint != 'latest'):
      raise ValueError(f'run must be set to the workdir of the other run if whole ({self.whole}) or checkpoint '
                       f'({self.checkpoint}) is set')


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """Settings that change at step `begin`: 'batch_tokens=16384', 'data.seq_len=512', 'data.sources.code.weight=2'."""

  begin: int = 0  # the step at which the settings begin, at least 1
  set: tuple[str, ...] = ()  # the settings, as 'FIELD=VALUE'

  def __post_init__(self) -> None:
    if self.begin < 1:
      raise ValueError(f'begin must be at least 1; got {self.begin}')
    for entry in self.set:
      name = entry.partition('=')[0]
      if '=' not in entry or any(f'{name}.'.startswith(f'{fixed}.') for fixed in FIXED_IN_STAGES):
        raise ValueError(f'set: each entry must be FIELD=VALUE, and not of {", ".join(FIXED_IN_STAGES)}; got {entry!r}')


FIXED_IN_STAGES = ('model', 'optim', 'loss', 'mesh', 'num_steps', 'num_epochs', 'seed', 'start', 'stages', 'plugins',
                   'eval.validator')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep. A new best (config.eval.monitor) is saved too, unless keep_best is 0."""

  every: int = 1000  # steps
  keep_last: int = 2  # number of newest checkpoints to keep, at least 1
  keep_best: int = 1  # number of best checkpoints to keep; 0: none
  keep_every: int | None = None  # steps: milestones, never deleted
  # Steps, a multiple of log.every: exported/step_N for transformers; None: never.
  export_every: int | None = None

  def __post_init__(self) -> None:
    for field, least in (('every', 1), ('keep_last', 1), ('keep_best', 0), ('keep_every', 1), ('export_every', 1)):
      value = getattr(self, field)
      if value is not None and value < least:
        raise ValueError(f'{field} must be at least {least}; got {value}')


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """When and where to log, and the callbacks for logged steps."""

  every: int = 10  # steps
  loggers: tuple[str, ...] = ('tensorboard', 'jsonl')  # each one of LOGGERS; plot and sweep read that of jsonl
  histograms_every: int = 0  # steps, a multiple of every: histograms of weights, gradients and updates; 0: never
  samples: Literal['auto', 'always', 'never'] = 'auto'  # whether to print samples; auto: in a terminal
  callbacks: tuple[str, ...] = ()  # each one of CALLBACKS, called with each logged step
  sections: Sections = sections(CALLBACKS, LOGGERS)

  def __post_init__(self) -> None:
    if self.every < 1:
      raise ValueError(f'every must be at least 1; got {self.every}')
    if self.histograms_every < 0 or self.histograms_every % self.every:
      raise ValueError(f'histograms_every must be 0 or a multiple of every, {self.every}; got {self.histograms_every}')
    check_names('loggers', self.loggers, LOGGERS)
    check_names('callbacks', self.callbacks, CALLBACKS)
    keep_named(self, (*self.loggers, *self.callbacks), 'neither loggers nor callbacks names it')


@dataclasses.dataclass(frozen=True)
class Config:
  """The config of a whole run. Batch sizes are in tokens; the number of microbatches follows from them."""

  num_steps: int = 1000  # optimizer steps of the whole run, at least 1
  num_epochs: float = 0.0  # passes over the training part, from which num_steps is computed; 0: use num_steps
  seed: int = 0  # of the initial weights, the order of the data and dropout; 0 to 2^32 - 1
  batch_tokens: int = 524288  # tokens per optimizer step, over all devices
  tokens_per_device: int | None = 16384  # tokens on one device at a time; None: as many as fit in its memory
  model: Any = variant(MODELS, 'decoder')
  start: StartConfig = StartConfig()
  stages: dict[str, StageConfig] = dataclasses.field(default_factory=dict)  # by name; see training/stages.py
  plugins: tuple[str, ...] = ()  # files or modules that register parts; see base/plugins.py
  data: DataConfig = DataConfig()
  loss: LossConfig = LossConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log: LogConfig = LogConfig()
  profile: ProfileConfig = ProfileConfig()
  watchdog: float = 1.0  # factor on the limits of base/watchdog.py, such as 55 s or 10 median steps; 0: off

  def __post_init__(self) -> None:
    seq_len, problems = self.data.seq_len, []
    if not 1 <= self.num_steps < 2**31:
      problems.append(f'num_steps must be at least 1 and below 2^31; got {self.num_steps}')
    many = self.stages or self.data.streaming or self.data.sources
    if not 0 <= self.num_epochs <= 1e6 or (self.num_epochs and many):
      problems.append(f'num_epochs {self.num_epochs} must be from 0 to 1e6, and needs a single source without '
                      'data.streaming and without stages; set num_steps instead')
    if self.stages and self.data.streaming:
      problems.append('stages cannot be used with data.streaming, as the step does not determine the position in a '
                      'stream; set data.streaming=False')
    if not 0 <= self.watchdog < float('inf'):
      problems.append(f'watchdog must be at least 0; got {self.watchdog}')
    if not 0 <= self.seed < 2**32:
      problems.append(f'seed must be in [0, 2^32); got {self.seed}')
    if self.batch_tokens < 1 or self.batch_tokens % seq_len:
      near = max(1, self.batch_tokens // seq_len) * seq_len
      problems.append(f'batch_tokens {self.batch_tokens} is not a whole number of rows of data.seq_len {seq_len}; '
                      f'nearest possible: {near}, {near + seq_len}')
    if seq_len % (2 * self.mesh.context) and self.mesh.context > 1:
      problems.append(f'data.seq_len {seq_len} must be a multiple of 2 x mesh.context, {2 * self.mesh.context}')
    if self.tokens_per_device is not None and self.tokens_per_device < self.row_part:
      problems.append(f'tokens_per_device {self.tokens_per_device} is less than one row of data.seq_len {seq_len}'
                      f'{f" / mesh.context {self.mesh.context}" if self.mesh.context > 1 else ""}; set '
                      f'{self.row_part} or more, or None to use what fits in memory')
    for longest, length in (('max_len', 'seq_len'), ('encoder_len', 'encoder_len')):
      most, needed = getattr(self.model, longest, None), getattr(self.data, length)
      if most is not None and most < needed:
        problems.append(f'model.{longest} {most} is less than data.{length} {needed}')
    if not self.num_epochs:  # otherwise num_steps is not known yet
      problems += self.optim.misfits(self.num_steps)
      if self.profile.start > max(self.num_steps, 0):
        problems.append(f'profile.start {self.profile.start} is beyond num_steps {self.num_steps}; set 0 for no trace')
    if (exports := self.checkpoint.export_every) is not None and exports % self.log.every:
      problems.append(f'checkpoint.export_every must be a multiple of log.every, {self.log.every}; got {exports}')
    if self.start.whole and self.stages:
      problems.append('start.whole cannot be used with stages: a branch reads the same data as its trunk')
    if self.mesh.repeats > 1 and getattr(self.model, 'remat', 'full') == 'none':
      problems.append("mesh.repeats above 1 needs a model.remat other than 'none', which would keep the weights of "
                      'each tick of the pipeline')
    problems += self.data.task_settings.problems(self)
    for part in (self.model, self.loss, self.optim):
      for settings in getattr(part, 'sections', {}).values():
        problems += getattr(settings, 'problems', lambda config: [])(self)
    if self.eval.every and (known := self.results) is not None:
      problems += [f'{field} {name} is not a result of evaluations in this run; {known_names(name, sorted(known))}'
                   for field, names in self.required_results.items() for name in names if name not in known]
    if problems:
      raise ValueError('\n'.join(problems))

  @property
  def results(self) -> set[str] | None:
    """The names of results that evaluations may have; None if a loss does not declare its own."""
    names, evaluation = self.loss.results, self.eval
    if names is None:
      return None
    names |= set(evaluation.metrics)
    if evaluation.answers:
      names |= {'exact_match', 'answer_accuracy', *evaluation.answer_metrics}
      names |= {'valid'} if evaluation.validator else set()
    if len(self.data.sources) > 1:
      names |= {f'{source}/{name}' for source in self.data.sources for name in ('loss', 'bits_per_byte')}
    return {f'val/{name}' for name in names}

  @property
  def required_results(self) -> dict[str, tuple[str, ...]]:
    """The results that the config uses, by the field that names them."""
    return {'eval.monitor': (self.eval.monitor,),
            'eval.goal or capabilities': tuple(condition(text).metric for text in self.eval.conditions),
            **{f'optim.{name}': link.required_metrics
               for name, link in zip(self.optim.chain, self.optim.links, strict=True)}}

  @property
  def writes(self) -> bool:
    """Whether the trained model can generate text."""
    return self.loss.writes and self.data.task_settings.writes

  @property
  def answers(self) -> bool:
    """Whether the model learns answers to prompts."""
    return self.writes and self.data.task_settings.needs == 'answers' and not self.data.task_settings.whole

  @property
  def rows_per_batch(self) -> int:
    return self.batch_tokens // self.data.seq_len

  @property
  def row_part(self) -> int:
    """The tokens of one row that a device has."""
    return self.data.seq_len // self.mesh.context

  def split_batch(self, num_shards: int) -> tuple[int, int]:
    """(rows on a device at a time, number of microbatches) for a batch split over `num_shards` devices.

    tokens_per_device None counts as the whole batch. Raises ConfigError, with the nearest possible sizes, if the batch
    cannot be split.
    """
    rows = self.rows_per_batch
    if rows % num_shards:
      step = num_shards * self.data.seq_len
      near = self.batch_tokens // step * step
      raise ConfigError(f'config.batch_tokens: {self.batch_tokens} tokens are {rows} rows, which {num_shards} devices '
                        f'cannot share; nearest possible: {", ".join(str(n) for n in (near, near + step) if n)}')
    rows //= num_shards
    most = rows if self.tokens_per_device is None else min(rows, self.tokens_per_device // self.row_part)
    held = max(n for n in range(1, most + 1) if rows % n == 0)
    return held, rows // held


class OpenSection(ml_collections.ConfigDict):
  """A section of base() that creates the settings of a registered entry, at their defaults, on first access."""

  def __init__(self, values: dict, registries: tuple[Registry, ...] = (), **options: Any):  # options: of a dict in it
    super().__init__(values, **options)
    object.__setattr__(self, '_registries', registries)

  def __getattr__(self, name: str) -> Any:
    registry = next((r for r in self._registries if name in r), None) if name[:1] != '_' and name not in self else None
    if registry is not None:
      with self.unlocked():
        self[name] = ml_collections.ConfigDict(to_dict(registry.settings(name)())).lock()
    return super().__getattr__(name)


def base(model: str = 'decoder') -> ml_collections.ConfigDict:
  """All fields of Config at their defaults, with one of MODELS, as a locked ConfigDict that rejects unknown names."""
  if model not in MODELS:
    raise ConfigError(f'model {model!r} is unknown; {known_names(model, MODELS)}')
  config = Config(model=MODELS.settings(model)())
  values = ml_collections.ConfigDict(to_dict(config))
  for name in ('model', 'data', 'loss', 'optim', 'eval', 'log'):
    section = getattr(config, name)
    values[name] = OpenSection(to_dict(section), registries_of(type(section)))
  return values.lock()


def base_from(folder: str) -> ml_collections.ConfigDict:
  """base() for training a published model further: with its config, tokenizer and weights.

  `folder` is as transformers writes it, or hf:org/name. Raises ConfigError, StorageError.
  """
  path = read_workdir(folder)
  importer = importer_of(path)
  if importer is None:
    raise ConfigError(f'{folder}: is no folder of a published model, with model_type in its config.json; to '
                      'continue a run, set config.start.run')
  values = importer.model_values(path)
  config = base(values['name'])
  with config.unlocked():
    config.model = OpenSection(values, registries_of(MODELS.settings(values['name'])))
  config.start.run, config.data.tokenizer = folder, importer.tokenizer(path)
  return config.lock()


def replace(config: Config, **values: Any) -> Config:
  """The config with `values` replaced. Raises ConfigError if they do not fit the rest."""
  try:
    return dataclasses.replace(config, **values)
  except ValueError as e:
    raise ConfigError('\n'.join(f'config: {line}' for line in str(e).splitlines())) from None


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
