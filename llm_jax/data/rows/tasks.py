"""Tasks turn a row of a token store into the features of a Batch: inputs, targets and masks.

A task is a subclass of Task with its settings and a line in TASKS; most are in extras. Features of each row:
tokens, targets, loss_mask, segment_ids (1, 2, ... for the pieces; 0: padding) and positions (restarting in each piece),
all [seq_len], padded with 0 on the right; some tasks add others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.registry import Registry, register, settings_from_signature
from llm_jax.data.rows.rows import PACKINGS, Packed, Row, Store, pack

Features = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The sizes, special ids and settings that tasks need to fill rows."""

  seq_len: int
  encoder_len: int
  vocab_size: int  # without sentinels
  bos_id: int | None
  eos_id: int | None
  packing: str = 'concat'
  truncate: str = 'split'
  mask_documents: bool = True
  encoder: Layout | None = None  # ids of the encoder's own tokenizer; None: the same tokenizer

  @property
  def read(self) -> Layout:
    """The layout with the ids of the encoder's input."""
    return self if self.encoder is None else self.encoder

  @property
  def end(self) -> list[int]:
    """The ids at the end of a document: eos, if there is one."""
    return [] if self.eos_id is None else [self.eos_id]

  @property
  def start_id(self) -> int:
    """The first input token of a decoder."""
    start = self.eos_id if self.bos_id is None else self.bos_id
    assert start is not None, 'make_examples rejects such tasks'
    return start


@dataclasses.dataclass(frozen=True)
class Task:
  """Base class of tasks: properties and methods with their defaults, and `features`."""

  packings: ClassVar[tuple[str, ...]] = ('pad',)  # the packings (rows.py) that it supports
  needs: ClassVar[str] = 'text'  # what the store must hold: 'text', 'answers', 'labels', 'learnt' or 'seconds'
  overhead: ClassVar[int] = 0  # places that a piece takes in a row beyond its targets
  num_sentinels = 0  # sentinels that it uses; the id of sentinel k is vocab_size + k
  random: ClassVar[bool] = False  # whether `features` draws from its rng
  encodes: ClassVar[bool] = False  # whether it makes encoder_tokens
  encoder_overhead: ClassVar[int] = 1  # places in encoder_tokens that are not for the text
  encoder_tokenizer: ClassVar[bool] = False  # whether these are prompts, which may have their own tokenizer
  writes: ClassVar[bool] = True  # whether the trained model can continue a text
  whole: ClassVar[bool] = False  # whether a loss on whole rows needs segment_ids
  chats: ClassVar[bool] = False  # whether documents are conversations; then it has the fields template, special_tokens

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    raise NotImplementedError

  def capacity(self, layout: Layout) -> int | None:
    """The maximum number of targets in a piece; None: any number, and `features` cuts documents to fit."""
    return layout.seq_len - self.overhead

  def packed(self, store: Store, layout: Layout) -> Packed:
    """Rows of whole documents, for packings other than concat."""
    capacity = self.capacity(layout)
    rows = pack(store, layout.packing, layout.truncate, len(store.tokens) + 1 if capacity is None else capacity,
                row_size=layout.seq_len, overhead=self.overhead,
                answers=store.answers if self.needs == 'answers' else None, least=0 if self.needs == 'labels' else 1,
                bos_id=layout.bos_id, eos_id=layout.eos_id)
    return dataclasses.replace(rows, dropped_tokens=rows.dropped_tokens + self.num_cut(rows, layout))

  def num_cut(self, rows: Packed, layout: Layout) -> int:
    """The number of tokens that `features` cuts from all rows."""
    del rows, layout
    return 0

  def check(self, layout: Layout, store: Store) -> None:
    """Raises ConfigError for settings, DataError for data, that do not fit the task."""

  def problems(self, config: Any) -> list[str]:
    """Messages about fields of the whole config that do not fit the task."""
    del config
    return []


@dataclasses.dataclass(frozen=True)
class NextToken(Task):
  """Each token predicts the one after it."""

  packings: ClassVar[tuple[str, ...]] = PACKINGS

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    return lay_out([piece.ids for piece in row], None, layout)


@dataclasses.dataclass(frozen=True)
class PromptAnswer(Task):
  """Inputs are the prompt and its answer; only the answer and the eos after it are learnt."""

  packings: ClassVar[tuple[str, ...]] = ('best_fit', 'pad')
  needs: ClassVar[str] = 'answers'

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    masks = [from_point(piece.answer or 1, len(piece.ids)) for piece in row]
    return lay_out([piece.ids for piece in row], masks, layout)


def adapt_task(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """A Task as it is; a function (row, layout, rng, **settings) -> features as a Task of one document a row."""
  if isinstance(value, type) and issubclass(value, Task):
    return value, value

  def features(self: Any, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    return value(row, layout, rng, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

  own = settings or settings_from_signature(value)
  members = {'features': features, 'random': True}
  task: type = dataclasses.dataclass(frozen=True)(type(own.__name__, (own, Task), members))
  return task, task


# Tasks, or functions (row, layout, rng) -> features.
TASKS = Registry('task', adapt_task)
register(TASKS, 'next_token', NextToken)
register(TASKS, 'prompt_answer', PromptAnswer)


def lay_out(pieces: list[np.ndarray], masks: list[np.ndarray] | None, layout: Layout) -> Features:
  """Features of a row of pieces, int32 [n + 1] each; `masks` [n] select the targets that count, None: all."""
  # Plain slices, because rows are short and each NumPy call has a fixed cost.
  tokens, targets, segment_ids, positions = np.zeros((4, layout.seq_len), np.int32)
  loss_mask = np.zeros(layout.seq_len, np.float32)
  index = np.arange(layout.seq_len, dtype=np.int32)
  begin = 0
  for number, ids in enumerate(pieces):
    end = begin + len(ids) - 1
    tokens[begin:end], targets[begin:end] = ids[:-1], ids[1:]
    loss_mask[begin:end] = 1 if masks is None else masks[number]
    segment_ids[begin:end], positions[begin:end] = number + 1, index[:end - begin]
    begin = end
  return {'tokens': tokens, 'targets': targets, 'loss_mask': loss_mask, 'segment_ids': segment_ids,
          'positions': positions}


def read_whole(ids: np.ndarray, layout: Layout) -> Features:
  """Features of a whole document, including its last token as input. Its next-token loss can be added to a row loss."""
  return lay_out([np.append(ids, 0)], [from_point(0, len(ids) + 1) & (np.arange(1, len(ids) + 1) < len(ids))], layout)


def cut(ids: np.ndarray, length: int, layout: Layout) -> np.ndarray:
  """At most `length` ids: the last ones (truncate 'left') or the first."""
  return ids[max(0, len(ids) - length):] if layout.truncate == 'left' else ids[:length]


def from_point(point: int, num_ids: int) -> np.ndarray:
  """bool [num_ids - 1]: for each target, whether it is ids[point] or a later one."""
  return np.arange(1, num_ids) >= point
