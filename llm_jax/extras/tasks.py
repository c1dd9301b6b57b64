"""Tasks that most users never name: rearranged and masked text, encoder-decoder tasks, pairs of texts, labels."""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import register
from llm_jax.data.rows.rows import PACKINGS, Packed, Row, Store
from llm_jax.data.rows.tasks import TASKS, Features, Layout, Task, cut, from_point, lay_out, read_whole


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
    text = _inner(ids, layout.eos_id)
    if rng.random() >= self.rate or not len(text):
      return ids
    a, b = np.sort(rng.integers(0, len(text) + 1, 2))
    before, after, between = ([layout.vocab_size + k] for k in range(3))
    prefix, middle, suffix, end = text[:a], text[a:b], text[b:], ids[1 + len(text):]
    is_spm = rng.random() < self.spm_rate
    parts = [before, after, suffix, between, prefix] if is_spm else [before, prefix, after, suffix, between]
    return _join([ids[:1], *parts, middle, end])


@dataclasses.dataclass(frozen=True)
class PrefixLM(Task):
  """Learns the tokens after a random point of each piece. `prefix_mask` [seq_len] is 1 on the tokens before it; these
  contain no target, so a model may let them attend to each other in both directions."""

  packings: ClassVar[tuple[str, ...]] = PACKINGS
  random: ClassVar[bool] = True

  def check(self, layout: Layout, store: Store) -> None:
    if not layout.mask_documents and layout.packing != 'pad':
      raise ConfigError('config.data.mask_documents: False does not work with task prefix_lm unless packing is pad: '
                        'tokens would attend to the prefix of the next document')

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    points = [int(rng.integers(1, len(piece.ids))) for piece in row]
    masks = [from_point(point, len(piece.ids)) for piece, point in zip(row, points, strict=True)]
    features = lay_out([piece.ids for piece in row], masks, layout)
    inside = [np.arange(len(piece.ids) - 1) < point for piece, point in zip(row, points, strict=True)]
    return features | {'prefix_mask': _padded(np.concatenate(inside), layout.seq_len)}


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
class SpanCorruption(Task):
  """T5's objective (arXiv 1910.10683): sentinels replace spans of the encoder's input, and the decoder predicts them.

  A piece, without its first token and final eos, is A B C D with spans B and D: encoder A <0> C <1> eos, targets
  <0> B <1> D eos. `encoder_segment_ids` [encoder_len] is 1 on real tokens.
  """

  noise_density: float = 0.15  # share of the tokens that are replaced, in (0, 1)
  mean_span_length: float = 3.0  # tokens of a replaced span, on average
  num_sentinels: int = 100  # maximum number of spans in a row
  random: ClassVar[bool] = True
  overhead: ClassVar[int] = 2  # a sentinel and eos
  encodes: ClassVar[bool] = True
  encoder_overhead: ClassVar[int] = 2

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
    _, num_spans = self.noise(self.capacity(layout))
    if num_spans > self.num_sentinels:
      raise ConfigError(f'config.data.span_corruption.num_sentinels: {self.num_sentinels} is less than the {num_spans} '
                        f'spans of a row with encoder_len {layout.encoder_len} and seq_len {layout.seq_len}; '
                        f'set {num_spans} or more, or make the rows shorter')

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
    return _encode(_join([encoder, layout.end]), layout) | lay_out(
        [_join([[layout.start_id], decoder, layout.end])], None, layout)


@dataclasses.dataclass(frozen=True)
class Seq2Seq(Task):
  """The encoder reads the prompt and eos; the decoder reads bos and the answer, and predicts the answer and eos.

  If prompts have their own tokenizer, the encoder's ids, eos included, are from it.
  A prompt longer than encoder_len loses its beginning (truncate 'left') or its end, an answer its end.
  """

  needs: ClassVar[str] = 'answers'
  encodes: ClassVar[bool] = True
  encoder_tokenizer: ClassVar[bool] = True

  def capacity(self, layout: Layout) -> None:
    return None

  def num_cut(self, rows: Packed, layout: Layout) -> int:
    return _num_cut(rows, layout.encoder_len + (layout.bos_id is not None) - len(layout.read.end), layout.seq_len)

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    prompt, answer = piece.ids[int(layout.bos_id is not None):piece.answer], piece.ids[piece.answer:]
    prompt = cut(prompt, layout.encoder_len - len(layout.read.end), layout)
    decoder = _join([[layout.start_id], answer[:layout.seq_len]])
    return _encode(_join([prompt, layout.read.end]), layout) | lay_out([decoder], None, layout)


