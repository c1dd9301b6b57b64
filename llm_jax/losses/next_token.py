"""Losses on every token: next-token prediction, and distillation from a teacher."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from llm_jax.base.batch import Batch
from llm_jax.losses.readout import Readout, cross_entropy, distillation, score
from llm_jax.losses.term import Sums, Term, TermInputs, affine


@dataclasses.dataclass(frozen=True)
class NextToken(Term):
  """-log p(target) where loss_mask is 1, with PaLM's z-loss and label smoothing (see cross_entropy)."""

  z_loss: float = 0.0
  label_smoothing: float = 0.0  # share of the target probability that is spread over the vocabulary
  reads: ClassVar[frozenset[str]] = frozenset()

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.z_loss < 0:
      raise ValueError(f'z_loss must not be negative; got {self.z_loss}')
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(f'label_smoothing must be in [0, 1); got {self.label_smoothing}')

  @property
  def writes(self) -> bool:
    return True

  def count(self, batch: Batch) -> jax.Array:
    return jnp.sum(batch.loss_mask)

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The weights are divided here, so that the gradient that cross_entropy saves already has its final scale.
    return cross_entropy(inputs.readout, inputs.batch.targets, inputs.batch.loss_mask / count, self.z_loss,
                         self.label_smoothing)

  def initial_loss(self, inputs: TermInputs) -> float:
    return math.log(_num_logits(inputs.readout))

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


@dataclasses.dataclass(frozen=True)
class Distillation(Term):
  """Distillation from a trained run, the teacher: from its logits (arXiv 1503.02531) and its last hidden states.

  Hidden states are compared by mean squared error, after a matrix that is trained with the student (arXiv 1412.6550).
  """

  teacher: str = ''  # the workdir of a run
  checkpoint: str = 'best'  # of the teacher: best, latest or a step
  temperature: float = 2.0
  logits: float = 1.0  # weight of the logits' part
  hidden: float = 0.0  # weight of the hidden states' part
  hidden_dim: int | None = None  # the teacher's width; None: read from its config
  reads: ClassVar[frozenset[str]] = frozenset()

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.temperature <= 0:
      raise ValueError(f'temperature must be positive; got {self.temperature}')
    if min(self.logits, self.hidden) < 0 or not self.logits + self.hidden:
      raise ValueError(f'logits and hidden must not be negative or both 0; got {self.logits} and {self.hidden}')
    if not self.logits and self.temperature != Distillation.temperature:
      raise ValueError(f'temperature {self.temperature} applies to logits, whose weight is 0: it would have no effect')

  @property
  def head_dim(self) -> int:
    return (self.hidden_dim or 0) if self.hidden else 0

  @property
  def writes(self) -> bool:
    return self.logits > 0

  def count(self, batch: Batch) -> jax.Array:
    return jnp.sum(batch.loss_mask)

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    assert inputs.teacher is not None, 'build_program passes the teacher to the objective'
    weights_BT, loss = inputs.batch.loss_mask / count, jnp.zeros(())
    if self.logits:
      loss += self.logits * distillation(inputs.readout, inputs.teacher, weights_BT, self.temperature)
    if self.hidden:
      hidden_BTD = jax.lax.stop_gradient(inputs.teacher.x_BTD)
      squares_BT = jnp.mean((affine(inputs, inputs.readout.x_BTD) - hidden_BTD)**2, axis=-1)
      loss += self.hidden * jnp.sum(squares_BT * weights_BT)
    return loss, loss

  def initial_loss(self, inputs: TermInputs) -> float:
    return self.logits * math.log(_num_logits(inputs.readout)) + self.hidden


def _num_logits(readout: Readout) -> int:
  return jax.eval_shape(readout.project, readout.w, readout.x_BTD).shape[-1]
