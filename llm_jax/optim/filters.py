"""Links that change gradients before the optimizer: clipping and L2 decay."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.optim.link import Link, positive, regular
from llm_jax.optim.masks import matching


@dataclasses.dataclass(frozen=True)
class ClipByGlobalNorm(Link):
  """Scales gradients down to this norm (arXiv 1211.5063)."""

  max_norm: float = 1.0
  place = 'filter'

  def __post_init__(self) -> None:
    positive(max_norm=self.max_norm)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    # Optax's own divides each element, and XLA then writes the clipped gradients to memory: a factor it fuses.
    def clip(grads: Params, params: Params) -> Params:
      factor = jnp.minimum(1, self.max_norm / optax.tree.norm(grads))
      return jax.tree.map(lambda g: (factor * g).astype(g.dtype), grads)

    return optax.stateless(clip)


@dataclasses.dataclass(frozen=True)
class L2(Link):
  """Decay as part of the gradient, weight_decay * p, which the optimizer then scales like the rest of it.

  With Adam that pulls hardest where gradients are small (arXiv 1711.05101, section 2): not what adamw does.
  """

  weight_decay: float = 0.01
  pattern: str = '/w$'  # of the paths that it is meant for; '^blocks.*/w$' leaves out tables
  place = 'filter'

  def __post_init__(self) -> None:
    positive(weight_decay=self.weight_decay)
    regular(self.pattern)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.add_decayed_weights(self.weight_decay, lambda params: matching(self.pattern, params))
