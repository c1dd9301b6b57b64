"""Examples: random access to the rows of a store as a task's features; checks that the settings fit together."""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.rows.augment import Augment, disturbed, jittered
from llm_jax.data.rows.rows import PACKINGS, Packed, Store, Windows, pack
from llm_jax.data.rows.tasks import TASKS, Classification, Features, Layout, Pairs, Seq2Seq, SpanCorruption, Task
from llm_jax.data.tokenizers.tokenizer import Tokenizer

# What a task needs of the store -> allowed truncations, the default first.
TRUNCATIONS = {'text': ('split', 'left', 'right'), 'answers': ('left', 'right'), 'labels': ('right', 'left')}
# ... -> the setting that provides it.
FIELDS = {'answers': 'config.data.answer_field', 'labels': 'config.data.label_field'}


@dataclasses.dataclass(frozen=True)
class Examples:
  rows: Windows | Packed
  task: Task
  layout: Layout
  augment: Augment
  mask_documents: bool
  score_once: bool
  dropped_tokens: int  # targets of the store that are in no row

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def random(self) -> bool:
    """Whether `make` draws from its rng."""
    return self.task.random or self.augment.random

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
    if self.augment.token_dropout or self.augment.token_replace:
      for name, segments, ids in (('tokens', 'segment_ids', self.layout),
                                  ('encoder_tokens', 'encoder_segment_ids', self.layout.read)):
        if name in features:
          features[name] = disturbed(features[name], features[segments] > 0, self.augment, ids.vocab_size,
                                     ids.start_id, rng)
    if not self.mask_documents:
      del features['positions']
      if not self.task.whole:
        del features['segment_ids']
    return features


def make_examples(store: Store, *, task: Task, seq_len: int, encoder_len: int = 0, packing: str = 'concat',
                  stride: int | None = None, truncate: str = 'auto', mask_documents: bool = True,
                  augment: Augment | None = None, vocab_size: int, bos_id: int | None, eos_id: int | None,
                  encoder_tokenizer: Tokenizer | None = None, score_once: bool = False) -> Examples:
  """All rows of a store as examples. `score_once` (evaluation): a target in several windows counts only in the one with
  most context. `encoder_tokenizer`: the prompts' own tokenizer, if they have one. Raises ConfigError for settings that
  do not fit together, DataError for a store that gives no rows.
  """
  augment = augment or Augment()
  truncate = TRUNCATIONS[task.needs][0] if truncate == 'auto' else truncate
  layout = Layout(seq_len, encoder_len, vocab_size, bos_id, eos_id, truncate)
  if (other := encoder_tokenizer) is not None:
    layout = dataclasses.replace(layout, encoder=dataclasses.replace(
        layout, vocab_size=len(other.token_bytes), bos_id=other.bos_id, eos_id=other.eos_id))
  _check(store, task, layout, packing, stride, mask_documents, augment, score_once)
  rows = Windows(store, seq_len, stride or seq_len) if packing == 'concat' else _packed(store, task, layout, packing)
  dropped = rows.dropped_tokens
  if isinstance(task, (Seq2Seq, Pairs)) and isinstance(rows, Packed):
    dropped += _cut_by(task, layout, rows)
  if not len(rows):
    raise DataError(f'config.data.path: {len(store.tokens)} token(s) in {len(store.starts)} document(s) give '
                    f'no row for task {_name(task)} with packing {packing}; {dropped} token(s) were cut by truncate '
                    f'{truncate} and seq_len {seq_len}; use more data or a larger config.data.seq_len')
  return Examples(rows, task, layout, augment, mask_documents, score_once, dropped)


def _packed(store: Store, task: Task, layout: Layout, packing: str) -> Packed:
  capacity = layout.seq_len - task.overhead
  if isinstance(task, SpanCorruption):
    capacity = span_capacity(task, layout)
  if isinstance(task, (Seq2Seq, Pairs)):
    capacity = len(store.tokens) + 1  # the task cuts both sides itself
  return pack(store, packing, layout.truncate, capacity, row_size=layout.seq_len, overhead=task.overhead,
              answers=store.answers if task.needs == 'answers' else None,
              least=0 if task.needs == 'labels' else 1, bos_id=layout.bos_id, eos_id=layout.eos_id)


def span_capacity(task: SpanCorruption, layout: Layout) -> int:
  """The longest piece whose encoder and decoder tokens, each with eos, fit encoder_len and seq_len."""
  def too_long(length: int) -> bool:
    num_noise, num_spans = task.noise(length)
    return length - num_noise + num_spans + 1 > layout.encoder_len or num_noise + num_spans + 1 > layout.seq_len
  return bisect.bisect_left(range(layout.encoder_len + layout.seq_len), True, key=too_long) - 1


