"""Term, the base class of losses, and the inputs that a loss is computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.base.batch import Batch, Params
from llm_jax.base.ranges import Ranged
from llm_jax.layers.product import mixed_einsum
from llm_jax.losses.readout import Readout

Sums = dict[str, jax.Array]  # arrays that add up over batches


class TermInputs(NamedTuple):
  """The inputs of a term for one batch."""

  batch: Batch
  readout: Readout  # of the model on batch.tokens
  head: dict[str, jax.Array]  # the term's own w [D, head_dim] and b; {} if head_dim is 0
  other: Readout | None  # of the model on the term's `other` batch
  constant: Any  # the result of the function of the term's Constants; None without
  dtype: Any  # of matrix operands


class Constants(NamedTuple):
  """Frozen arrays that a term computes with, such as the weights of a teacher."""

  arrays: Params  # arguments of the compiled step
  function: Callable[[Params, Batch], Any]  # (arrays, batch) -> TermInputs.constant, computed once per microbatch
  flops_per_token: float  # of the function
  term: Term  # with fields filled in from them


@dataclasses.dataclass(frozen=True)
class Term(Ranged):
  """A loss, and its config section. To add one, write a subclass and register it in LOSSES.

  count(batch)          the number that its sums are divided by
  loss(inputs, count)   (objective, logged loss): sums over the batch, divided by count
  initial_loss(inputs)  the approximate loss before training
  score(inputs, bytes)  sums for `summarize`, which do not depend on how the data is split into batches
  summarize(sums)       results by name, including 'loss'
  """

  weight: float = 1.0  # in the sum of several terms
  reads: ClassVar[frozenset[str]] = frozenset()  # features of a Batch, besides what the model reads
  tasks: ClassVar[tuple[str, ...]] = ()  # tasks that it can train on; (): all
  row_wise: ClassVar[bool] = True  # whether rows are independent, so that microbatches give the same result
  head_dim: ClassVar[Any] = 0  # outputs of its head; 0: no head
  evaluated: ClassVar[bool] = True  # whether it has `score` and `summarize`; without, evaluations leave it out
  fixed: ClassVar[tuple[str, ...]] = ()  # fields that cannot change when a run is resumed
  results: ClassVar[tuple[str, ...] | None] = None  # names that `summarize` may return; None: known after a first run

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    if 'summarize' in vars(cls) and 'results' not in vars(cls):
      cls.results = None  # those of the parent are not those of another `summarize`

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.weight <= 0:
      raise ValueError(f'weight must be positive (to disable a loss, remove it from terms); got {self.weight}')

  @property
  def writes(self) -> bool:
    """Whether a model that learns it can continue a text."""
    return False

  def check(self, loss: Any) -> None:
    """Raises ValueError if other settings of the LossConfig do not fit this term."""
    del loss

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

  def report(self, confusion: np.ndarray) -> dict[str, Any]:
    """JSON values of the sums `confusion` of an evaluation."""
    return {'confusion': confusion.tolist()}

  def draw(self, confusion: np.ndarray, folder: Path) -> None:
    """Writes figures of the sums `confusion` of an evaluation to the folder. Raises StorageError."""
    del confusion, folder

  def check_labels(self, split: str, labels: np.ndarray) -> None:
    """Raises DataError for labels of a part of the data that the term, filled in by `with_labels`, does not support."""
    del split, labels

  def constants(self, config: Any, data: Any, mesh: Mesh) -> Constants | None:
    """Loads its frozen arrays for a Config and its Data. Raises UserErrors."""
    del config, data, mesh
    return None

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
