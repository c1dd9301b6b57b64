"""Additional evaluation metrics: functions of logits and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_jax.base.registry import Registry, bind_settings

# METRICS[name](settings) maps (logits [B, T, V], batch) to values and weights [B, T]; val/NAME is their weighted mean.
METRICS = Registry('metric', bind_settings)
Metric = Callable[..., Any]


def make_metrics(names: tuple[str, ...], sections: Any) -> tuple[tuple[str, Metric], ...]:
  """(name, function) of each metric in `names`."""
  return tuple((name, METRICS[name](METRICS.section(name, sections))) for name in names)
