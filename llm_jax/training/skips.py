"""The steps whose update was not applied: counted, reported, and too many of them in a row are an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.base.errors import DivergedError
from llm_jax.optim.guard import LARGEST, unsound

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

  def allow_save(self, step: int, end: int, state: Mapping[str, Any]) -> bool:
    """Whether `step` may be saved: not while its weights are doubtful.

    Raises DivergedError for the step `end`, which no step follows, and for a state with values that are not finite.
    """
    if self.doubtful and step == end:
      raise DivergedError(f'the update of the last step, {step}, was skipped as its loss or gradient is not finite; it '
                          'is not saved, so the newest checkpoint is an earlier one: end at another step')
    if self.doubtful and not self.late:
      self._say(f'step {step} is not saved, as its update was skipped; the next step that is applied will be')
    self.late = self.doubtful
    if not self.doubtful and (bad := unsound(state)):
      raise DivergedError(f'step {step} is not saved: {len(bad)} array(s) have values that are not finite or above '
                          f'{LARGEST:.0e}: {", ".join(bad[:4])}; the newest checkpoint is that of an earlier step; '
                          'lower config.optim.learning_rate')
    return not self.doubtful
