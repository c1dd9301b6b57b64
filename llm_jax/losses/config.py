"""What a run learns: one loss or several, by name. Add one with a Term in a file here and a line in LOSSES."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from llm_jax.losses.balance import BALANCES
from llm_jax.losses.contrastive import Contrastive
from llm_jax.losses.labels import Classification, Regression
from llm_jax.losses.next_token import Distillation, NextToken
from llm_jax.losses.objective import Objective
from llm_jax.losses.readout import Readout, cross_entropy, score
from llm_jax.losses.term import Term

__all__ = ['LOSSES', 'LossConfig', 'Objective', 'Readout', 'Term', 'cross_entropy', 'make_objective', 'score']

LOSSES: dict[str, Callable[..., Any]] = {
    'next_token': NextToken,
    'classification': Classification,
    'regression': Regression,
    'contrastive': Contrastive,
    'distillation': Distillation,
}


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The losses that are added up, the settings of each, and how they are weighed."""

  terms: tuple[str, ...] = ('next_token',)  # of LOSSES
  balance: Literal['fixed', 'uncertainty', 'grad_norm'] = 'fixed'  # see losses/balance.py
  alpha: float = 1.5  # of grad_norm: how much a loss that falls slowly is favoured; 0: not at all
  next_token: NextToken = NextToken()
  classification: Classification = Classification()
  regression: Regression = Regression()
  contrastive: Contrastive = Contrastive()
  distillation: Distillation = Distillation()

  def __post_init__(self):
    for name in self.terms:
      if name not in LOSSES:
        raise ValueError(f'terms names {name!r}, which is unknown; known: {", ".join(LOSSES)}')
    if not self.terms or len(set(self.terms)) < len(self.terms):
      raise ValueError(f'terms holds one loss or more, each once; got {self.terms}')
    if self.balance != 'fixed' and len(self.terms) < 2:
      raise ValueError(f'balance {self.balance} needs two terms or more; got {self.terms}')
    if self.alpha < 0:
      raise ValueError(f'alpha must not be negative; got {self.alpha}')
    if self.balance != 'grad_norm' and self.alpha != LossConfig.alpha:
      raise ValueError(f'alpha {self.alpha} is of balance grad_norm, and balance is {self.balance}: it would have no '
                       'effect')
    weights = {name: getattr(self, name).weight for name in self.terms}
    if set(weights.values()) != {1.0} and (len(self.terms) < 2 or self.balance == 'grad_norm'):
      raise ValueError(f'the weight of {"a lone term" if len(weights) < 2 else "each term"} must be 1 '
                       f'(balance {self.balance}): it would have no effect; got {weights}')
    if self.balance == 'grad_norm' and 'contrastive' in self.terms:
      raise ValueError('balance grad_norm looks at one text of a row, contrastive at two; take fixed or uncertainty')
    if not self.writes and 'distillation' in self.terms and len(self.terms) < 2:
      raise ValueError('distillation.hidden alone never teaches what to write; add next_token to terms, or set logits')
    for name in LOSSES.keys() - set(self.terms):
      if getattr(self, name) != LOSSES[name]():
        raise ValueError(f'{name} is set, but terms does not name it: it would have no effect')
    if 'distillation' in self.terms and not self.distillation.teacher:
      raise ValueError('distillation.teacher must name the workdir of a trained run')

  @property
  def writes(self) -> bool:
    """Whether what is learnt can write text."""
    return 'next_token' in self.terms or ('distillation' in self.terms and self.distillation.logits > 0)

  def fitted(self, labels: np.ndarray | None, classes: tuple[str, ...] = ()) -> LossConfig:
    """With what the labels of the training part, and their names, decide. Raises ValueError where they do not fit."""
    fitted: dict[str, Any] = {}
    for name in self.terms:
      try:
        fitted[name] = getattr(self, name).fitted(labels, classes)
      except ValueError as e:
        raise ValueError(f'{name}.{e}') from None
    return dataclasses.replace(self, **fitted)


def make_objective(config: LossConfig, teacher: Any = None) -> Objective:
  """The objective of a config that `fitted` has completed; `teacher` is the model of a distillation."""
  balance = BALANCES[config.balance](config.alpha)
  return Objective(tuple((name, getattr(config, name)) for name in config.terms), balance, teacher)
