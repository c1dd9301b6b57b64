"""Tasks turn a row of a token store into the features of a Batch: inputs, targets and masks.

A task is a subclass of Task with its settings and a line in TASKS. Features of each row: tokens, targets, loss_mask,
segment_ids (1, 2, ... for the pieces; 0: padding) and positions (restarting in each piece), all [seq_len], padded with
0 on the right; some tasks add others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.registry import Registry, register, settings_from_signature
from llm_jax.data.rows.rows import PACKINGS, Row

Features = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The sizes and special ids that tasks need to fill rows."""

  seq_len: int
  encoder_len: int
  vocab_size: int  # without sentinels
  bos_id: int | None
  eos_id: int | None
  truncate: str = 'split'
  encoder: Layout | None = None  # ids of the encoder's own tokenizer; None: the same tokenizer

  @property
  def read(self) -> Layout:
    """The layout with the ids of the encoder's input."""
    return self if self.encoder is None else self.encoder

  @property
  def start_id(self) -> int:
    """The first input token of a decoder."""
    start = self.eos_id if self.bos_id is None else self.bos_id
    assert start is not None, 'make_examples rejects such tasks'
    return start


@dataclasses.dataclass(frozen=True)
class Task:
  """Base class of tasks: properties with their defaults, and `features`."""

  packings: ClassVar[tuple[str, ...]] = ('pad',)  # the packings (rows.py) that it supports
  needs: ClassVar[str] = 'text'  # what the store must hold: 'text', 'answers' or 'labels'
  overhead: ClassVar[int] = 0  # places that a piece takes in a row beyond its targets
  num_sentinels = 0  # sentinels that it uses; the id of sentinel k is vocab_size + k
  random: ClassVar[bool] = False  # whether `features` draws from its rng
  encodes: ClassVar[bool] = False  # whether it makes encoder_tokens
  writes: ClassVar[bool] = True  # whether the trained model can continue a text
  whole: ClassVar[bool] = False  # whether a loss on whole rows needs segment_ids

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    raise NotImplementedError


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
    return lay_out([piece.ids for piece in row], [_from(piece.answer or 1, len(piece.ids)) for piece in row], layout)


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle(Task):
  """Fill-in-the-middle by tokens (arXiv 2207.14255): the middle is moved behind the suffix; all tokens are learnt.

  A piece's first token and final eos stay in place; between them, with sentinels <0>, <1>, <2>:
  PSM <0> prefix <1> suffix <2> middle, SPM <0> <1> suffix <2> prefix middle.
  """

  rate: float = 0.5  # share of pieces to rearrange; the others are plain next-token
  spm_rate: float = 0.5  # share of SPM among the rearranged pieces
  packings: ClassVar[tuple[str, ...]] = ('best_fit', 'pad')
  overhead: ClassVar[int] = 3
  num_sentinels = 3
  random: ClassVar[bool] = True

  def __post_init__(self) -> None:
    if not 0 <= self.rate <= 1 or not 0 <= self.spm_rate <= 1:
      raise ValueError(f'rate and spm_rate must lie in [0, 1]; got {self.rate} and {self.spm_rate}')

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    return lay_out([self._rearranged(piece.ids, layout, rng) for piece in row], None, layout)

  def _rearranged(self, ids: np.ndarray, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    inner = _inner(ids, layout.eos_id)
    if rng.random() >= self.rate or not len(inner):
      return ids
    a, b = np.sort(rng.integers(0, len(inner) + 1, 2))
    before, after, between = ([layout.vocab_size + k] for k in range(3))
    prefix, middle, suffix, end = inner[:a], inner[a:b], inner[b:], ids[1 + len(inner):]
    if rng.random() < self.spm_rate:
      parts = [ids[:1], before, after, suffix, between, prefix, middle, end]
    else:
      parts = [ids[:1], before, prefix, after, suffix, between, middle, end]
    return _join(parts)


@dataclasses.dataclass(frozen=True)
class PrefixLM(Task):
  """Learns the tokens after a random point of each piece. `prefix_mask` [seq_len] is 1 on the tokens before it; these
  contain no target, so a model may let them attend to each other in both directions."""

  packings: ClassVar[tuple[str, ...]] = PACKINGS
  random: ClassVar[bool] = True

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    points = [int(rng.integers(1, len(piece.ids))) for piece in row]
    masks = [_from(point, len(piece.ids)) for piece, point in zip(row, points, strict=True)]
    features = lay_out([piece.ids for piece in row], masks, layout)
    inside = [np.arange(len(piece.ids) - 1) < point for piece, point in zip(row, points, strict=True)]
    return features | {'prefix_mask': _padded(np.concatenate(inside), layout.seq_len)}


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Task):
  """T5's objective (arXiv 1910.10683): sentinels replace spans of the encoder's input, and the decoder predicts them.

  A piece, without its first token and final eos, is A B C D with spans B and D: encoder A <0> C <1> eos, targets
  <0> B <1> D eos. `encoder_segment_ids` [encoder_len] is 1 on real tokens.
  """

  noise_density: float = 0.15
  mean_span_length: float = 3.0
  num_sentinels: int = 100  # maximum number of spans in a row
  random: ClassVar[bool] = True
  encodes: ClassVar[bool] = True

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

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    ids = _inner(piece.ids, layout.eos_id)
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
    return _encode(_join([encoder, _eos(layout)]), layout) | lay_out(
        [_join([[layout.start_id], decoder, _eos(layout)])], None, layout)


