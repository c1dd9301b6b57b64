"""The result of a campaign: trials, failures with what was seen, and figures."""

from __future__ import annotations

import dataclasses
import time
from typing import Any


@dataclasses.dataclass
class Tally:
  name: str
  trials: int = 0
  passed: int = 0
  failures: list[str] = dataclasses.field(default_factory=list)
  figures: dict[str, Any] = dataclasses.field(default_factory=dict)
  begun: float = dataclasses.field(default_factory=time.monotonic)

  def add(self, trial: str, *problems: str) -> None:
    """Counts a trial, which passed if all problems are ''."""
    self.trials += 1
    found = '; '.join(filter(None, problems))
    self.passed += not found
    if found:
      self.failures.append(f'{trial}: {found}')
    print(f'  {self.name} {self.trials}: {trial}: {found or "ok"}', flush=True)

  def most(self, name: str, value: float) -> None:
    """Keeps the highest value of a figure."""
    self.figures[name] = max(value, self.figures.get(name, value))

  def count(self, name: str, number: int = 1) -> None:
    self.figures[name] = self.figures.get(name, 0) + number

  def to_json(self) -> dict[str, Any]:
    return {'trials': self.trials, 'passed': self.passed, 'seconds': round(time.monotonic() - self.begun, 1),
            'figures': self.figures, 'failures': self.failures}