@dataclasses.dataclass(frozen=True)
class Pairs(Task):
  """Two texts that belong together, as separate documents: the prompt in tokens, the answer in encoder_tokens.

  Each includes its eos; longer ones are shortened by `cut`.
  """

  needs: ClassVar[str] = 'answers'
  encodes: ClassVar[bool] = True
  whole: ClassVar[bool] = True

  def capacity(self, layout: Layout) -> None:
    return None

  def num_cut(self, rows: Packed, layout: Layout) -> int:
    return _num_cut(rows, layout.seq_len - len(layout.end), layout.encoder_len - (layout.bos_id is not None))

  def check(self, layout: Layout, store: Store) -> None:
    if layout.encoder_len > layout.seq_len:
      raise ConfigError(f'config.data.encoder_len: {layout.encoder_len} must be at most seq_len {layout.seq_len}: in '
                        'task pairs the same model reads both texts')

  def features(self, row: Row, layout: Layout, rng: np.random.Generator) -> Features:
    [piece] = row
    first, second = piece.ids[:piece.answer], piece.ids[piece.answer:]
    if layout.bos_id is not None:
      second = _join([[layout.bos_id], second])
    if layout.eos_id is not None:
      first, second = (x if len(x) and x[-1] == layout.eos_id else _join([x, layout.end]) for x in (first, second))
    first, second = (cut(x, length, layout) for x, length in ((first, layout.seq_len), (second, layout.encoder_len)))
    return read_whole(first, layout) | _encode(second, layout)


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


def _inner(ids: np.ndarray, eos_id: int | None) -> np.ndarray:
  """The ids without the first, which is no target, and without eos at the end."""
  return ids[1:-1] if len(ids) > 1 and ids[-1] == eos_id else ids[1:]


def _join(parts: list) -> np.ndarray:
  return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _padded(x: np.ndarray, length: int) -> np.ndarray:
  result = np.zeros(length, np.int32)
  result[:len(x)] = x
  return result


def _num_cut(rows: Packed, prompt_len: int, answer_len: int) -> int:
  """The number of tokens beyond these lengths, of prompts with their bos and of answers with their eos."""
  prompts = np.maximum(np.asarray(rows.answers), 1)[rows.documents]
  answers = rows.sizes + 1 - prompts
  return int(np.maximum(prompts - prompt_len, 0).sum() + np.maximum(answers - answer_len, 0).sum())


def _encode(ids: np.ndarray, layout: Layout) -> Features:
  return {'encoder_tokens': _padded(ids, layout.encoder_len),
          'encoder_segment_ids': _padded(np.ones(len(ids)), layout.encoder_len)}


def _random_lengths(total: int, num_parts: int, rng: np.random.Generator) -> np.ndarray:
  """`num_parts` random lengths of 1 or more with the sum `total`, uniform over all such splits."""
  cuts = np.sort(rng.choice(total - 1, num_parts - 1, replace=False)) + 1 if num_parts > 1 else np.zeros(0, np.int64)
  return np.diff(np.concatenate([[0], cuts, [total]]))[:num_parts]


for _name, _task in (
    ('fim', FillInTheMiddle), ('prefix_lm', PrefixLM), ('masked_tokens', MaskedTokens),
    ('span_corruption', SpanCorruption), ('seq2seq', Seq2Seq), ('pairs', Pairs), ('classification', Classification),
    ('regression', Regression)):
  register(TASKS, _name, _task)