def _cut_by(task: Task, layout: Layout, rows: Packed) -> int:
  """Number of tokens that the task cuts from all prompts and answers."""
  opens, ends = layout.bos_id is not None, layout.eos_id is not None
  prompts = np.maximum(np.asarray(rows.answers), 1)[rows.documents]
  answers = rows.sizes + 1 - prompts
  if isinstance(task, Pairs):
    limits = ((prompts + ends, layout.seq_len), (answers + opens, layout.encoder_len))
  else:
    limits = ((prompts - opens + (layout.read.eos_id is not None), layout.encoder_len), (answers, layout.seq_len))
  return int(sum(np.maximum(sizes - limit, 0).sum() for sizes, limit in limits))


def _check(store: Store, task: Task, layout: Layout, packing: str, stride: int | None, mask_documents: bool,
           augment: Augment, score_once: bool) -> None:
  """Raises ConfigError for the first setting that does not fit, DataError for labels that the task cannot use."""
  name, needs, seq_len = _name(task), task.needs, layout.seq_len
  fitting = [p for p in PACKINGS if p in task.packings]
  truncations = TRUNCATIONS[needs] if packing != 'concat' else ('split',)
  held = getattr(store, needs, None)
  for wrong, message in (
      (packing not in fitting, f'config.data.packing: {packing!r} does not work with task {name}; '
       f'use one of: {", ".join(fitting)}'),
      (needs != 'text' and held is None, f'config.data.task: {name} needs {needs}, but the data has none; set '
       f'{FIELDS.get(needs)} to their field, or use a task that needs none: '
       f'{", ".join(other for other in TASKS if TASKS[other].needs == "text")}'),
      (layout.truncate not in truncations, f'config.data.truncate: {layout.truncate!r} does not work with task {name} '
       f'and packing {packing}; use one of: auto, {", ".join(truncations)}'),
      (stride is not None and packing != 'concat', f'config.data.stride: {stride} needs packing concat, but packing '
       f'is {packing}; set it to None'),
      (stride is not None and not 1 <= stride <= seq_len, f'config.data.stride: {stride} must lie in [1, seq_len '
       f'{seq_len}], or be None'),
      (seq_len <= task.overhead, f'config.data.seq_len: {seq_len} is too short for task {name}; the minimum is '
       f'{task.overhead + 1}'),
      (task.encodes and layout.bos_id is None and layout.eos_id is None, f'config.data.task: {name} needs a bos or '
       'eos token, but the data has none; for data of token ids, set config.data.eot_id'),
      (name == 'pairs' and layout.encoder_len > seq_len, f'config.data.encoder_len: {layout.encoder_len} must be at '
       f'most seq_len {seq_len}: in task pairs the same model reads both texts'),
      (name == 'prefix_lm' and not mask_documents and packing != 'pad', 'config.data.mask_documents: False does not '
       'work with task prefix_lm unless packing is pad: tokens would attend to the prefix of the next document'),
      (augment.jitter and (packing != 'concat' or score_once), 'config.data.augment.jitter: True is only for training '
       f'with packing concat; packing is {packing}' + (', and score_once is set' if score_once else '')),
      (augment.token_dropout > 0 and layout.bos_id is None and layout.eos_id is None,
       f'config.data.augment.token_dropout: {augment.token_dropout} replaces tokens with bos or eos, but the data has '
       'neither; for data of token ids, set config.data.eot_id'),
  ):
    if wrong:
      raise ConfigError(message)
  if task.encodes:
    _check_encoder(task, layout)
  if needs == 'labels' and store.labels is not None:
    _check_labels(task, store.labels)


def _check_encoder(task: Task, layout: Layout) -> None:
  least = {'seq_len': 3, 'encoder_len': 3} if isinstance(task, SpanCorruption) else {'seq_len': 1, 'encoder_len': 2}
  for field, value in least.items():
    if getattr(layout, field) < value:
      raise ConfigError(f'config.data.{field}: {getattr(layout, field)} is too short for task {_name(task)}; '
                        f'the minimum is {value}')
  if isinstance(task, SpanCorruption):
    _, num_spans = task.noise(span_capacity(task, layout))
    if num_spans > task.num_sentinels:
      raise ConfigError(f'config.data.span_corruption.num_sentinels: {task.num_sentinels} is less than the {num_spans} '
                        f'spans of a row with encoder_len {layout.encoder_len} and seq_len {layout.seq_len}; '
                        f'set {num_spans} or more, or make the rows shorter')


def _check_labels(task: Task, labels: np.ndarray) -> None:
  is_class = isinstance(task, Classification)
  if is_class and labels.ndim != 1:
    raise DataError(f'config.data.label_field: task classification needs one class per document, but labels have '
                    f'{labels.shape[1]} numbers each; use task regression')
  fine = np.isfinite(labels) & ((labels >= 0) & (labels == np.floor(labels)) if is_class else True)
  if not fine.all():
    at = np.argwhere(~fine)[0]
    raise DataError(f'config.data.label_field: the label of document {at[0]} (counted from 0) is {labels[tuple(at)]}; '
                    f'labels must be {"whole numbers of 0 or more" if is_class else "finite numbers"}')


def _name(task: Task) -> str:
  return next(name for name in TASKS if type(task) is TASKS[name])
