"""Examples: random access to the rows of a store as a task's features; checks that the settings fit together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.rows.augment import Augment, disturbed, jittered
from llm_jax.data.rows.rows import PACKINGS, Packed, Store, Windows, missing_end
from llm_jax.data.rows.tasks import TASKS, Features, Layout, Task
from llm_jax.data.tokenizers.tokenizer import Tokenizer

# What a task needs of the store -> allowed truncations, the default first.
TRUNCATIONS = {'text': ('split', 'left', 'right'), 'answers': ('left', 'right'), 'labels': ('right', 'left'),
               'learnt': ('right',), 'seconds': ('right',)}
# ... -> what to do if it is missing.
FIELDS = {'answers': 'set config.data.answer_field to their field', 'labels': 'set config.data.label_field to their '
          'field', 'learnt': 'use conversations', 'seconds': 'use pairs of conversations, chosen and rejected'}


@dataclasses.dataclass(frozen=True)
class Examples:
  rows: Windows | Packed
  task: Task
  layout: Layout
  augment: Augment
  score_once: bool
  dropped_tokens: int  # targets of the store that are in no row

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def random(self) -> bool:
    """Whether `make` draws from its rng."""
    return self.task.random or self.augment.random

  @property
  def map(self) -> Callable[..., Iterable[Any]]:
    """Calls `make` for many rows."""
    return getattr(self.rows.store, 'map', map)

  def make(self, index: int, rng: np.random.Generator) -> Features:
    """Features of row `index`: a function of the index and the rng's state alone."""
    index, rows, seq_len = int(index), self.rows, self.layout.seq_len
    if self.augment.jitter and isinstance(rows, Windows):
      row = rows.at(jittered(index * rows.stride, seq_len, rows.num_targets, rng))
    else:
      row = rows[index]
    features = self.task.features(row, self.layout, rng)
    if self.score_once and index and isinstance(rows, Windows):
      features['loss_mask'][:seq_len - rows.stride] = 0  # scored in the window before, with more context
    if self.score_once and isinstance(rows, Windows) and self.layout.bos_id not in (None, self.layout.eos_id):
      features['loss_mask'][features['targets'] == self.layout.bos_id] = 0  # it only begins the next document
    if self.augment.token_dropout or self.augment.token_replace:
      for name, segments, ids in (('tokens', 'segment_ids', self.layout),
                                  ('encoder_tokens', 'encoder_segment_ids', self.layout.read)):
        if name in features:
          features[name] = disturbed(features[name], features[segments] > 0, self.augment, ids.vocab_size,
                                     ids.start_id, rng)
    if not self.layout.mask_documents:
      del features['positions']
      if not self.task.whole:
        del features['segment_ids']
    return features


def make_examples(store: Store, *, task: Task, seq_len: int, encoder_len: int = 0, packing: str = 'concat',
                  stride: int | None = None, truncate: str = 'auto', mask_documents: bool = True,
                  augment: Augment | None = None, vocab_size: int, bos_id: int | None, eos_id: int | None,
                  encoder_tokenizer: Tokenizer | None = None, score_once: bool = False) -> Examples:
  """All rows of a store as examples. `score_once` (evaluation): a target in several windows counts only in the one with
  most context, and what counts is each token of a text and one eos for each document. `encoder_tokenizer`: the prompts'
  own tokenizer, if they have one. Raises ConfigError for settings that do not fit together, DataError for a store that
  gives no rows.
  """
  augment = augment or Augment()
  truncate = TRUNCATIONS[task.needs][0] if truncate == 'auto' else truncate
  layout = Layout(seq_len, encoder_len, vocab_size, bos_id, eos_id, packing, truncate, mask_documents)
  if (other := encoder_tokenizer) is not None:
    layout = dataclasses.replace(layout, encoder=dataclasses.replace(
        layout, vocab_size=len(other.token_bytes), bos_id=other.bos_id, eos_id=other.eos_id))
  problem = next(_problems(store, task, layout, stride, augment, score_once), None)
  if problem:
    raise ConfigError(problem)
  task.check(layout, store)
  end = missing_end(store, bos_id, eos_id) if score_once else None
  rows = Windows(store, seq_len, stride or seq_len, end=end) if packing == 'concat' else task.packed(store, layout)
  if not len(rows):
    raise DataError(f'config.data.path: {len(store.tokens)} token(s) in {len(store.starts)} document(s) give no row '
                    f'for task {TASKS.name_of(type(task))} with packing {packing}; {rows.dropped_tokens} token(s) were '
                    f'cut by truncate {truncate} and seq_len {seq_len}; use more data or a larger config.data.seq_len')
  return Examples(rows, task, layout, augment, score_once, rows.dropped_tokens)


def _problems(store: Store, task: Task, layout: Layout, stride: int | None, augment: Augment,
              score_once: bool) -> Iterator[str]:
  """Messages about settings that do not fit together."""
  name, needs, seq_len, packing = TASKS.name_of(type(task)), task.needs, layout.seq_len, layout.packing
  no_ends = layout.bos_id is None and layout.eos_id is None
  if packing not in task.packings:
    yield (f'config.data.packing: {packing!r} does not work with task {name}; use one of: '
           f'{", ".join(p for p in PACKINGS if p in task.packings)}')
  if needs != 'text' and getattr(store, needs, None) is None:
    yield (f'config.data.task: {name} needs {needs}, but the data has none; {FIELDS.get(needs)}, or '
           f'use a task that needs none: {", ".join(other for other in TASKS if TASKS[other].needs == "text")}')
  truncations = TRUNCATIONS[needs] if packing != 'concat' else ('split',)
  if layout.truncate not in truncations:
    yield (f'config.data.truncate: {layout.truncate!r} does not work with task {name} and packing {packing}; use one '
           f'of: auto, {", ".join(truncations)}')
  if stride is not None and packing != 'concat':
    yield f'config.data.stride: {stride} needs packing concat, but packing is {packing}; set it to None'
  if stride is not None and not 1 <= stride <= seq_len:
    yield f'config.data.stride: {stride} must lie in [1, seq_len {seq_len}], or be None'
  for field, overhead in (('seq_len', task.overhead), ('encoder_len', task.encoder_overhead if task.encodes else -1)):
    if (length := getattr(layout, field)) <= overhead:
      yield f'config.data.{field}: {length} is too short for task {name}; the minimum is {overhead + 1}'
  if task.encodes and no_ends:
    yield (f'config.data.task: {name} needs a bos or eos token, but the data has none; for data of token ids, set '
           'config.data.eot_id')
  if augment.jitter and (packing != 'concat' or score_once):
    yield (f'config.data.augment.jitter: True is only for training with packing concat; packing is {packing}'
           + (', and score_once is set' if score_once else ''))
  if augment.token_dropout and no_ends:
    yield (f'config.data.augment.token_dropout: {augment.token_dropout} replaces tokens with bos or eos, but the data '
           'has neither; for data of token ids, set config.data.eot_id')
