"""Tasks on plain text: fill-in-the-middle, prefix LM and masked tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import register
from llm_jax.data.rows.rows import PACKINGS, Row, Store
from llm_jax.data.rows.tasks import TASKS, Features, Layout, Task, from_point, lay_out


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
    text = inner(ids, layout.eos_id)
    if rng.random() >= self.rate or not len(text):
      return ids
    a, b = np.sort(rng.integers(0, len(text) + 1, 2))
    before, after, between = ([layout.vocab_size + k] for k in range(3))
    prefix, middle, suffix, end = text[:a], text[a:b], text[b:], ids[1 + len(text):]
    if rng.random() < self.spm_rate:
      parts = [ids[:1], before, after, suffix, between, prefix, middle, end]
    else:
      parts = [ids[:1], before, prefix, after, suffix, between, middle, end]
    return join(parts)


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
    return features | {'prefix_mask': padded(np.concatenate(inside), layout.seq_len)}


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


def inner(ids: np.ndarray, eos_id: int | None) -> np.ndarray:
  """The ids without the first, which is no target, and without eos at the end."""
  return ids[1:-1] if len(ids) > 1 and ids[-1] == eos_id else ids[1:]


def join(parts: list) -> np.ndarray:
  return np.concatenate([np.asarray(part, np.int32) for part in parts])


def padded(x: np.ndarray, length: int) -> np.ndarray:
  result = np.zeros(length, np.int32)
  result[:len(x)] = x
  return result


register(TASKS, 'fim', FillInTheMiddle)
register(TASKS, 'prefix_lm', PrefixLM)
register(TASKS, 'masked_tokens', MaskedTokens)
