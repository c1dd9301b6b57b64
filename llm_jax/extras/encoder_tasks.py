"""Tasks that fill encoder_tokens: span corruption, seq2seq and pairs of texts."""

from __future__ import annotations

import bisect
import dataclasses
from typing import ClassVar

import numpy as np

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import register
from llm_jax.data.rows.rows import Packed, Row, Store
from llm_jax.data.rows.tasks import TASKS, Features, Layout, Task, cut, lay_out, read_whole
from llm_jax.extras.text_tasks import inner, join, padded


@dataclasses.dataclass(frozen=True)
class EncoderTask(Task):
  """Base class of tasks with encoder_tokens."""

  encodes: ClassVar[bool] = True
  least_seq_len: ClassVar[int] = 1
  least_encoder_len: ClassVar[int] = 2

  def check(self, layout: Layout, store: Store) -> None:
    for field, least in (('seq_len', self.least_seq_len), ('encoder_len', self.least_encoder_len)):
      if (length := getattr(layout, field)) < least:
        raise ConfigError(f'config.data.{field}: {length} is too short for task {TASKS.name_of(type(self))}; '
                          f'the minimum is {least}')


@dataclasses.dataclass(frozen=True)
class SpanCorruption(EncoderTask):
  """T5's objective (arXiv 1910.10683): sentinels replace spans of the encoder's input, and the decoder predicts them.

  A piece, without its first token and final eos, is A B C D with spans B and D: encoder A <0> C <1> eos, targets
  <0> B <1> D eos. `encoder_segment_ids` [encoder_len] is 1 on real tokens.
  """

  noise_density: float = 0.15
  mean_span_length: float = 3.0
  num_sentinels: int = 100  # maximum number of spans in a row
  random: ClassVar[bool] = True
  least_seq_len: ClassVar[int] = 3
  least_encoder_len: ClassVar[int] = 3

  def __post_init__(self) -> None:
    if not 0 < self.noise_density < 1 or self.mean_span_length < 1 or self.num_sentinels < 1:
      raise ValueError('noise_density must lie between 0 and 1, mean_span_length and num_sentinels be at least 1; '
                       f'got {self.noise_density}, {self.mean_span_length} and {self.num_sentinels}')

  def noise(self, length: int) -> tuple[int, int]:
    """(number of tokens, number of spans) to remove from `length` tokens; never all, and (0, 0) below 2."""
    if length < 2:
      return 0, 0
    num_tokens = min(max(round(length * self.noise_density), 1), length - 1)
    return num_tokens, min(max(round(num_tokens / self.mean_span_length), 1), length - num_tokens)

  def capacity(self, layout: Layout) -> int:
    """The longest piece whose encoder and decoder tokens, each with eos, fit encoder_len and seq_len."""
    def too_long(length: int) -> bool:
      num_noise, num_spans = self.noise(length)
      return length - num_noise + num_spans + 1 > layout.encoder_len or num_noise + num_spans + 1 > layout.seq_len
    return bisect.bisect_left(range(layout.encoder_len + layout.seq_len), True, key=too_long) - 1

  def check(self, layout: Layout, store: Store) -> None:
    super().check(layout, store)
    _, num_spans = self.noise(self.capacity(layout))
    if num_spans > self.num_sentinels:
      raise ConfigError(f'config.data.span_corruption.num_sentinels: {self.num_sentinels} is less than the {num_spans} '
                        f'spans of a row with encoder_len {layout.encoder_len} and seq_len {layout.seq_len}; '
                        f'set {num_spans} or more, or make the rows shorter')

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    ids = inner(piece.ids, layout.eos_id)
    num_noise, num_spans = self.noise(len(ids))
    # Spans may be at both ends: of the parts kept between spans only the first and the last may be empty.
    lengths = np.zeros(2 * num_spans + 1, np.int64)
    lengths[::2] = _random_lengths(len(ids) - num_noise + 2, num_spans + 1, rng)
    lengths[[0, -1]] -= 1 if num_spans else 2
    lengths[1::2] = taken = _random_lengths(num_noise, num_spans, rng)
    noise = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    opens = np.diff(noise, prepend=False) & noise  # each span's first token
    sentinels = layout.vocab_size + np.arange(num_spans)
    encoder = ids[~noise | opens].copy()
    encoder[opens[~noise | opens]] = sentinels
    decoder = np.insert(ids[noise], np.cumsum(taken) - taken, sentinels)
    return _encode(join([encoder, _eos(layout)]), layout) | lay_out(
        [join([[layout.start_id], decoder, _eos(layout)])], None, layout)


