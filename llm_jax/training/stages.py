"""Stages of a run: changes of batch size, mixture or row length at given steps.

Each stage is trained like a resumed run with another config. Its first row is computed from the number of tokens that
earlier stages have used, so the order of rows continues.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial

from llm_jax.base.builder import build, override, to_dict
from llm_jax.base.errors import ConfigError
from llm_jax.base.multihost import gather
from llm_jax.config import Config
from llm_jax.data.open import Data, data_fingerprint

Gaps = tuple[tuple[int, int], ...]  # (step, tokens of training data that are left out after it); see rewind.py


@dataclasses.dataclass(frozen=True)
class Stage:
  """The config of a stage with its range of steps."""

  run: Config  # of the whole run
  config: Config
  begin: int  # steps done before it
  end: int
  sizes: tuple[tuple[int, int], ...]  # (first step, tokens of a batch) of each stage up to this one
  new_data: bool  # whether its data settings differ from those of the stage before
  gaps: Gaps = ()

  def tokens_at(self, step: int) -> int:
    """Tokens of training data that are used or left out before the batch after `step`."""
    return _tokens_at(self.sizes, self.gaps, step)

  @property
  def first_row(self) -> Callable[[int], int]:
    """A function of a step: the first row of the batch after it, in rows of this stage's seq_len.

    It holds numbers alone, as it goes to the processes that make batches.
    """
    return partial(_first_row, self.sizes, self.gaps, self.config.data.seq_len)

  def end_row(self, step: int) -> int:
    """The row after the batch of `step`, one of this stage's, without what is left out after it."""
    return self.first_row(step - 1) + self.config.rows_per_batch

  def with_gaps(self, gaps: Gaps) -> Stage:
    return dataclasses.replace(self, gaps=gaps)


def _tokens_at(sizes: tuple[tuple[int, int], ...], gaps: Gaps, step: int) -> int:
  ends = [begin for begin, _ in sizes[1:]] + [step]
  used = sum(max(0, min(step, end) - begin) * size for (begin, size), end in zip(sizes, ends, strict=True))
  return used + sum(tokens for at, tokens in gaps if at <= step)


def _first_row(sizes: tuple[tuple[int, int], ...], gaps: Gaps, seq_len: int, step: int) -> int:
  return _tokens_at(sizes, gaps, step) // seq_len


def make_stages(config: Config, gaps: Gaps = ()) -> list[Stage]:
  """The stages in order, at least one. Raises ConfigError with the problems of all stages."""
  stages = sorted(config.stages.items(), key=lambda item: item[1].begin)
  begins = [0, *(stage.begin for _, stage in stages)]
  problems, configs = [], [config]
  for name, stage in stages:
    values = to_dict(configs[-1])
    try:
      override(values, dict(entry.split('=', 1) for entry in stage.set))
      configs.append(build(Config, values))
    except ConfigError as e:
      problems.append(f'config.stages.{name}: {e}')
  if begins[-1] >= config.num_steps or len(set(begins)) < len(begins):
    problems.append(f'config.stages: stages must begin at different steps before num_steps {config.num_steps}; got '
                    f'{", ".join(map(str, begins[1:]))}')
  if problems:
    raise ConfigError('\n'.join(problems))
  longest = {'max_len': max(c.data.seq_len for c in configs), 'encoder_len': max(c.data.encoder_len for c in configs)}
  unset = {name: size for name, size in longest.items() if getattr(config.model, name, 0) is None}
  found, sizes = [], tuple[tuple[int, int], ...]()
  for i, (begin, each) in enumerate(zip(begins, configs, strict=True)):
    end = [*begins, config.num_steps][i + 1]
    if len(configs) > 1:
      each = dataclasses.replace(each, model=dataclasses.replace(each.model, **unset))
    sizes += ((begin, each.batch_tokens),)
    found.append(Stage(config, each, begin, end, sizes, i > 0 and each.data != configs[i - 1].data, gaps))
  return found


def config_at(config: Config, step: int) -> Config:
  """The config of the stage that this step belongs to."""
  stages = make_stages(config)
  return next((stage for stage in stages if step <= stage.end), stages[-1]).config


def fingerprint_of(stage: Stage, data: Data) -> dict:
  """Everything that determines the stage's batches. Raises ConfigError if it differs between processes."""
  config = stage.config
  fingerprint = data_fingerprint(config.data, data, config.rows_per_batch, config.seed)
  if stage.begin:
    fingerprint['first_row'] = stage.first_row(stage.begin)
  if any(theirs != json.loads(json.dumps(fingerprint)) for theirs in gather(fingerprint)):
    raise ConfigError('config.data: the processes read different data; set config.data.cache_dir to a shared folder, '
                      'or give all hosts the same files and package versions')
  return fingerprint
