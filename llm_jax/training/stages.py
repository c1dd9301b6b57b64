"""Stages of a run: batches that grow, other mixtures, longer rows, from stated steps on.

Each stage is trained like a run that goes on with another config. Where its batches begin follows from the tokens that
the stages before it have read: of the same rows the order goes on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses

from llm_jax.base.builder import build, override
from llm_jax.base.errors import ConfigError
from llm_jax.config import Config, to_dict


@dataclasses.dataclass(frozen=True)
class Plan:
  """A stage with its place in the run."""

  run: Config  # the whole run's
  config: Config
  begin: int  # steps done before it
  end: int
  sizes: tuple[tuple[int, int], ...]  # (begin, tokens of a batch) of each stage up to this one
  new_data: bool  # not as the stage before it

  def rows_at(self, step: int) -> int:
    """Rows of this stage's length that have been read when `step` steps are done, in this stage and before it."""
    ends = [begin for begin, _ in self.sizes[1:]] + [step]
    tokens = sum(max(0, min(step, end) - begin) * size
                 for (begin, size), end in zip(self.sizes, ends, strict=True) if begin < self.begin)
    return tokens // self.config.data.seq_len + max(0, step - self.begin) * self.config.rows_per_batch


def plan(config: Config) -> list[Plan]:
  """The stages in their order, at least one. Raises ConfigError, for all of them at once."""
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
    problems.append(f'config.stages: they must begin at different steps before num_steps {config.num_steps}; got '
                    f'{", ".join(map(str, begins[1:]))}')
  if problems:
    raise ConfigError('\n'.join(problems))
  longest = {'max_len': max(c.data.seq_len for c in configs), 'encoder_len': max(c.data.encoder_len for c in configs)}
  left_open = {name: size for name, size in longest.items() if getattr(config.model, name, 0) is None}
  plans, sizes = [], tuple[tuple[int, int], ...]()
  for i, (begin, each) in enumerate(zip(begins, configs, strict=True)):
    end = [*begins, config.num_steps][i + 1]
    if len(configs) > 1:
      each = dataclasses.replace(each, model=dataclasses.replace(each.model, **left_open))
    sizes += ((begin, each.batch_tokens),)
    plans.append(Plan(config, each, begin, end, sizes, i > 0 and each.data != configs[i - 1].data))
  return plans


def at_step(config: Config, step: int) -> Config:
  """The config of the stage that did this step."""
  plans = plan(config)
  return next((each for each in plans if step <= each.end), plans[-1]).config
