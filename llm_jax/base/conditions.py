"""Conditions on the results of an evaluation: 'val/accuracy > 0.5'."""

from __future__ import annotations

import operator
import re
from typing import NamedTuple

COMPARISONS = {'>=': operator.ge, '<=': operator.le, '>': operator.gt, '<': operator.lt}


class Condition(NamedTuple):
  metric: str
  comparison: str  # of COMPARISONS
  value: float

  def holds(self, results: dict[str, float]) -> bool:
    """Whether the results meet the condition. Raises ValueError for an unknown metric, with the known ones."""
    if self.metric not in results:
      raise ValueError(f'{self.metric} is not a result of the evaluation; known: {", ".join(sorted(results))}')
    return COMPARISONS[self.comparison](results[self.metric], self.value)


def condition(text: str) -> Condition:
  """Parses a condition. Raises ValueError."""
  parts = re.fullmatch(r'\s*([\w/.-]+)\s*(>=|<=|>|<)\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*', text)
  if parts is None:
    raise ValueError(f"{text!r} is not a condition; write a metric, one of {', '.join(COMPARISONS)} and a number, as "
                     "in 'val/accuracy > 0.5'")
  return Condition(parts[1], parts[2], float(parts[3]))
