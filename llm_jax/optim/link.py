"""Link, the base class of the elements of an optimizer chain, each with its config section."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar, Literal

import jax
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.ranges import Ranged
from llm_jax.base.registry import settings_from_signature


class Link(Ranged):
  """A gradient transformation with its reports. To add one, write a subclass and register it in TRANSFORMS.

  make(schedule, info)              the transformation; `info` is a tree of ParamInfo: axes, shape, roles, fan_in
  evaluated(state, params)          the weights to evaluate and export, for example averages
  report(state)                     scalars to log
  judge(state, loss, grad_norm)     whether the step may be applied, and the state, which notes also steps that may not
  update_from_eval(state, results)  the state after an evaluation with these results ('val/loss', ...)
  check(optim)                      raises ValueError if other settings of the OptimConfig do not fit this link
  """

  # Filters come before the optimizer in a chain, controls after it.
  place: ClassVar[Literal['filter', 'optimizer', 'control']] = 'optimizer'
  averages: ClassVar[bool] = False  # whether `evaluated` returns other weights than `params`
  scales: ClassVar[bool] = False  # whether it multiplies updates by a factor, as the learning rate does

  @property
  def required_metrics(self) -> tuple[str, ...]:
    """The results that `update_from_eval` uses; if empty, it is not called."""
    return ()

  def check(self, optim: Any) -> None:
    del optim

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    raise NotImplementedError

  def evaluated(self, state: Any, params: Params) -> Params:
    del state
    return params

  def report(self, state: Any) -> Metrics:
    del state
    return {}

  def judge(self, state: Any, loss: jax.Array, grad_norm: jax.Array) -> tuple[jax.Array | bool, Any]:
    del loss, grad_norm
    return True, state

  def update_from_eval(self, state: Any, results: dict[str, float]) -> Any:
    del results
    return state


def regular(pattern: str) -> None:
  """Raises ValueError for an invalid regular expression."""
  try:
    re.compile(pattern)
  except re.error as e:
    raise ValueError(f'pattern {pattern!r} is not a regular expression: {e}') from None


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
