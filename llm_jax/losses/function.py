"""Losses that are plain functions of logits and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llm_jax.base.batch import Batch
from llm_jax.base.registry import settings_from_signature
from llm_jax.losses.term import Sums, Term, TermInputs

LossFunction = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class FunctionTerm(Term):
  """The weighted mean of function(logits [B, T, V], batch, **settings) -> (losses [B, T], weights [B, T]).

  Weights may depend on the batch only. Other shapes are allowed if losses and weights have the same.
  """

  function: ClassVar[LossFunction]
  results: ClassVar[tuple[str, ...]] = ('loss', 'count')

  @property
  def writes(self) -> bool:
    return True

  def evaluate(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'weight'}
    return type(self).function(logits, batch, **settings)

  def count(self, batch: Batch) -> jax.Array:
    # Only the weights are used, so XLA drops the loss of these logits.
    return jnp.sum(self.evaluate(jnp.zeros((*batch.tokens.shape, 1)), batch)[1])

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses, weights = self.evaluate(inputs.readout.logits(), inputs.batch)
    loss = jnp.sum(losses * weights) / count
    return loss, loss

  def initial_loss(self, inputs: TermInputs) -> float:
    return 1.0

  def score(self, inputs: TermInputs, token_bytes: jax.Array) -> Sums:
    losses, weights = self.evaluate(inputs.readout.logits(), inputs.batch)
    return {'loss': jnp.sum(losses * weights), 'count': jnp.sum(weights)}

  def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
    """loss: the mean over all weights; count: their sum."""
    return {'loss': sums['loss'] / max(sums['count'], 1e-30), 'count': sums['count']}


def adapt_loss(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """A Term unchanged; a function as a FunctionTerm whose fields are the parameters with plain defaults."""
  if isinstance(value, type) and issubclass(value, Term):
    return value, value
  own = settings or settings_from_signature(value)
  term: type = dataclasses.dataclass(frozen=True)(
      type(own.__name__, (own, FunctionTerm), {'function': staticmethod(value), '__module__': own.__module__}))
  return term, term
