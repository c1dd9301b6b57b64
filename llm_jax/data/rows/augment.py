"""Augmentation: random changes to the input tokens; targets stay the same. Off by default."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Augment:
  jitter: bool = False  # needs packing concat: each window starts up to half a row earlier or later
  token_dropout: float = 0.0  # share of input tokens replaced by bos (arXiv 1511.06349)
  token_replace: float = 0.0  # share of input tokens replaced by a random token

  def __post_init__(self) -> None:
    if min(self.token_dropout, self.token_replace) < 0 or self.token_dropout + self.token_replace > 1:
      raise ValueError('token_dropout and token_replace must be 0 or more, and their sum at most 1; '
                       f'got {self.token_dropout} and {self.token_replace}')

  @property
  def random(self) -> bool:
    return self.jitter or self.token_dropout + self.token_replace > 0


def jittered(begin: int, seq_len: int, num_targets: int, rng: np.random.Generator) -> int:
  """A random start near `begin` for a window; the window stays inside the store."""
  shift = int(rng.integers(-(seq_len // 2), seq_len - seq_len // 2))
  return min(max(0, begin + shift), max(0, num_targets - seq_len))


def disturbed(tokens: np.ndarray, real: np.ndarray, augment: Augment, vocab_size: int, blank_id: int,
              rng: np.random.Generator) -> np.ndarray:
  """Tokens with some of the `real` ones dropped or replaced; sentinels (ids from `vocab_size` on) stay."""
  draw = np.where(real & (tokens < vocab_size), rng.random(len(tokens)), 1.0)
  others = rng.integers(vocab_size, size=len(tokens), dtype=np.int32)
  replaced = np.where(draw < augment.token_dropout + augment.token_replace, others, tokens)
  return np.where(draw < augment.token_dropout, np.int32(blank_id), replaced)