@dataclasses.dataclass(frozen=True)
class Seq2Seq(Task):
  """The encoder reads the prompt and eos; the decoder reads bos and the answer, and predicts the answer and eos.

  If prompts have their own tokenizer, the encoder's ids, eos included, are from it.
  A prompt longer than encoder_len loses its beginning (truncate 'left') or its end, an answer its end.
  """

  needs: ClassVar[str] = 'answers'
  encodes: ClassVar[bool] = True

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    prompt, answer = piece.ids[int(layout.bos_id is not None):piece.answer], piece.ids[piece.answer:]
    end = _eos(layout.read)
    prompt = cut(prompt, layout.encoder_len - len(end), layout)
    decoder = _join([[layout.start_id], answer[:layout.seq_len]])
    return _encode(_join([prompt, end]), layout) | lay_out([decoder], None, layout)


@dataclasses.dataclass(frozen=True)
class Pairs(Task):
  """Two texts that belong together, as separate documents: the prompt in tokens, the answer in encoder_tokens.

  Each includes its eos; longer ones are shortened by `cut`.
  """

  needs: ClassVar[str] = 'answers'
  encodes: ClassVar[bool] = True
  whole: ClassVar[bool] = True

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    first, second = piece.ids[:piece.answer], piece.ids[piece.answer:]
    if layout.bos_id is not None:
      second = _join([[layout.bos_id], second])
    if layout.eos_id is not None:
      first, second = (x if len(x) and x[-1] == layout.eos_id else _join([x, _eos(layout)]) for x in (first, second))
    first, second = (cut(x, length, layout) for x, length in ((first, layout.seq_len), (second, layout.encoder_len)))
    return read_whole(first, layout) | _encode(second, layout)


