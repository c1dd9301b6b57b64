"""The steps whose update was not applied: counted, reported, and too many of them in a row are an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llm_jax.base.errors import DivergedError
from llm_jax.optim.guard import LARGEST

MAX_SKIPPED = 20  # steps in a row


class Skips:
  """`doubtful`: the newest step could not be applied as a number was not finite, so the weights may be the cause.

  `late`: a save was put off for that.
  """

  def __init__(self, say: Callable[[str], None]):
    self._say, self._in_a_row, self._new = say, 0, 0
    self.doubtful = self.late = False

  def add(self, step: int, values: Mapping[str, float]) -> None:
    """Notes the metrics of a step. Raises DivergedError after MAX_SKIPPED skipped steps in a row."""
    skipped, spike = bool(values['skipped']), bool(values.get('spike'))
    self._in_a_row, self._new = self._in_a_row + 1 if skipped else 0, self._new + skipped
    self.doubtful = skipped and not spike
    what = f'of a loss or gradient norm that is a spike (score {values["spike_score"]:.1f})' if spike else (
        f'whose loss or gradient is not finite (or its norm above {LARGEST ** 0.5:.0e})')
    if self._in_a_row == 1:
      self._say(f'WARNING: step {step}: an update {what} is skipped')
    if self._in_a_row >= MAX_SKIPPED:
      raise DivergedError(f'the updates of steps {step - MAX_SKIPPED + 1} to {step} were not applied, the last one '
                          f'{what}; lower config.optim.learning_rate, or inspect these steps: llm-jax debug-nan --help')

  def take(self) -> float:
    """The number of steps skipped since the last call."""
    number, self._new = self._new, 0
    return float(number)

  def allow_save(self, step: int, end: int) -> bool:
    """Whether `step` may be saved: not while its weights are doubtful.

    The step `end`, which no step follows, is saved with the weights before it. Raises DivergedError for it if the
    updates of several steps before it were skipped too.
    """
    if self.doubtful and step == end and self._in_a_row > 1:
      raise DivergedError(f'the updates of the last {self._in_a_row} steps, up to step {step}, were not applied, so it '
                          'is not saved; the newest checkpoint is an earlier one; lower config.optim.learning_rate')
    if self.doubtful and not self.late:
      self._say(f'WARNING: the update of step {step}, the last one, was skipped; it is saved with the weights before'
                if step == end else
                f'step {step} is not saved, as its update was skipped; the next step that is applied will be')
    self.late = self.doubtful and step != end
    return not self.late
