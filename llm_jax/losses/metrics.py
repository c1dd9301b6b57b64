"""Additional evaluation metrics: functions of logits and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llm_jax.base.registry import Registry, settings_from_signature


def adapt_metric(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """Adapts a function (logits, batch, **settings) -> (values, weights) per token to settings -> metric."""
  return lambda section: functools.partial(value, **vars(section)), settings or settings_from_signature(value)


# METRICS[name](settings) maps (logits [B, T, V], batch) to values and weights [B, T]; val/NAME is their weighted mean.
METRICS = Registry('metric', adapt_metric)
Metric = Callable[..., Any]


def make_metrics(names: tuple[str, ...], sections: Any) -> tuple[tuple[str, Metric], ...]:
  """(name, function) of each metric in `names`."""
  return tuple((name, METRICS[name](sections.get(name) or METRICS.settings(name)())) for name in names)
