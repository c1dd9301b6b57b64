"""Event: what callbacks and callers get of a logged step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NoReturn

from llm_jax.base.errors import ConfigError
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

  def rewind(self, steps: int, why: str) -> NoReturn:
    """Goes back to the newest checkpoint that is at least `steps` older than this step; without one, to the oldest.

    The batches that were used since are left out. All processes must call this at the same step. `why` is printed and
    kept in the journal (rewind.py). Raises ConfigError for data that cannot be left out, ValueError for steps below 1.
    """
    if steps < 1:
      raise ValueError(f'steps must be at least 1; got {steps}')
    if not self.session.program.data.train:
      raise ConfigError('a rewind needs data that are kept in a store: a stream, or batches passed from Python, cannot '
                        'leave batches out')
    raise Rewind(self, steps, why)


class Rewind(Exception):
  """Leaves the training of a stage, for rewind.go_back; a callback must not catch it.

  `at`: the newest step that was dispatched; `newest`: the newest step to go back to.
  """

  def __init__(self, event: Event, steps: int, why: str):
    super().__init__(why)
    session = event.session
    self.at, self.newest, self.stage, self.stop = session.step, event.step - steps, session.program.stage, session.stop