@dataclasses.dataclass(frozen=True)
class Seq2Seq(EncoderTask):
  """The encoder reads the prompt and eos; the decoder reads bos and the answer, and predicts the answer and eos.

  If prompts have their own tokenizer, the encoder's ids, eos included, are from it.
  A prompt longer than encoder_len loses its beginning (truncate 'left') or its end, an answer its end.
  """

  needs: ClassVar[str] = 'answers'
  encoder_tokenizer: ClassVar[bool] = True

  def capacity(self, layout: Layout) -> None:
    return None

  def num_cut(self, rows: Packed, layout: Layout) -> int:
    prompts, answers = _sides(rows)
    read = prompts - (layout.bos_id is not None) + (layout.read.eos_id is not None)
    return _excess(read, layout.encoder_len) + _excess(answers, layout.seq_len)

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    prompt, answer = piece.ids[int(layout.bos_id is not None):piece.answer], piece.ids[piece.answer:]
    end = _eos(layout.read)
    prompt = cut(prompt, layout.encoder_len - len(end), layout)
    decoder = join([[layout.start_id], answer[:layout.seq_len]])
    return _encode(join([prompt, end]), layout) | lay_out([decoder], None, layout)


@dataclasses.dataclass(frozen=True)
class Pairs(EncoderTask):
  """Two texts that belong together, as separate documents: the prompt in tokens, the answer in encoder_tokens.

  Each includes its eos; longer ones are shortened by `cut`.
  """

  needs: ClassVar[str] = 'answers'
  whole: ClassVar[bool] = True

  def capacity(self, layout: Layout) -> None:
    return None

  def num_cut(self, rows: Packed, layout: Layout) -> int:
    prompts, answers = _sides(rows)
    return (_excess(prompts + (layout.eos_id is not None), layout.seq_len)
            + _excess(answers + (layout.bos_id is not None), layout.encoder_len))

  def check(self, layout: Layout, store: Store) -> None:
    super().check(layout, store)
    if layout.encoder_len > layout.seq_len:
      raise ConfigError(f'config.data.encoder_len: {layout.encoder_len} must be at most seq_len {layout.seq_len}: in '
                        'task pairs the same model reads both texts')

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    first, second = piece.ids[:piece.answer], piece.ids[piece.answer:]
    if layout.bos_id is not None:
      second = join([[layout.bos_id], second])
    if layout.eos_id is not None:
      first, second = (x if len(x) and x[-1] == layout.eos_id else join([x, _eos(layout)]) for x in (first, second))
    first, second = (cut(x, length, layout) for x, length in ((first, layout.seq_len), (second, layout.encoder_len)))
    return read_whole(first, layout) | _encode(second, layout)


def _sides(rows: Packed) -> tuple[np.ndarray, np.ndarray]:
  """The number of tokens in each prompt, bos included, and in each answer, eos included."""
  prompts = np.maximum(np.asarray(rows.answers), 1)[rows.documents]
  return prompts, rows.sizes + 1 - prompts


def _excess(sizes: np.ndarray, limit: int) -> int:
  return int(np.maximum(sizes - limit, 0).sum())


def _encode(ids: np.ndarray, layout: Layout) -> Features:
  return {'encoder_tokens': padded(ids, layout.encoder_len),
          'encoder_segment_ids': padded(np.ones(len(ids)), layout.encoder_len)}


def _eos(layout: Layout) -> list[int]:
  return [] if layout.eos_id is None else [layout.eos_id]


def _random_lengths(total: int, num_parts: int, rng: np.random.Generator) -> np.ndarray:
  """`num_parts` random lengths of 1 or more with the sum `total`, uniform over all such splits."""
  cuts = np.sort(rng.choice(total - 1, num_parts - 1, replace=False)) + 1 if num_parts > 1 else np.zeros(0, np.int64)
  return np.diff(np.concatenate([[0], cuts, [total]]))[:num_parts]


register(TASKS, 'span_corruption', SpanCorruption)
register(TASKS, 'seq2seq', Seq2Seq)
register(TASKS, 'pairs', Pairs)
