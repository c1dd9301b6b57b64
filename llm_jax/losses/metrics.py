"""Additional evaluation metrics: functions of logits and batch, or of generated answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_jax.base.registry import Registry, bind_settings

# METRICS[name](settings) maps (logits [B, T, V], batch) to values and weights [B, T]; val/NAME is their weighted mean.
METRICS = Registry('metric', bind_settings)
# ANSWER_METRICS[name](settings) maps answers, which have `given` and `expected` texts, to the number val/NAME.
ANSWER_METRICS = Registry('answer_metric', bind_settings)
Metric = Callable[..., Any]


def make_metrics(names: tuple[str, ...], sections: Any,
                 registry: Registry = METRICS) -> tuple[tuple[str, Metric], ...]:
  """(name, function) of each metric in `names`."""
  return tuple((name, registry[name](registry.section(name, sections))) for name in names)
