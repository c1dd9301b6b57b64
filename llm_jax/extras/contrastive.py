"""Contrastive loss: embeddings of whole texts, learned from pairs that belong together.

Dims: B batch, D embed, E embedding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Batch
from llm_jax.base.ranges import at_least, positive
from llm_jax.base.registry import register
from llm_jax.extras.labels import Pooling, pool, real_rows
from llm_jax.losses.config import LOSSES
from llm_jax.losses.readout import Readout, rank
from llm_jax.losses.term import Sums, Term, TermInputs, affine


@dataclasses.dataclass(frozen=True)
class Contrastive(Term):
  """InfoNCE (arXiv 1807.03748) in both directions: predicts a text's partner among all texts of the global batch.

  The mean of -log softmax_j(cos(a_i, b_j) / temperature) at j = i and the same from b to a.
  """

  pooling: Pooling = 'mean'  # how the hidden states of a text become one vector
  embedding_dim: int = at_least(1, 128)  # width of the embedding
  temperature: float = positive(0.05)  # by which cosines are divided; lower is sharper
  reads: ClassVar[frozenset[str]] = frozenset({'encoder_tokens', 'encoder_segment_ids', 'segment_ids'})
  tasks: ClassVar[tuple[str, ...]] = ('pairs',)
  row_wise: ClassVar[bool] = False
  fixed: ClassVar[tuple[str, ...]] = ('embedding_dim',)
  results: ClassVar[tuple[str, ...]] = ('loss', 'accuracy', 'top5_accuracy', 'mrr', 'documents')

  def check(self, loss: Any) -> None:
    if loss.balance == 'grad_norm':
      raise ValueError('balance grad_norm does not support contrastive, which reads two texts per row; set balance to '
                       'fixed or uncertainty')

  def problems(self, config: Any) -> list[str]:
    lone = [f'batch_tokens {config.batch_tokens} is one row of data.seq_len {config.data.seq_len}, but loss.terms '
            f'contrastive compares rows; set {2 * config.data.seq_len} or more'] if config.rows_per_batch < 2 else []
    return super().problems(config) + lone

  @property
  def head_dim(self) -> int:
    return self.embedding_dim

  def other(self, batch: Batch) -> Batch | None:
    if batch.encoder_tokens is None:  # predictions for single texts
      return None
    return dataclasses.replace(batch, tokens=batch.encoder_tokens, segment_ids=batch.encoder_segment_ids,
                               positions=None)

  def count(self, batch: Batch) -> jax.Array:
    return jnp.sum(real_rows(batch))

  def embed(self, readout: Readout, segment_ids: jax.Array | None, inputs: TermInputs) -> jax.Array:
    """Embeddings [B, E] of norm 1."""
    assert segment_ids is not None
    e_BE = affine(inputs, pool(readout.x_BTD, segment_ids, self.pooling))
    return e_BE * jax.lax.rsqrt(jnp.sum(e_BE**2, axis=-1, keepdims=True) + 1e-12)

  def similarities(self, inputs: TermInputs) -> jax.Array:
    """Cosine / temperature of each first text (rows) and second text, [B, B]; -1e9 for padding rows."""
    assert inputs.other is not None
    a_BE = self.embed(inputs.readout, inputs.batch.segment_ids, inputs)
    b_CE = self.embed(inputs.other, inputs.batch.encoder_segment_ids, inputs)
    real_B = real_rows(inputs.batch) > 0
    sims_BC = jnp.einsum('BE,CE->BC', a_BE, b_CE) / self.temperature
    return jnp.where(real_B[:, None] & real_B[None, :], sims_BC, -1e9)

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    sims_BC, weights_B = self.similarities(inputs), real_rows(inputs.batch) / count
    partners_B = jnp.arange(sims_BC.shape[0])
    nll_B = sum(optax.softmax_cross_entropy_with_integer_labels(s, partners_B) for s in (sims_BC, sims_BC.T)) / 2
    loss = jnp.sum(nll_B * weights_B)
    return loss, loss

  def predict(self, inputs: TermInputs) -> jax.Array:
    """Embeddings [B, E]."""
    return self.embed(inputs.readout, inputs.batch.segment_ids, inputs)

  def initial_loss(self, inputs: TermInputs) -> float:
    return math.log(max(2, inputs.batch.tokens.shape[0]))

  def score(self, inputs: TermInputs, token_bytes: jax.Array) -> Sums:
    del token_bytes
    sims_BC, real_B = self.similarities(inputs), real_rows(inputs.batch)
    rank_B = rank(sims_BC, jnp.arange(sims_BC.shape[0]))
    return {'nll': self.loss(inputs, jnp.ones(()))[0], 'count': jnp.sum(real_B),
            'correct': jnp.sum((rank_B < 1) * real_B), 'top5': jnp.sum((rank_B < 5) * real_B),
            'reciprocals': jnp.sum(real_B / (rank_B + 1))}

  def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
    """loss; accuracy, top5_accuracy and mrr of retrieving a first text's partner in its batch; documents."""
    n = sums['count']
    return {'loss': sums['nll'] / n, 'accuracy': sums['correct'] / n, 'top5_accuracy': sums['top5'] / n,
            'mrr': sums['reciprocals'] / n, 'documents': n}


register(LOSSES, 'contrastive', Contrastive)
