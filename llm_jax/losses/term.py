"""A loss term: one section of the config, and the inputs it is computed from."""

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


class TermInputs(NamedTuple):
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
  loss(inputs, count)     (objective, what is logged as its loss): sums over the batch, divided by count
  initial_loss(inputs)      what the loss is before anything is learnt, about
  score(inputs, bytes)    sums for `summarize`, exact however the data is cut into batches
  summarize(sums)       results by name, 'loss' among them

  Of a teacher's opinion there is no score: see Objective.eval_objective.
  """

  weight: float = 1.0  # where several are added up
  reads: ClassVar[frozenset[str]] = frozenset()  # features of a Batch, besides what the model reads
  tasks: ClassVar[tuple[str, ...]] = ()  # that it can learn from; (): all
  row_wise: ClassVar[bool] = True  # whether rows know nothing of each other, so that microbatches change nothing
  head_dim: ClassVar[Any] = 0  # outputs of its head; 0: it has none

  def __post_init__(self) -> None:
    if self.weight <= 0:
      raise ValueError(f'weight must be positive (a loss of none is left out of terms); got {self.weight}')

  def problems(self, config: Any) -> list[str]:
    """Fields of the whole config that do not fit this term; each a line for the user."""
    name = next(name for name in config.loss.terms if config.loss.sections[name] is self)
    if not self.tasks or config.data.task in self.tasks:
      return []
    return [f'loss.terms {name} learns from data.task {" or ".join(self.tasks)}; got {config.data.task}']

  def other(self, batch: Batch) -> Batch | None:
    """A second batch that the model is to read for this term."""
    del batch
    return None

  def with_labels(self, labels: np.ndarray | None, classes: tuple[str, ...]) -> Any:
    """The term with what the labels [D] or [D, C] of the training part, and their names, decide."""
    del labels, classes
    return self

  def predict(self, inputs: TermInputs) -> jax.Array | None:
    """What it tells of each document [B, ...], where it tells anything; inputs.batch has no labels then."""
    del inputs
    return None


def affine(inputs: TermInputs, x: jax.Array) -> jax.Array:
  """What the term's head makes of hidden states [..., D]: float32 [..., C]."""
  y = mixed_einsum('BD,DC->BC', inputs.dtype, x.reshape(-1, x.shape[-1]), inputs.head['w']) + inputs.head['b'][None]
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
