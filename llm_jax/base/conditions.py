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
    """Whether it does. Raises ValueError naming what there is where the metric is none of it."""
    if self.metric not in results:
      raise ValueError(f'{self.metric} is no result of an evaluation; there are: {", ".join(sorted(results))}')
    return COMPARISONS[self.comparison](results[self.metric], self.value)


def condition(text: str) -> Condition:
  """Raises ValueError for a text that is none."""
  parts = re.fullmatch(r'\s*([\w/.-]+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*', text)
  try:
    return Condition(parts[1], parts[2], float(parts[3])) if parts else _no_condition(text)
  except ValueError:
    return _no_condition(text)


def _no_condition(text: str) -> Condition:
  raise ValueError(f"{text!r} is no condition; one is a metric, one of {', '.join(COMPARISONS)}, and a number: "
                   "'val/accuracy > 0.5'")
