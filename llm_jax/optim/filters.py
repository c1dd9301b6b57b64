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
  """Scales gradients down to at most this norm (arXiv 1211.5063)."""

  max_norm: float = 1.0
  place = 'filter'

  def __post_init__(self) -> None:
    positive(max_norm=self.max_norm)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    # Optax's own divides each element, and XLA writes the clipped gradients to memory; a factor is fused instead.
    def clip(grads: Params, params: Params) -> Params:
      factor = jnp.minimum(1, self.max_norm / optax.tree.norm(grads))
      return jax.tree.map(lambda g: (factor * g).astype(g.dtype), grads)

    return optax.stateless(clip)


@dataclasses.dataclass(frozen=True)
class L2(Link):
  """L2 regularization: adds weight_decay * p to the gradient, before the optimizer scales it.

  With Adam, unlike adamw, the decay is strongest where gradients are small (arXiv 1711.05101, section 2).
  """

  weight_decay: float = 0.01
  pattern: str = '/w$'  # regular expression for the paths of decayed parameters; '^blocks.*/w$' excludes tables
  place = 'filter'

  def __post_init__(self) -> None:
    positive(weight_decay=self.weight_decay)
    regular(self.pattern)

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return optax.add_decayed_weights(self.weight_decay, lambda params: matching(self.pattern, params))
