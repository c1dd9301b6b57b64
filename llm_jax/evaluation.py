"""Evaluation over a whole data set: exact sums, divided once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax

from llm_jax.types import Batch, Metrics, Params


def evaluate(eval_fn: Callable[[Params, Batch], Metrics], params: Params, batches: Iterable[Batch]) -> dict[str, float]:
  """The sums of eval_step over all batches."""
  # The sums of batch i are fetched while batch i+1 runs, and added in double precision.
  totals: dict[str, float] = {}
  pending: Metrics = {}

  def add(sums: Metrics) -> None:
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0.0) + float(value)

  for batch in batches:
    sums = eval_fn(params, batch)
    add(pending)
    pending = sums
  add(pending)
  return totals


def summarize(totals: dict[str, float]) -> dict[str, float]:
  """loss (nats a token), perplexity, accuracy, bits_per_byte (where tokens have bytes) and their token count."""
  loss = totals['nll'] / totals['tokens']
  results = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)), 'accuracy': totals['correct'] / totals['tokens'],
             'tokens': totals['tokens']}
  if totals['bytes']:
    results['bits_per_byte'] = totals['nll'] / math.log(2) / totals['bytes']
  return results
