"""Optimizer and schedule from config: one Optax chain, in the order that the config states.

Add a link with a function and a line in TRANSFORMS, a schedule with a function and a line in SCHEDULES. Both are
given their own section of the config, a frozen dataclass, whose fields keep Optax's names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import optax

from llm_jax.optim.masks import matrices


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm:
  """Scales gradients down to this norm (arXiv 1211.5063)."""

  max_norm: float = 1.0

  def __post_init__(self):
    if self.max_norm <= 0:
      raise ValueError(f'max_norm must be positive; got {self.max_norm}')

  def make(self, schedule: optax.Schedule) -> optax.GradientTransformation:
    del schedule
    return optax.clip_by_global_norm(self.max_norm)


@dataclasses.dataclass(frozen=True)
class AdamW:
  """Adam with decoupled weight decay (arXiv 1711.05101), on matrices only: no norms, no biases."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  mu_dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the first moment as it is kept

  def __post_init__(self):
    if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
      raise ValueError(f'b1 and b2 must lie in [0, 1); got {self.b1}, {self.b2}')
    if self.eps <= 0 or self.weight_decay < 0:
      raise ValueError(f'eps must be positive and weight_decay not negative; got {self.eps}, {self.weight_decay}')

  def make(self, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype, weight_decay=self.weight_decay,
                       mask=matrices)


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
  """Linear to the peak, then half a cosine (arXiv 1608.03983) down to `end_factor` of it at the last step."""

  warmup_steps: int = 0
  end_factor: float = 0.1

  def __post_init__(self):
    if self.warmup_steps < 0 or not 0 <= self.end_factor <= 1:
      raise ValueError('warmup_steps must not be negative and end_factor must lie in [0, 1]; '
                       f'got {self.warmup_steps}, {self.end_factor}')

  def make(self, peak_value: float, num_steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=peak_value / (self.warmup_steps + 1), peak_value=peak_value, warmup_steps=self.warmup_steps,
        decay_steps=num_steps, end_value=self.end_factor * peak_value)


@dataclasses.dataclass(frozen=True)
class Constant:
  """Linear to the peak, then constant."""

  warmup_steps: int = 0

  def __post_init__(self):
    if self.warmup_steps < 0:
      raise ValueError(f'warmup_steps must not be negative; got {self.warmup_steps}')

  def make(self, peak_value: float, num_steps: int) -> optax.Schedule:
    del num_steps
    return optax.schedules.warmup_constant_schedule(peak_value / (self.warmup_steps + 1), peak_value, self.warmup_steps)


TRANSFORMS: dict[str, type] = {
    'clip_by_global_norm': ClipByGlobalNorm,
    'adamw': AdamW,
}
FILTERS = {'clip_by_global_norm'}  # links that hand gradients on, without a learning rate
SCHEDULES: dict[str, Callable[..., Any]] = {
    'warmup_cosine': WarmupCosine,
    'constant': Constant,
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The chain's links in order, the settings of each, and the learning rate's peak and schedule."""

  learning_rate: float = 6e-4
  schedule: str = 'warmup_cosine'  # one of SCHEDULES
  chain: tuple[str, ...] = ('clip_by_global_norm', 'adamw')  # of TRANSFORMS
  warmup_cosine: WarmupCosine = WarmupCosine()
  constant: Constant = Constant()
  clip_by_global_norm: ClipByGlobalNorm = ClipByGlobalNorm()
  adamw: AdamW = AdamW()

  def __post_init__(self):
    if not 0 < self.learning_rate < float('inf'):
      raise ValueError(f'learning_rate must be positive; got {self.learning_rate}')
    for name in self.chain:
      if name not in TRANSFORMS:
        raise ValueError(f'chain names {name!r}, which is unknown; known: {", ".join(TRANSFORMS)}')
    if all(name in FILTERS for name in self.chain):
      raise ValueError(f'chain {self.chain} only filters gradients; add an optimizer: '
                       f'{", ".join(name for name in TRANSFORMS if name not in FILTERS)}')
    if self.schedule not in SCHEDULES:
      raise ValueError(f'schedule {self.schedule!r} is unknown; known: {", ".join(SCHEDULES)}')
    for name in (TRANSFORMS | SCHEDULES).keys() - {*self.chain, self.schedule}:
      if getattr(self, name) != (TRANSFORMS | SCHEDULES)[name]():
        raise ValueError(f'{name} is set, but neither chain nor schedule names it: it would have no effect')


def make_optimizer(config: OptimConfig, num_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The chain as one gradient transformation, and the schedule that it follows (for the log)."""
  schedule = getattr(config, config.schedule).make(config.learning_rate, num_steps)
  return optax.chain(*(getattr(config, name).make(schedule) for name in config.chain)), schedule
