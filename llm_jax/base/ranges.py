"""Fields of dataclasses that declare the range of their values: `b1: float = rate(0.9)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


class Ranged:
  """The base class of dataclasses whose fields declare ranges; they are checked after __init__, None excepted."""

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      holds, words = field.metadata.get('range', (None, ''))
      value = getattr(self, field.name)
      if holds is None or value is None:
        continue
      for i, x in enumerate(value if isinstance(value, tuple) else (value,)):
        if not holds(x):
          raise ValueError(f'{field.name}{f"[{i}]" if isinstance(value, tuple) else ""} must be {words}; got {x}')


def ranged(default: Any, holds: Callable[[Any], bool], words: str) -> Any:
  """A dataclass field whose value, or each entry of a tuple, must fulfil `holds`; `words` describe the range."""
  return dataclasses.field(default=default, metadata={'range': (holds, words)})


def at_least(least: float, default: Any) -> Any:
  return ranged(default, lambda x: x >= least, f'at least {least}')


def positive(default: Any) -> Any:
  return ranged(default, lambda x: x > 0, 'positive')


def within(least: float, most: float, default: Any) -> Any:
  return ranged(default, lambda x: least <= x <= most, f'from {least:g} to {most:g}')


def decay(default: Any) -> Any:
  """A field for a weight decay. A larger one would make weights explode: float32 ends at 3e38."""
  return within(0, 1000, default)


def epsilon(default: Any) -> Any:
  """A field for a number that is added to a denominator; a smaller one would be 0 in float32."""
  return within(1e-30, 1, default)


def rate(default: Any) -> Any:
  """A field for a decay rate."""
  return ranged(default, lambda x: 0 <= x < 1, 'in [0, 1)')


def share(default: Any) -> Any:
  return ranged(default, lambda x: 0 <= x <= 1, 'in [0, 1]')
