"""Tracks the best evaluation of a run, its patience and its goals."""

from __future__ import annotations

import dataclasses
from typing import Any

from llm_jax.base.conditions import condition
from llm_jax.base.errors import ConfigError
from llm_jax.config import EvalConfig


@dataclasses.dataclass
class Best:
  """The state of early stopping. A score is the monitored metric, negated if larger is better: lower scores win."""

  config: EvalConfig
  since: int = 0  # the first step whose scores are of the current metric on the current data
  saved: float = float('inf')  # the best score that a checkpoint was saved for
  best: float = float('inf')  # of all evaluations
  stale: int = 0  # number of evaluations since the best one
  reached: dict[str, int] = dataclasses.field(default_factory=dict)  # capability: the first step that reached it

  @classmethod
  def from_meta(cls, config: EvalConfig, meta: dict[str, Any], other_data: bool = False) -> Best:
    """The state from a checkpoint, without scores of another metric or on other data."""
    kept = meta.get('best')
    if kept is None:
      return cls(config)
    if other_data or kept['monitor'] != [config.monitor, config.mode]:
      return cls(config, meta.get('step', 0), reached=kept['reached'])
    saved, best = (float('inf') if kept[name] is None else kept[name] for name in ('saved', 'best'))
    return cls(config, kept.get('since', 0), saved, best, kept['stale'], kept['reached'])

  def to_meta(self) -> dict[str, Any]:
    saved, best = (None if value == float('inf') else value for value in (self.saved, self.best))
    return {'monitor': [self.config.monitor, self.config.mode], 'since': self.since, 'saved': saved, 'best': best,
            'stale': self.stale, 'reached': self.reached}

  @property
  def best_value(self) -> float | None:
    """The best value of the monitored metric."""
    return None if self.best == float('inf') else self.best * (1 if self.config.mode == 'min' else -1)

  @property
  def over(self) -> str:
    """Why the run ends early; '' if it continues."""
    if self.config.goal in self.reached:
      return f'{self.config.goal} was reached at step {self.reached[self.config.goal]} (config.eval.goal)'
    if 0 < self.config.patience <= self.stale:
      return f'{self.config.monitor} has not improved for {self.stale} evaluations (config.eval.patience)'
    return ''

  def retention(self, results: dict[str, float]) -> dict[str, float]:
    """{'capability/retained': the share of the reached capabilities that `results` meet}; {} before the first."""
    held = [condition(text).holds(results) for text in self.reached if text in self.config.conditions]
    return {'capability/retained': sum(held) / len(held)} if held else {}

  def update(self, step: int, results: dict[str, float]) -> tuple[float, list[str]]:
    """(score, capabilities reached for the first time). Raises ConfigError for a missing metric."""
    try:
      if self.config.monitor not in results:
        raise ValueError(f'monitor {self.config.monitor!r} is not a result of the evaluation; known: '
                         f'{", ".join(sorted(results))}')
      new = [text for text in self.config.conditions if text not in self.reached and condition(text).holds(results)]
    except ValueError as e:
      raise ConfigError(f'config.eval: {e}') from None
    self.reached |= dict.fromkeys(new, step)
    score = results[self.config.monitor] * (1 if self.config.mode == 'min' else -1)
    self.best, self.stale = (score, 0) if score < self.best - self.config.min_delta else (self.best, self.stale + 1)
    return score, new
