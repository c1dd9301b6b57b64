"""Event: what callbacks and callers get of a logged step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llm_jax.infer.load import Loaded

if TYPE_CHECKING:
  from llm_jax.training.session import Session


@dataclasses.dataclass(frozen=True)
class Event:
  """A logged step, and operations on the run before it continues."""

  step: int
  metrics: dict[str, float]  # 'train/loss', and 'val/loss' if the step was evaluated
  session: Session

  def validate(self) -> dict[str, float]:
    """Evaluates the current weights on the validation part: {'val/loss': ...}."""
    return self.session.measure()

  def save(self) -> None:
    """Writes a checkpoint now and waits until it is complete on disk."""
    self.session.save_now()

  def read(self) -> Loaded:
    """The model with a copy of its current weights."""
    return self.session.read()

  def status(self) -> dict[str, Any]:
    return dict(self.session.status.values)

  def stop(self) -> None:
    """Saves and ends the run after this step, as a signal does; it can be resumed."""
    self.session.stop.requested = True
