"""Link, the base class of the elements of an optimizer chain, each with its config section."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar, Literal

import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.registry import settings_from_signature


class Link:
  """A gradient transformation with its reports. To add one, write a subclass and register it in TRANSFORMS.

  make(schedule, info)              the transformation; `info` is a tree of ParamInfo: axes, shape, roles, fan_in
  evaluated(state, params)          the weights to evaluate and export, for example averages
  report(state)                     scalars to log
  update_from_eval(state, results)  the state after an evaluation with these results ('val/loss', ...)
  """

  # Filters come before the optimizer in a chain, controls after it.
  place: ClassVar[Literal['filter', 'optimizer', 'control']] = 'optimizer'

  @property
  def averages(self) -> bool:
    """Whether `evaluated` returns other weights than `params`."""
    return False

  @property
  def required_metrics(self) -> tuple[str, ...]:
    """The results that `update_from_eval` uses; if empty, it is not called."""
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
  """Raises ValueError for values below `least`."""
  for name, value in values.items():
    if not value >= least:
      raise ValueError(f'{name} must be at least {least}; got {value}')


def positive(**values: float) -> None:
  """Raises ValueError for values that are not positive."""
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f'{name} must be positive; got {value}')


def regular(pattern: str) -> None:
  """Raises ValueError for an invalid regular expression."""
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(f'pattern {pattern!r} is not a regular expression: {e}') from None


def rates(**values: float) -> None:
  """Raises ValueError for values outside [0, 1), the range of decay rates."""
  for name, value in values.items():
    if not 0 <= value < 1:
      raise ValueError(f'{name} must be in [0, 1); got {value}')


def adapt_transform(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """A Link unchanged; a function such as optax.lamb as an optimizer, called with the schedule and its settings."""
  if isinstance(value, type) and issubclass(value, Link):
    return value, value

  def make(self: Any, schedule: optax.Schedule, axes: Params) -> optax.GradientTransformation:
    return value(schedule, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  own = settings or settings_from_signature(value)
  place = getattr(value, 'place', 'optimizer')
  link: type = dataclasses.dataclass(frozen=True)(type(own.__name__, (own, Link), {'make': make, 'place': place}))
  return link, link