@dataclasses.dataclass(frozen=True)
class MaskedTokens(Task):
  """BERT's objective (arXiv 1810.04805): predicts hidden tokens from the tokens on both sides.

  Of the tokens to predict, 80% are replaced by the sentinel <0>, 10% by any token, 10% stay; bos is never among them.
  All tokens attend in both directions: the model needs prefix_attention.
  """

  rate: float = 0.15  # share of a row's tokens to predict
  packings: ClassVar[tuple[str, ...]] = ('best_fit', 'pad')
  overhead: ClassVar[int] = 1
  num_sentinels = 1
  random: ClassVar[bool] = True
  writes: ClassVar[bool] = False

  def __post_init__(self) -> None:
    if not 0 < self.rate < 1:
      raise ValueError(f'rate must lie between 0 and 1; got {self.rate}')

  def problems(self, config: Any) -> list[str]:
    if config.model.prefix_attention:
      return []
    return ['model.prefix_attention must be True for data.task masked_tokens, which predicts from both sides; the '
            'model decoder has it']

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    features = lay_out([np.append(piece.ids, 0) for piece in row], None, layout)
    tokens, real = features['tokens'], features['segment_ids'] > 0
    places = np.flatnonzero(real if layout.bos_id is None else real & (tokens != layout.bos_id))
    hidden = rng.permutation(places)[:max(1, round(self.rate * len(places)))]
    shown, dice = tokens.copy(), rng.random(len(hidden))
    shown[hidden[dice < 0.8]] = layout.vocab_size
    shown[hidden[dice >= 0.9]] = rng.integers(0, layout.vocab_size, int(np.sum(dice >= 0.9)))
    mask = np.zeros(layout.seq_len, np.float32)
    mask[hidden] = 1
    return features | {'tokens': shown, 'targets': tokens, 'loss_mask': mask, 'prefix_mask': real.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class Classification(Task):
  """The input is a whole document, eos included; `labels` is its class, int32 []. See `read_whole`."""

  needs: ClassVar[str] = 'labels'
  overhead: ClassVar[int] = 1
  whole: ClassVar[bool] = True

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    return read_whole(piece.ids, layout) | {'labels': np.asarray(piece.label, np.int32)}


@dataclasses.dataclass(frozen=True)
class Regression(Task):
  """The input is a whole document, eos included; `labels` is float32 [], or [C] if each document has C numbers."""

  needs: ClassVar[str] = 'labels'
  overhead: ClassVar[int] = 1
  whole: ClassVar[bool] = True

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    return read_whole(piece.ids, layout) | {'labels': np.asarray(piece.label, np.float32)}


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
for _name, _task in (
    ('next_token', NextToken), ('prompt_answer', PromptAnswer), ('fim', FillInTheMiddle), ('prefix_lm', PrefixLM),
    ('span_corruption', SpanCorruption), ('seq2seq', Seq2Seq), ('pairs', Pairs), ('masked_tokens', MaskedTokens),
    ('classification', Classification), ('regression', Regression)):
  register(TASKS, _name, _task)


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
  return lay_out([np.append(ids, 0)], [_from(0, len(ids) + 1) & (np.arange(1, len(ids) + 1) < len(ids))], layout)


def cut(ids: np.ndarray, length: int, layout: Layout) -> np.ndarray:
  """At most `length` ids: the last ones (truncate 'left') or the first."""
  return ids[max(0, len(ids) - length):] if layout.truncate == 'left' else ids[:length]


def _encode(ids: np.ndarray, layout: Layout) -> Features:
  return {'encoder_tokens': _padded(ids, layout.encoder_len),
          'encoder_segment_ids': _padded(np.ones(len(ids)), layout.encoder_len)}


def _padded(x: np.ndarray, length: int) -> np.ndarray:
  result = np.zeros(length, np.int32)
  result[:len(x)] = x
  return result


def _from(point: int, num_ids: int) -> np.ndarray:
  """bool [num_ids - 1]: for each target, whether it is ids[point] or a later one."""
  return np.arange(1, num_ids) >= point


def _inner(ids: np.ndarray, eos_id: int | None) -> np.ndarray:
  """The ids without the first, which is no target, and without eos at the end."""
  return ids[1:-1] if len(ids) > 1 and ids[-1] == eos_id else ids[1:]


def _eos(layout: Layout) -> list[int]:
  return [] if layout.eos_id is None else [layout.eos_id]


def _join(parts: list) -> np.ndarray:
  return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _random_lengths(total: int, num_parts: int, rng: np.random.Generator) -> np.ndarray:
  """`num_parts` random lengths of 1 or more with the sum `total`, uniform over all such splits."""
  cuts = np.sort(rng.choice(total - 1, num_parts - 1, replace=False)) + 1 if num_parts > 1 else np.zeros(0, np.int64)
  return np.diff(np.concatenate([[0], cuts, [total]]))[:num_parts]
