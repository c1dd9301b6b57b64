"""Augmentation: what a model reads is disturbed, what it must predict is not. Off by default."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Augment:
  jitter: bool = False  # of packing concat: each window begins up to half a row earlier or later
  token_dropout: float = 0.0  # share of the tokens read that become bos, which tells nothing (arXiv 1511.06349)
  token_replace: float = 0.0  # share of the tokens read that become any other

  def __post_init__(self):
    if min(self.token_dropout, self.token_replace) < 0 or self.token_dropout + self.token_replace > 1:
      raise ValueError('token_dropout and token_replace must not be negative, nor their sum more than 1; '
                       f'got {self.token_dropout} and {self.token_replace}')

  @property
  def random(self) -> bool:
    return self.jitter or self.token_dropout + self.token_replace > 0


def jittered(begin: int, seq_len: int, num_targets: int, rng: np.random.Generator) -> int:
  """Where a window from `begin` begins instead; it stays inside the store."""
  shift = int(rng.integers(-(seq_len // 2), seq_len - seq_len // 2))
  return min(max(0, begin + shift), max(0, num_targets - seq_len))


def disturbed(tokens: np.ndarray, real: np.ndarray, augment: Augment, vocab_size: int, blank_id: int,
              rng: np.random.Generator) -> np.ndarray:
  """Tokens with some of the `real` ones dropped or replaced; sentinels, from `vocab_size` on, stay."""
  draw = np.where(real & (tokens < vocab_size), rng.random(len(tokens)), 1.0)
  others = rng.integers(vocab_size, size=len(tokens), dtype=np.int32)
  replaced = np.where(draw < augment.token_dropout + augment.token_replace, others, tokens)
  return np.where(draw < augment.token_dropout, np.int32(blank_id), replaced)
