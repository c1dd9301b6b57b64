"""Losses for labels of whole documents, predicted from pooled hidden states.

Dims: B batch, D embed, C classes, or numbers per document.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.base.batch import Batch
from llm_jax.base.errors import DataError
from llm_jax.base.ranges import at_least, rate
from llm_jax.base.registry import register
from llm_jax.data.stores.store import TokenStore
from llm_jax.losses.config import LOSSES
from llm_jax.losses.readout import rank
from llm_jax.losses.term import Sums, Term, TermInputs, affine

Pooling = Literal['last', 'mean']


@dataclasses.dataclass(frozen=True)
class Classification(Term):
  """Cross-entropy of a document's class.

  (1 - p)^focal_gamma * ((1 - label_smoothing) * -log p + label_smoothing * mean_C(-log p)) + z_loss * log(Z)^2, with p
  the probability of the true class. Focal loss (arXiv 1708.02002, with a softmax) emphasizes misclassified documents.
  """

  pooling: Pooling = 'last'  # of hidden states; with causal attention only the last token has read the whole document
  num_classes: int | None = at_least(2, None)  # None: from the training part
  classes: tuple[str, ...] | None = None  # their names; None: those of the training part, if they have any
  focal_gamma: float = at_least(0, 0.0)  # 0: no focal loss
  label_smoothing: float = rate(0.0)  # share of the target probability that is spread over all classes, in [0, 1)
  z_loss: float = at_least(0, 0.0)  # weight of log(Z)^2; 0: off
  reads: ClassVar[frozenset[str]] = frozenset({'labels', 'segment_ids'})
  tasks: ClassVar[tuple[str, ...]] = ('classification',)
  fixed: ClassVar[tuple[str, ...]] = ('num_classes', 'classes')
  results: ClassVar[tuple[str, ...]] = (
      'loss', 'accuracy', 'top5_accuracy', 'macro_precision', 'macro_recall', 'macro_f1', 'documents')

  @property
  def head_dim(self) -> int:
    return self.num_classes or 0

  def with_labels(self, labels: np.ndarray | None, classes: tuple[str, ...]) -> Classification:
    if self.classes and classes and self.classes != classes:
      raise ValueError(f'classes: {self.classes} differ from those of the data, {classes}; leave them out')
    needed = max(len(classes), 0 if labels is None else int(labels.max()) + 1)
    if self.num_classes is not None and self.num_classes < needed:
      raise ValueError(f'num_classes: {self.num_classes} is less than the {needed} classes of the data; leave it None '
                       f'or set it to {needed} or more')
    return dataclasses.replace(self, num_classes=self.num_classes or max(2, needed), classes=classes or self.classes)

  def relabel(self, data: Any) -> Any:
    return dataclasses.replace(data, splits={
        split: {name: self._relabel(store) for name, store in stores.items()} for split, stores in data.splits.items()})

  def _relabel(self, store: TokenStore) -> TokenStore:
    if not self.classes or store.labels is None or not store.classes:  # labels are numbers already
      return store
    if unknown := set(store.classes) - set(self.classes):
      raise DataError(f'--data: labels {", ".join(sorted(unknown))} are not classes of the run; known: '
                      f'{", ".join(self.classes)}')
    numbers = np.array([self.classes.index(name) for name in store.classes], np.float64)
    return dataclasses.replace(store, labels=numbers[np.asarray(store.labels).astype(int)], classes=self.classes)

  def report(self, confusion: np.ndarray) -> dict[str, Any]:
    return {'confusion': confusion.astype(int).tolist(), 'classes': self._names(confusion)}

  def draw(self, confusion: np.ndarray, folder: Path) -> None:
    draw_confusion(confusion, self._names(confusion), folder / 'confusion.png')

  def _names(self, confusion: np.ndarray) -> tuple[str, ...]:
    return self.classes or tuple(map(str, range(len(confusion))))

  def check_labels(self, split: str, labels: np.ndarray) -> None:
    most = int(np.max(labels, initial=0))
    if most >= self.head_dim:
      raise DataError(f'config.data.label_field: the {split} part has class {most}, but the model learns classes 0 to '
                      f'{self.head_dim - 1}; set config.loss.classification.num_classes to {most + 1} or more')

  def count(self, batch: Batch) -> jax.Array:
    return jnp.sum(real_rows(batch))

  def logits(self, inputs: TermInputs) -> jax.Array:
    return _outputs(self.pooling, inputs)

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_BC, labels_B = self.logits(inputs), inputs.batch.labels
    weights_B = real_rows(inputs.batch) / count
    hits_BC = jax.nn.one_hot(labels_B, logits_BC.shape[1])
    nll_B = optax.softmax_cross_entropy(logits_BC, hits_BC)
    objective_B = optax.softmax_cross_entropy(logits_BC, optax.smooth_labels(hits_BC, self.label_smoothing))
    if self.focal_gamma:
      # 1 - p by expm1, clipped away from 0, where the power has an infinite slope for gamma below 1.
      objective_B *= jnp.maximum(-jnp.expm1(-nll_B), 1e-6) ** self.focal_gamma
    objective_B += self.z_loss * jax.nn.logsumexp(logits_BC, axis=-1) ** 2
    return jnp.sum(objective_B * weights_B), jnp.sum(nll_B * weights_B)

  def predict(self, inputs: TermInputs) -> jax.Array:
    """Probabilities [B, C]."""
    return jax.nn.softmax(self.logits(inputs))

  def describe(self, prediction: np.ndarray, top: int) -> dict[str, float]:
    best = np.argsort(-prediction)[:top].tolist()
    return {self.classes[i] if self.classes else str(i): round(float(prediction[i]), 4) for i in best}

  def initial_loss(self, inputs: TermInputs) -> float:
    return math.log(self.head_dim)

  def score(self, inputs: TermInputs, token_bytes: jax.Array) -> Sums:
    del token_bytes
    logits_BC, labels_B, real_B = self.logits(inputs), inputs.batch.labels, real_rows(inputs.batch)
    assert labels_B is not None
    rank_B, C = rank(logits_BC, labels_B), self.head_dim
    confusion = jnp.zeros((C, C)).at[labels_B, jnp.argmax(logits_BC, axis=-1)].add(real_B)
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
    return {'nll': jnp.sum(nll_B * real_B), 'count': jnp.sum(real_B), 'top5': jnp.sum((rank_B < 5) * real_B),
            'confusion': confusion}

  def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
    """loss (nats per document), accuracy, top5_accuracy, macro_precision, macro_recall, macro_f1, documents."""
    confusion = sums['confusion']
    return {'loss': sums['nll'] / sums['count'], 'accuracy': float(np.trace(confusion)) / sums['count'],
            'top5_accuracy': sums['top5'] / sums['count'], **macro_means(confusion), 'documents': sums['count']}


def macro_means(confusion: np.ndarray) -> dict[str, float]:
  """Means over classes of TP / (TP + FP), TP / (TP + FN), 2 TP / (2 TP + FP + FN), from confusion[true, predicted].

  Classes that neither occur nor are predicted do not count. Where one is undefined, it is 0, as in scikit-learn.
  """
  hits, predicted, true = np.diag(confusion), confusion.sum(0), confusion.sum(1)
  seen = predicted + true > 0

  def mean(numerators: np.ndarray, denominators: np.ndarray) -> float:
    return float(np.mean((numerators / np.maximum(denominators, 1))[seen])) if seen.any() else 0.0

  return {'macro_precision': mean(hits, predicted), 'macro_recall': mean(hits, true),
          'macro_f1': mean(2 * hits, predicted + true)}


def draw_confusion(counts: np.ndarray, classes: tuple[str, ...], out: Path) -> None:
  """Draws the confusion matrix: true classes in rows, normalized per row. Does nothing without matplotlib."""
  if importlib.util.find_spec('matplotlib') is None:
    return
  from llm_jax.extras.figures import load_pyplot, write_picture
  few = len(classes) <= 40
  size = 3 + 0.3 * len(classes) if few else 15
  figure, axis = load_pyplot('confusion.png').subplots(figsize=(size, size), layout='constrained')
  axis.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap='Blues', vmin=0, vmax=1)
  if few:
    for (row, column), count in np.ndenumerate(counts):
      if count:
        axis.text(column, row, f'{count:.0f}', ha='center', va='center', fontsize=6)
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), classes)
  axis.set(xlabel='predicted class', ylabel='true class')
  write_picture(out, figure)


@dataclasses.dataclass(frozen=True)
class Regression(Term):
  """Half the squared error, or Huber's loss, of a document's numbers, in standard deviations of the training part."""

  pooling: Pooling = 'last'  # how the hidden states of a text become one vector
  # Standard deviations beyond which the loss is linear (Huber 1964); 0: squared everywhere.
  huber_delta: float = at_least(0, 0.0)
  mean: tuple[float, ...] | None = None  # of each number; mean and std None: from the training part
  std: tuple[float, ...] | None = None  # standard deviation of each number
  reads: ClassVar[frozenset[str]] = frozenset({'labels', 'segment_ids'})
  tasks: ClassVar[tuple[str, ...]] = ('regression',)
  results: ClassVar[tuple[str, ...]] = ('loss', 'mae', 'rmse', 'r2', 'documents')

  def __post_init__(self):
    super().__post_init__()
    if (self.mean is None) != (self.std is None) or (self.std and (len(self.std) != len(self.mean or ())
                                                                   or min(self.std) <= 0)):
      raise ValueError('mean and std must be set together, with equal lengths and std positive; got '
                       f'{self.mean} and {self.std}')

  @property
  def head_dim(self) -> int:
    return len(self.mean or ())

  def with_labels(self, labels: np.ndarray | None, classes: tuple[str, ...]) -> Regression:
    del classes
    if self.mean is not None or labels is None:
      return self
    labels_DC = labels.reshape(len(labels), -1)
    std = labels_DC.std(0)
    return dataclasses.replace(self, mean=tuple(labels_DC.mean(0).tolist()),
                               std=tuple(np.where(std > 0, std, 1.0).tolist()))

  def count(self, batch: Batch) -> jax.Array:
    return jnp.sum(real_rows(batch)) * self.head_dim

  def predict(self, inputs: TermInputs) -> jax.Array:
    """Predicted numbers [B, C], in the units of the labels."""
    return _outputs(self.pooling, inputs) * jnp.array([self.std]) + jnp.array([self.mean])

  def errors(self, inputs: TermInputs) -> jax.Array:
    """Errors [B, C], in standard deviations."""
    return _outputs(self.pooling, inputs) - (self._labels(inputs) - jnp.array([self.mean])) / jnp.array([self.std])

  def loss(self, inputs: TermInputs, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    errors_BC = self.errors(inputs)
    loss_BC = optax.huber_loss(errors_BC, delta=self.huber_delta) if self.huber_delta else optax.l2_loss(errors_BC)
    loss = jnp.sum(loss_BC * real_rows(inputs.batch)[:, None] / count)
    return loss, loss

  def initial_loss(self, inputs: TermInputs) -> float:
    return 0.5

  def score(self, inputs: TermInputs, token_bytes: jax.Array) -> Sums:
    del token_bytes
    errors_BC, real_B1 = self.errors(inputs) * jnp.array([self.std]), real_rows(inputs.batch)[:, None]
    # Relative to the mean, so that squares of large labels do not cancel their differences.
    labels_BC = (self._labels(inputs) - jnp.array([self.mean])) * real_B1
    return {'nats': self.loss(inputs, jnp.ones(()))[0], 'count': jnp.sum(real_B1),
            'squares': jnp.sum(errors_BC**2 * real_B1, axis=0), 'absolutes': jnp.sum(jnp.abs(errors_BC) * real_B1, 0),
            'labels': jnp.sum(labels_BC, axis=0), 'label_squares': jnp.sum(labels_BC**2, axis=0)}

  def summarize(self, sums: dict[str, Any]) -> dict[str, float]:
    """loss; mae and rmse in the units of the labels; r2, the explained share of the labels' variance; documents."""
    n, C = sums['count'], self.head_dim
    spread = sums['label_squares'] - sums['labels']**2 / n
    return {'loss': sums['nats'] / n / C, 'mae': float(np.mean(sums['absolutes'])) / n,
            'rmse': math.sqrt(float(np.mean(sums['squares'])) / n),
            'r2': float(np.mean(1 - sums['squares'] / np.maximum(spread, 1e-30))), 'documents': n}

  def _labels(self, inputs: TermInputs) -> jax.Array:
    assert inputs.batch.labels is not None
    return inputs.batch.labels.reshape(inputs.batch.labels.shape[0], -1)


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


def _outputs(pooling: Pooling, inputs: TermInputs) -> jax.Array:
  assert inputs.batch.segment_ids is not None
  return affine(inputs, pool(inputs.readout.x_BTD, inputs.batch.segment_ids, pooling))


register(LOSSES, 'classification', Classification)
register(LOSSES, 'regression', Regression)
