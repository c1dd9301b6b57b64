"""Evaluation over a whole data set: exact sums, divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from llm_jax.base.batch import Batch, Metrics, Params


def evaluate(eval_fn: Callable[[Params, Batch], Metrics], params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
  """The sums of eval_step over all batches: numbers, and NumPy arrays of float64."""
  # The sums of batch i are fetched while batch i+1 runs, and added in double precision.
  totals: dict[str, Any] = {}
  pending: Metrics = {}

  def add(sums: Metrics) -> None:
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)

  for batch in batches:
    sums = eval_fn(params, batch)
    add(pending)
    pending = sums
  add(pending)
  return {name: value if value.ndim else float(value) for name, value in totals.items()}
