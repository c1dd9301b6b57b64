"""What a loss is: a Term, one section of the config; and what it may look at."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.batch import Batch
from llm_jax.layers.linear import mixed_einsum
from llm_jax.losses.readout import Readout

Sums = dict[str, jax.Array]  # arrays that add up over batches


class Look(NamedTuple):
  """What a term sees of a batch."""

  batch: Batch
  readout: Readout  # the model's of batch.tokens
  head: dict[str, jax.Array]  # the term's own w [D, head_dim] and b; {} if it asked for none
  other: Readout | None  # the model's of the term's `other` batch
  teacher: Readout | None
  dtype: Any  # of matrix operands


@dataclasses.dataclass(frozen=True)
class Term:
  """One loss of a run. A new one is a subclass and a line in LOSSES.

  count(batch)          what its sums are divided by
  loss(look, count)     (objective, what is logged as its loss): sums over the batch, divided by count
  first_loss(look)      what the loss is before anything is learnt, about
  score(look, bytes)    sums for `summarize`, exact however the data is cut into batches
  summarize(sums)       results by name, 'loss' among them

  Of a teacher's opinion there is no score: see Objective.judge.
  """

  weight: float = 1.0  # where several are added up
  reads: ClassVar[frozenset[str]] = frozenset()  # features of a Batch, besides what the model reads
  tasks: ClassVar[tuple[str, ...]] = ()  # that it can learn from; (): all
  row_wise: ClassVar[bool] = True  # whether rows know nothing of each other, so that microbatches change nothing
  head_dim: ClassVar[Any] = 0  # outputs of its head; 0: it has none

  def __post_init__(self):
    if self.weight <= 0:
      raise ValueError(f'weight must be positive (a loss of none is left out of terms); got {self.weight}')

  def other(self, batch: Batch) -> Batch | None:
    """A second batch that the model is to read for this term."""
    del batch
    return None

  def fitted(self, labels: np.ndarray | None, classes: tuple[str, ...]) -> Any:
    """The term with what the labels [D] or [D, C] of the training part, and their names, decide."""
    del labels, classes
    return self

  def predict(self, look: Look) -> jax.Array | None:
    """What it tells of each document [B, ...], where it tells anything; look.batch has no labels then."""
    del look
    return None


def affine(look: Look, x: jax.Array) -> jax.Array:
  """What the term's head makes of hidden states [..., D]: float32 [..., C]."""
  y = mixed_einsum('BD,DC->BC', look.dtype, x.reshape(-1, x.shape[-1]), look.head['w']) + look.head['b'][None]
  return y.reshape(*x.shape[:-1], -1)


def pool(x_BTD: jax.Array, segment_ids_BT: jax.Array, how: str) -> jax.Array:
  """[B, D] of each row: of its `last` real token, or the `mean` over all of them."""
  real_BT = segment_ids_BT > 0
  num_real_B = jnp.sum(real_BT, axis=1)
  if how == 'last':
    return jnp.take_along_axis(x_BTD, jnp.maximum(num_real_B - 1, 0)[:, None, None], axis=1)[:, 0]
  return jnp.einsum('BTD,BT->BD', x_BTD, real_BT / jnp.maximum(num_real_B, 1)[:, None])


def real_rows(batch: Batch) -> jax.Array:
  """float32 [B]: 0 for the rows that fill up a last batch."""
  assert batch.segment_ids is not None, 'tasks for whole documents give them'
  return jnp.any(batch.segment_ids > 0, axis=1).astype(jnp.float32)
