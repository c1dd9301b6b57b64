"""LossConfig, the registry of losses, and the objective for a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_jax.base.builder import Sections, check_names, keep_named, known_names, sections
from llm_jax.base.ranges import Ranged, at_least
from llm_jax.base.registry import Registry, register
from llm_jax.losses.balance import BALANCES
from llm_jax.losses.function import adapt_loss
from llm_jax.losses.next_token import NextToken
from llm_jax.losses.objective import Objective
from llm_jax.losses.term import Constants

# Terms (see losses/term.py), or functions (logits, batch) -> (losses, weights) of each token.
LOSSES = Registry('loss', adapt_loss)
register(LOSSES, 'next_token', NextToken)


@dataclasses.dataclass(frozen=True)
class LossConfig(Ranged):
  """The losses that are added up, how they are weighted, and the settings of each."""

  terms: tuple[str, ...] = ('next_token',)  # each one of LOSSES
  balance: str = 'fixed'  # one of BALANCES
  alpha: float = at_least(0, 1.5)  # of balances by speed: how strongly they favour losses that decrease slowly
  sections: Sections = sections(LOSSES)

  def __post_init__(self) -> None:
    super().__post_init__()
    check_names('terms', self.terms, LOSSES)
    if not self.terms or len(set(self.terms)) < len(self.terms):
      raise ValueError(f'terms must name at least one loss, each once; got {self.terms}')
    if self.balance != 'fixed' and len(self.terms) < 2:
      raise ValueError(f'balance {self.balance} needs two terms or more; got {self.terms}')
    if self.balance not in BALANCES:
      raise ValueError(f'balance {self.balance!r} is unknown; {known_names(self.balance, BALANCES)}')
    by_speed = BALANCES[self.balance].by_speed
    if not by_speed and self.alpha != LossConfig.alpha:
      names = ', '.join(name for name in BALANCES if BALANCES[name].by_speed)
      raise ValueError(f'alpha {self.alpha} is a setting of balance {names}, but balance is {self.balance}: it would '
                       'have no effect')
    keep_named(self, self.terms, 'terms does not name it')
    weights = {name: self.sections[name].weight for name in self.terms}
    if set(weights.values()) != {1.0} and (len(self.terms) < 2 or by_speed):
      raise ValueError(f'the weight of {"a lone term" if len(weights) < 2 else "each term"} must be 1 '
                       f'(balance {self.balance}): it would have no effect; got {weights}')
    for name in self.terms:
      self.sections[name].check(self)

  @property
  def writes(self) -> bool:
    """Whether a model trained with these losses can generate text."""
    return any(self.sections[name].writes for name in self.terms)

  @property
  def results(self) -> set[str] | None:
    """The names of results of evaluations; None if a term does not declare its own."""
    terms = {name: self.sections[name] for name in self.terms if self.sections[name].evaluated}
    names = {name: term.results for name, term in terms.items()} or {'next_token': NextToken.results}
    if None in names.values():
      return None
    if len(names) == 1:
      return set(*names.values())
    return {'loss'} | {f'{name}/{result}' for name, results in names.items() for result in results}

  def with_labels(self, labels: np.ndarray | None, classes: tuple[str, ...] = ()) -> LossConfig:
    """The config with fields filled in from the training part's labels and class names. Raises ValueError."""
    fitted: dict[str, Any] = {}
    for name in self.terms:
      try:
        fitted[name] = self.sections[name].with_labels(labels, classes)
      except ValueError as e:
        raise ValueError(f'{name}.{e}') from None
    return dataclasses.replace(self, sections=Sections(fitted))


def make_objective(config: LossConfig, given: Mapping[str, Any] | None = None,
                   metrics: tuple[tuple[str, Any], ...] = (),
                   constants: Mapping[str, Constants] | None = None) -> Objective:
  """The objective for a config that `with_labels` has filled in.

  Terms in `given` replace those of the config with their names; `constants` are those of terms by name.
  """
  terms = {name: config.sections[name] for name in config.terms} | dict(given or {})
  functions = tuple((name, constant.function) for name, constant in (constants or {}).items())
  return Objective(tuple(terms.items()), BALANCES[config.balance](config.alpha), functions, metrics)
