"""What a chain is made of: a Link, one section of the config."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar, Literal

import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.registry import settings_from_signature


class Link:
  """A gradient transformation and what it tells of itself. A new one is a subclass and a line in TRANSFORMS.

  make(schedule, info)    the transformation; `info` is a tree of ParamInfo: axes, shape, roles, fan_in of a parameter
  evaluated(state, params)  the weights that are evaluated and exported: averages, for one
  report(state)           scalars to log
  update_from_eval(state, results)    the state after an evaluation, whose results ('val/loss', ...) these are
  """

  place: ClassVar[Literal['filter', 'optimizer', 'control']] = 'optimizer'  # filters come before it, controls after

  @property
  def averages(self) -> bool:
    """Whether `evaluated` gives other weights."""
    return False

  @property
  def required_metrics(self) -> tuple[str, ...]:
    """The results that `update_from_eval` looks at; without any it is not called."""
    return ()

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    raise NotImplementedError

  def evaluated(self, state: Any, params: Params) -> Params:
    del state
    return params

  def report(self, state: Any) -> Metrics:
    del state
    return {}

  def update_from_eval(self, state: Any, results: dict[str, float]) -> Any:
    del results
    return state


def at_least(least: float, **values: float) -> None:
  """Raises ValueError naming the values below `least`."""
  for name, value in values.items():
    if not value >= least:
      raise ValueError(f'{name} must be at least {least}; got {value}')


def positive(**values: float) -> None:
  """Raises ValueError naming the values that are not above 0."""
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f'{name} must be positive; got {value}')


def regular(pattern: str) -> None:
  """Raises ValueError for what is no regular expression."""
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(f'pattern {pattern!r} is no regular expression: {e}') from None


def rates(**values: float) -> None:
  """Raises ValueError naming the values that are not in [0, 1), as rates of decaying averages are."""
  for name, value in values.items():
    if not 0 <= value < 1:
      raise ValueError(f'{name} must lie in [0, 1); got {value}')


def adapt_transform(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """A Link as it is; a function such as optax.lamb, called with the schedule and its settings, as an optimizer."""
  if isinstance(value, type) and issubclass(value, Link):
    return value, value

  def make(self: Any, schedule: optax.Schedule, axes: Params) -> optax.GradientTransformation:
    return value(schedule, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  own = settings or settings_from_signature(value)
  place = getattr(value, 'place', 'optimizer')
  link: type = dataclasses.dataclass(frozen=True)(type(own.__name__, (own, Link), {'make': make, 'place': place}))
  return link, link
