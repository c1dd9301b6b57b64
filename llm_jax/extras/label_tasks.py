"""Tasks on labelled documents: classification and regression."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.base.registry import register
from llm_jax.data.rows.rows import Row, Store
from llm_jax.data.rows.tasks import TASKS, Features, Layout, Task, read_whole


@dataclasses.dataclass(frozen=True)
class Regression(Task):
  """The input is a whole document, eos included; `labels` is float32 [], or [C] if each document has C numbers."""

  needs: ClassVar[str] = 'labels'
  overhead: ClassVar[int] = 1
  whole: ClassVar[bool] = True
  dtype: ClassVar[Any] = np.float32
  allowed: ClassVar[str] = 'finite numbers'

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    return read_whole(piece.ids, layout) | {'labels': np.asarray(piece.label, self.dtype)}

  def check(self, layout: Layout, store: Store) -> None:
    labels = np.asarray(store.labels)
    if (wrong := np.argwhere(~self.allows(labels))).size:
      raise DataError(f'config.data.label_field: the label of document {wrong[0][0]} (counted from 0) is '
                      f'{labels[tuple(wrong[0])]}; labels must be {self.allowed}')

  def allows(self, labels: np.ndarray) -> np.ndarray:
    """Which of the labels the task can use."""
    return np.isfinite(labels)


@dataclasses.dataclass(frozen=True)
class Classification(Regression):
  """The input is a whole document, eos included; `labels` is its class, int32 []."""

  dtype: ClassVar[Any] = np.int32
  allowed: ClassVar[str] = 'whole numbers of 0 or more'

  def check(self, layout: Layout, store: Store) -> None:
    labels = np.asarray(store.labels)
    if labels.ndim != 1:
      raise DataError(f'config.data.label_field: task classification needs one class per document, but labels have '
                      f'{labels.shape[1]} numbers each; use task regression')
    super().check(layout, store)

  def allows(self, labels: np.ndarray) -> np.ndarray:
    return np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))


register(TASKS, 'classification', Classification)
register(TASKS, 'regression', Regression)
