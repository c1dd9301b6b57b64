"""The current training step, for modules whose behaviour depends on it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_STEP: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar('step', default=None)


@contextlib.contextmanager
def clock_at(step: jax.Array | None) -> Iterator[None]:
  """Sets the step, int32 [], for everything traced inside; None means outside training."""
  token = _STEP.set(step)
  try:
    yield
  finally:
    _STEP.reset(token)


def progress(num_steps: int) -> jax.Array | float:
  """The completed share, 0 to 1, of a warm-up of `num_steps`; 1 outside training."""
  step = _STEP.get()
  return 1.0 if step is None or not num_steps else jax.numpy.minimum(1.0, step / num_steps)
