"""Tasks on conversations: learning the assistant's turns, and pairs of a chosen and a rejected answer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Literal

import numpy as np

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import register
from llm_jax.data.rows.rows import Packed, Row, Store, arrange
from llm_jax.data.rows.tasks import TASKS, Features, Layout, Task, lay_out


@dataclasses.dataclass(frozen=True)
class Chat(Task):
  """Inputs are conversations, written by a chat template; what the assistant says and the end of its turns is learnt.

  A conversation longer than a row is cut after the last turn of the assistant that fits, and left out if none does.
  """

  learn: Literal['assistant', 'last', 'all'] = 'assistant'  # all turns of the assistant, its last one, or all tokens
  template: str | None = None  # chatml, llama3, gemma, qwen3, plain, a Jinja file, or a folder; None: the tokenizer's
  special_tokens: tuple[str, ...] = ()  # further special tokens that the template writes
  packings: ClassVar[tuple[str, ...]] = ('best_fit', 'pad')
  needs: ClassVar[str] = 'learnt'
  chats: ClassVar[bool] = True

  def packed(self, store: Any, layout: Layout) -> Packed:
    starts = store.starts
    targets = np.append(starts[1:], len(store.tokens)) - starts - 1
    sizes = targets.copy()
    for document in np.flatnonzero(targets > layout.seq_len):
      sizes[document] = _that_fits(store.learnt, int(starts[document]), layout.seq_len)
    num_cut, num_dropped = int(((sizes > 0) & (sizes < targets)).sum()), int((sizes < 1).sum())
    if num_cut + num_dropped:
      _say(f'data: of {len(sizes):,} conversations, {num_cut:,} are cut after the last turn of the assistant that fits '
           f'into config.data.seq_len {layout.seq_len}, and {num_dropped:,} are left out, as no turn fits')
    documents = np.flatnonzero(sizes > 0)
    return arrange(store, documents, starts[documents], sizes[documents], layout.packing, layout.seq_len,
                   dropped_tokens=int(targets.sum() - sizes.sum()), learnt=store.learnt)

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    return lay_out([piece.ids for piece in row], [self._mask(piece.learnt) for piece in row], layout)

  def _mask(self, learnt: Any) -> np.ndarray:
    """bool [n]: the targets that count."""
    if self.learn == 'all':
      return np.ones(len(learnt) - 1, bool)
    if self.learn == 'last' and learnt.any():
      others = np.flatnonzero(~learnt[:np.flatnonzero(learnt)[-1]])
      learnt = learnt & (np.arange(len(learnt)) > others.max(initial=-1))
    return learnt[1:]


@dataclasses.dataclass(frozen=True)
class Preference(Task):
  """Inputs are a chosen and a rejected conversation, segments 1 and 2 of a row; the answers that differ count.

  A loss compares the sums over the segments. Pairs that do not fit into a row are left out.
  """

  template: str | None = None  # chatml, llama3, gemma, qwen3, plain, a Jinja file, or a folder; None: the tokenizer's
  special_tokens: tuple[str, ...] = ()  # further special tokens that the template writes
  needs: ClassVar[str] = 'seconds'
  chats: ClassVar[bool] = True

  def problems(self, config: Any) -> list[str]:
    if 'next_token' not in config.loss.terms:
      return []
    return ['loss.terms next_token would learn the rejected answers of data.task preference too; set a loss that '
            'compares the segments 1 (chosen) and 2 (rejected) of a row']

  def check(self, layout: Layout, store: Store) -> None:
    if not layout.mask_documents:
      raise ConfigError('config.data.mask_documents: False does not work with task preference: the rejected '
                        'conversation would attend to the chosen one')

  def packed(self, store: Any, layout: Layout) -> Packed:
    starts = store.starts
    targets = np.append(starts[1:], len(store.tokens)) - starts - 1
    documents = np.flatnonzero(targets - 1 <= layout.seq_len)
    if num_dropped := len(starts) - len(documents):
      _say(f'data: of {len(starts):,} pairs, {num_dropped:,} are left out, as both conversations together do not fit '
           f'into config.data.seq_len {layout.seq_len}')
    return arrange(store, documents, starts[documents], targets[documents], layout.packing, layout.seq_len + 1,
                   dropped_tokens=int(targets.sum() - targets[documents].sum()), learnt=store.learnt,
                   seconds=store.seconds)

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    learnt: Any = piece.learnt
    return lay_out([piece.ids[:piece.second], piece.ids[piece.second:]],
                   [learnt[1:piece.second], learnt[piece.second:][1:]], layout)


def _that_fits(learnt: Any, start: int, most: int) -> int:
  """The number of targets up to the last end of a turn of the assistant within the first `most`; 0: none fits."""
  marks = np.asarray(learnt[start:start + most + 2], bool)
  ends = np.flatnonzero(marks[1:-1] & ~marks[2:]) + 1
  return int(ends[-1]) if len(ends) else 0


@functools.cache
def _say(message: str) -> None:
  """Prints a message once, as rows are made anew for each part of a run."""
  print(message, flush=True)


for _name, _task in (('chat', Chat), ('preference', Preference)):
  register(TASKS, _name, _task)
