"""The source of example n of a mixture: exact shares, evenly spread, a function of n alone."""

from __future__ import annotations

import numpy as np

CYCLE = 10_000  # examples after which the pattern of sources repeats; shares are multiples of 1 / CYCLE


class Mixture:
  """Maps examples to (source, index in it). Weights may change at given examples; each source keeps its order."""

  def __init__(self, weights: list[list[float]], begins: list[int]):
    """`weights[stage][source]`, any positive scale; `begins[stage]` is the example at which a stage begins, 0 first."""
    self.begins, self.stages = begins, []
    used = np.zeros(len(weights[0]), np.int64)
    for stage, end in zip(weights, [*begins[1:], None], strict=True):
      quotas = _quotas(np.asarray(stage, np.float64))
      # Source s takes the places (k + 1/2) / quota_s of a cycle, k = 0, 1, ...: evenly spread.
      places = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
      order = np.concatenate([np.full(q, s) for s, q in enumerate(quotas)])[np.argsort(places, kind='stable')]
      chosen = np.eye(len(quotas), dtype=np.int64)[order]
      before = np.cumsum(chosen, axis=0) - chosen
      self.stages.append((used, quotas, order, before))
      if end is not None:
        cycles, rest = divmod(end - begins[len(self.stages) - 1], CYCLE)
        used = used + cycles * quotas + np.bincount(order[:rest], minlength=len(quotas))

  def __call__(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sources, indices in them) of the mixture's `examples`, each int64 [n]."""
    sources, own = np.empty_like(examples), np.empty_like(examples)
    stages = np.searchsorted(self.begins, examples, 'right') - 1
    for stage in set(stages.tolist()):
      at = stages == stage
      used, quotas, order, before = self.stages[stage]
      cycles, places = np.divmod(examples[at] - self.begins[stage], CYCLE)
      sources[at] = chosen = order[places]
      own[at] = used[chosen] + cycles * quotas[chosen] + before[places, chosen]
    return sources, own


def _quotas(weights: np.ndarray) -> np.ndarray:
  """Whole numbers that sum to CYCLE, by largest remainders; at least 1 for a weight above 0."""
  exact = weights / weights.sum() * CYCLE
  quotas = np.where(weights > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
  by_need = np.argsort(quotas - exact, kind='stable')
  while (missing := CYCLE - quotas.sum()) != 0:
    step = int(np.sign(missing))
    for source in (by_need if step > 0 else by_need[::-1])[:abs(missing)]:
      if weights[source] > 0 and quotas[source] + step > 0:
        quotas[source] += step
  return quotas
