"""Scalings of rotary frequencies, by which a model reads rows longer than those that it was first trained on.

A scaling maps (frequencies [dim/2], base, positions [B, T]) to (frequencies, factor of sine and cosine).
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.ranges import Ranged, at_least
from llm_jax.base.registry import NoSettings, Registry, register

Scaled = tuple[jax.Array, float]


def unscaled(frequencies: jax.Array, base: float, positions_BT: jax.Array) -> Scaled:
  return frequencies, 1.0


@dataclasses.dataclass(frozen=True)
class Linear(Ranged):
  """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

  factor: float = at_least(1, 1.0)  # how many times longer rows are than those of the first training

  def __call__(self, frequencies: jax.Array, base: float, positions_BT: jax.Array) -> Scaled:
    return frequencies / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3(Ranged):
  """Long wavelengths divided by `factor`, short ones kept, a blend between (Llama 3.1, arXiv 2407.21783)."""

  factor: float = at_least(1, 8.0)  # of long wavelengths
  low_freq_factor: float = at_least(0, 1.0)  # wavelengths beyond original_max_len / low_freq_factor are long
  high_freq_factor: float = at_least(0, 4.0)  # wavelengths below original_max_len / high_freq_factor are short
  original_max_len: int = at_least(1, 8192)  # tokens of the rows of the first training

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.high_freq_factor <= self.low_freq_factor:
      raise ValueError(f'high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}')

  def __call__(self, frequencies: jax.Array, base: float, positions_BT: jax.Array) -> Scaled:
    turns = self.original_max_len * frequencies / (2 * math.pi)  # of the pair over a row of the first training
    kept = jnp.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Yarn(Ranged):
  """Slow pairs divided by `factor`, fast ones kept, a ramp between; sharper attention (YaRN, arXiv 2309.00071)."""

  factor: float = at_least(1, 4.0)  # of the wavelengths of slow pairs
  original_max_len: int = at_least(1, 4096)  # tokens of the rows of the first training
  beta_fast: float = at_least(0, 32.0)  # pairs that turn more often over such a row are kept
  beta_slow: float = at_least(0, 1.0)  # pairs that turn less often are divided by the factor
  attention_factor: float | None = None  # of sine and cosine; None: 0.1 ln(factor) + 1, or by both mscale
  mscale: float = at_least(0, 0.0)  # 0: unset
  mscale_all_dim: float = at_least(0, 0.0)  # 0: unset
  truncate: bool = True  # whether the ramp begins and ends at whole pairs

  def __call__(self, frequencies: jax.Array, base: float, positions_BT: jax.Array) -> Scaled:
    half = len(frequencies)
    low, high = (half * math.log(self.original_max_len / (turns * 2 * math.pi)) / math.log(base)
                 for turns in (self.beta_fast, self.beta_slow))  # the pairs that turn so often
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    divided = np.clip((np.arange(half) - low) / ((high - low) or 0.001), 0, 1).astype(np.float32)
    return frequencies * (1 - divided) + frequencies / self.factor * divided, self.magnitude

  @property
  def magnitude(self) -> float:
    """The factor of sine and cosine."""
    def scale(mscale: float) -> float:
      return 0.1 * mscale * math.log(self.factor) + 1

    if self.attention_factor is not None:
      return self.attention_factor
    return scale(self.mscale) / scale(self.mscale_all_dim) if self.mscale and self.mscale_all_dim else scale(1)


@dataclasses.dataclass(frozen=True)
class Dynamic(Ranged):
  """A base that grows with the longest row (dynamic NTK), as transformers has it; none for rows up to
  original_max_len."""

  factor: float = at_least(1, 1.0)  # how many times longer rows are than those of the first training
  original_max_len: int = at_least(1, 2048)  # tokens

  def __call__(self, frequencies: jax.Array, base: float, positions_BT: jax.Array) -> Scaled:
    half = len(frequencies)
    length = jnp.maximum(jnp.max(positions_BT) + 1, self.original_max_len).astype(jnp.float32)
    grown = (self.factor * length / self.original_max_len - (self.factor - 1)) ** (half / (half - 1))  # of the base
    return frequencies * grown ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0


# Called as ROPE_SCALINGS[name](settings)(frequencies, base, positions).
ROPE_SCALINGS = Registry('rope_scaling')
register(ROPE_SCALINGS, 'none', lambda settings: unscaled, NoSettings)
for _name, _kind in (('rope_linear', Linear), ('rope_llama3', Llama3), ('rope_yarn', Yarn), ('rope_dynamic', Dynamic)):
  register(ROPE_SCALINGS, _name, lambda settings: settings, _kind)
