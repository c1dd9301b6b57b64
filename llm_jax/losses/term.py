"""Term, the base class of losses, and the inputs that a loss is computed from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.batch import Batch
from llm_jax.layers.product import mixed_einsum
from llm_jax.losses.readout import Readout

Sums = dict[str, jax.Array]  # arrays that add up over batches


class TermInputs(NamedTuple):
  """The inputs of a term for one batch."""

  batch: Batch
  readout: Readout  # of the model on batch.tokens
  head: dict[str, jax.Array]  # the term's own w [D, head_dim] and b; {} if head_dim is 0
  other: Readout | None  # of the model on the term's `other` batch
  teacher: Readout | None
  dtype: Any  # of matrix operands


@dataclasses.dataclass(frozen=True)
class Term:
  """A loss, and its config section. To add one, write a subclass and register it in LOSSES.

  count(batch)          the number that its sums are divided by
  loss(inputs, count)   (objective, logged loss): sums over the batch, divided by count
  initial_loss(inputs)  the approximate loss before training
  score(inputs, bytes)  sums for `summarize`, which do not depend on how the data is split into batches
  summarize(sums)       results by name, including 'loss'

  Distillation has no score: see Objective.eval_objective.
  """

  weight: float = 1.0  # in the sum of several terms
  reads: ClassVar[frozenset[str]] = frozenset()  # features of a Batch, besides what the model reads
  tasks: ClassVar[tuple[str, ...]] = ()  # tasks that it can train on; (): all
  row_wise: ClassVar[bool] = True  # whether rows are independent, so that microbatches give the same result
  head_dim: ClassVar[Any] = 0  # outputs of its head; 0: no head

  def __post_init__(self) -> None:
    if self.weight <= 0:
      raise ValueError(f'weight must be positive (to disable a loss, remove it from terms); got {self.weight}')

  @property
  def writes(self) -> bool:
    """Whether a model that learns it can continue a text."""
    return False

  def problems(self, config: Any) -> list[str]:
    """Messages about fields of the whole config that do not fit this term."""
    name = next(name for name in config.loss.terms if config.loss.sections[name] is self)
    if not self.tasks or config.data.task in self.tasks:
      return []
    return [f'loss.terms {name} needs data.task {" or ".join(self.tasks)}; got {config.data.task}']

  def other(self, batch: Batch) -> Batch | None:
    """A second batch for the model to read for this term, or None."""
    del batch
    return None

  def with_labels(self, labels: np.ndarray | None, classes: tuple[str, ...]) -> Any:
    """The term with fields filled in from the training part's labels [D] or [D, C] and class names."""
    del labels, classes
    return self

  def relabel(self, data: Any) -> Any:
    """Other data to evaluate on, with labels in the numbering of `with_labels`. Raises DataError."""
    return data

  def report(self, confusion: np.ndarray, folder: Path) -> dict[str, Any]:
    """JSON values of the sums `confusion` of an evaluation; may write figures to the folder. Raises StorageError."""
    del folder
    return {'confusion': confusion.tolist()}

  def check_labels(self, split: str, labels: np.ndarray) -> None:
    """Raises DataError for labels of the part `split` that it cannot use."""

  def predict(self, inputs: TermInputs) -> jax.Array | None:
    """Predictions for each document [B, ...], or None if it makes none; inputs.batch has no labels here."""
    del inputs
    return None

  def describe(self, prediction: np.ndarray, top: int) -> Any:
    """The prediction for one document as a JSON value; of classes, the `top` most likely."""
    del top
    return prediction.tolist()


def affine(inputs: TermInputs, x: jax.Array) -> jax.Array:
  """The output of the term's head for hidden states [..., D]: float32 [..., C]."""
  y = mixed_einsum('BD,DC->BC', inputs.dtype, x.reshape(-1, x.shape[-1]), inputs.head['w']) + inputs.head['b'][None]
  return y.reshape(*x.shape[:-1], -1)


def pool(x_BTD: jax.Array, segment_ids_BT: jax.Array, how: str) -> jax.Array:
  """The hidden state [B, D] of each row's `last` real token, or the `mean` over its real tokens."""
  real_BT = segment_ids_BT > 0
  num_real_B = jnp.sum(real_BT, axis=1)
  if how == 'last':
    return jnp.take_along_axis(x_BTD, jnp.maximum(num_real_B - 1, 0)[:, None, None], axis=1)[:, 0]
  return jnp.einsum('BTD,BT->BD', x_BTD, real_BT / jnp.maximum(num_real_B, 1)[:, None])


def real_rows(batch: Batch) -> jax.Array:
  """float32 [B]: 1 for real rows, 0 for rows that pad the last batch."""
  assert batch.segment_ids is not None, 'tasks on whole documents provide them'
  return jnp.any(batch.segment_ids > 0, axis=1).astype(jnp.float32)
