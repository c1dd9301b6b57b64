"""Next-token prediction."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llm_jax.base.batch import Batch
from llm_jax.base.ranges import rate, within
from llm_jax.losses.readout import cross_entropy, score
from llm_jax.losses.term import Sums, Term, TermInputs


@dataclasses.dataclass(frozen=True)
class NextToken(Term):
  """-log p(target) where loss_mask is 1, with PaLM's z-loss and label smoothing (see cross_entropy)."""

  z_loss: float = within(0, 1000, 0.0)  # weight of log(Z)^2; 0: off
  label_smoothing: float = rate(0.0)  # share of the target probability that is spread over the vocabulary

  results: ClassVar[tuple[str, ...]] = (
      'loss', 'perplexity', 'accuracy', 'top5_accuracy', 'tokens', 'bits_per_byte')

  @property
  def writes(self) -> bool:
    return True

  def problems(self, config: Any) -> list[str]:
    padded = getattr(config.model, 'vocab_multiple', 1) > 1 and self.label_smoothing
    return super().problems(config) + ([
        'loss.next_token.label_smoothing would spread probability over the padding of model.vocab_multiple '
        f'{config.model.vocab_multiple}: set one of them to its default'] if padded else [])

  def count(self, batch: Batch) -> jax.Array:
    return jnp.sum(batch.loss_mask)

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The weights are divided here, so that the gradient that cross_entropy saves already has its final scale.
    return cross_entropy(inputs.readout, inputs.batch.targets, inputs.batch.loss_mask / count, self.z_loss,
                         self.label_smoothing)

  def initial_loss(self, inputs: TermInputs) -> float:
    return math.log(inputs.readout.num_logits)

  def score(self, inputs: TermInputs, token_bytes: jax.Array) -> Sums:
    batch = inputs.batch
    nll_BT, rank_BT = score(inputs.readout, batch.targets)
    return {'nll': jnp.sum(nll_BT * batch.loss_mask), 'count': jnp.sum(batch.loss_mask),
            'bytes': jnp.sum(token_bytes[batch.targets] * batch.loss_mask),
            'correct': jnp.sum((rank_BT < 1) * batch.loss_mask), 'top5': jnp.sum((rank_BT < 5) * batch.loss_mask)}

  def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
    """loss (nats per token), perplexity, accuracy, top5_accuracy, bits_per_byte (if tokens have bytes), tokens."""
    loss = sums['nll'] / sums['count']
    results = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)), 'accuracy': sums['correct'] / sums['count'],
               'top5_accuracy': sums['top5'] / sums['count'], 'tokens': sums['count']}
    if sums['bytes']:
      results['bits_per_byte'] = sums['nll'] / math.log(2) / sums['bytes']
    return results
