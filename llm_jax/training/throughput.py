"""The time of a run: tokens per second, shares of steps and overheads, and the time left."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import UserError

_compiled = [0.0]  # seconds that JAX has spent on compiling in this process


def _note_compiling(event: str, duration_secs: float, **_: Any) -> None:
  if event == '/jax/core/compile/backend_compile_duration':
    _compiled[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_note_compiling)


def work_left(step: int, num_steps: int, eval_every: int, save_every: int) -> dict[str, int]:
  """How many steps, evaluations and saves without an evaluation follow after `step`; 0: no evaluations."""
  def multiples(every: int) -> int:
    return num_steps // every - step // every

  def with_last(every: int) -> int:
    return multiples(every) + (num_steps % every > 0)

  if step >= num_steps:
    return {'step': 0, 'evaluation': 0, 'save': 0}
  if not eval_every:
    return {'step': num_steps - step, 'evaluation': 0, 'save': with_last(save_every)}
  saves = multiples(save_every) - multiples(math.lcm(eval_every, save_every))
  alone = saves - (num_steps % save_every == 0 and num_steps % eval_every > 0)  # the last step is evaluated too
  return {'step': num_steps - step, 'evaluation': with_last(eval_every), 'save': alone}


class TimeLeft:
  """Estimates the rest of a run from what its steps and pauses took so far; has no clock of its own.

  Newer durations count more. The first of a kind includes tracing, so it counts only until there is a second.
  """

  def __init__(self) -> None:
    self._sums: dict[str, tuple[float, float]] = {}  # kind -> (weighted sum of seconds, sum of weights)
    self._single = set[str]()

  def add(self, kind: str, seconds: float) -> None:
    total, weight = self._sums.get(kind, (0.0, 0.0))
    if kind in self._single:
      total = weight = 0.0
    (self._single.discard if kind in self._sums else self._single.add)(kind)
    self._sums[kind] = 0.9 * total + seconds, 0.9 * weight + 1

  def seconds(self, work: Mapping[str, int]) -> float | None:
    """Seconds for so many of each kind; None until a step was timed. A kind not seen yet counts as nothing."""
    if 'step' not in self._sums:
      return None
    means = {kind: total / weight for kind, (total, weight) in self._sums.items()}
    return sum(count * means.get(kind, 0.0) for kind, count in work.items())


class Throughput:
  """Tokens per second, MFU and the share of time spent waiting for data, over the steps since the last `take`."""

  def __init__(self, flops_per_token: float, peak: float | None,
               work: Callable[[int], dict[str, int]] = lambda step: {'step': 0}):
    """`work(step)`: the steps and pauses that follow after `step`."""
    self._flops_per_token, self._peak, self._work = flops_per_token, peak, work
    self._tokens = self._seconds = self._waited = self._away = 0.0
    self._steps = 0
    self._start: float | None = None
    self._compiled = 0.0  # _compiled when the last step was done
    self._time_left = TimeLeft()

  def restart(self, pause: str = '') -> None:
    """Restarts the clock of the current step after a `pause`: an 'evaluation', a 'save', or '' for anything else."""
    now = time.perf_counter()
    if pause and self._start is not None:
      self._time_left.add(pause, max(0.0, now - self._start - self._away - (_compiled[0] - self._compiled)))
    self._start, self._away = now, 0.0

  def waited(self, seconds: float) -> None:
    self._waited += seconds

  def away(self, seconds: float) -> None:
    """Seconds that the caller held the generator during this step."""
    self._away += seconds

  def step_done(self, num_tokens: float) -> None:
    now = time.perf_counter()
    if self._start is None:  # the first step includes compiling and is not counted
      self._waited = 0.0
      return
    seconds, away = now - self._start, self._away
    ACTIVITY.step_took(seconds, away)
    self._start, self._away, self._compiled = now, 0.0, _compiled[0]
    if away > 0.1 * seconds:  # the step may have ended while the caller had control, so its time is unknown
      return
    self._seconds += seconds
    self._tokens += num_tokens
    self._steps += 1

  def seconds_left(self, step: int) -> float | None:
    """An estimate of the time from `step` to the end of the run; None until a step was timed."""
    return self._time_left.seconds(self._work(step))

  def take(self) -> dict[str, float]:
    if not self._steps or not self._seconds:
      return {}
    tokens_per_second = self._tokens / self._seconds
    seconds_per_step = self._seconds / self._steps
    self._time_left.add('step', seconds_per_step)
    values = {'tokens_per_second': tokens_per_second, 'seconds_per_step': seconds_per_step,
              'data_wait': min(1.0, self._waited / self._seconds)}
    if self._peak:
      values['mfu'] = tokens_per_second * self._flops_per_token / self._peak
    self._tokens = self._seconds = self._waited = 0.0
    self._steps = 0
    return values


class Goodput:
  """Shares of a run's time: steps, and overheads by kind; `caller` is the code that iterates over the run."""

  def __init__(self) -> None:
    self._begin = time.perf_counter()
    self._seconds = dict.fromkeys(('start', 'compile', 'data', 'evaluation', 'save', 'caller'), 0.0)

  def starting(self) -> None:
    """Marks the start of a stage: the time until its first step is done counts as start, or as compile."""
    self._compiled = _compiled[0]
    self._stage, self._before = time.perf_counter(), sum(self._seconds.values())
    ACTIVITY.enter('start')

  def started(self) -> None:
    ACTIVITY.enter('step')
    compiling, others = _compiled[0] - self._compiled, sum(self._seconds.values()) - self._before
    self.add('compile', compiling)
    self.add('start', max(0.0, time.perf_counter() - self._stage - others - compiling))

  def ending(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
    """Marks the end of a stage, which closes its logs and no longer needs the other processes.

    After an error, which the loss of another process may be, a save in progress still waits for that process.
    """
    if error is None or isinstance(error, UserError | GeneratorExit):
      ACTIVITY.enter('end')

  def add(self, kind: str, seconds: float) -> None:
    self._seconds[kind] += seconds

  @contextlib.contextmanager
  def of(self, kind: str) -> Iterator[None]:
    begin, counted = time.perf_counter(), self.counted
    try:
      with ACTIVITY.during(kind):
        yield
    finally:
      self.add_rest(kind, begin, counted)

  @property
  def counted(self) -> float:
    """The seconds of all overheads so far."""
    return sum(self._seconds.values())

  def add_rest(self, kind: str, begin: float, counted: float) -> None:
    """Adds the time since `begin`, without what was counted as something else since then, when it was `counted`."""
    self.add(kind, max(0.0, time.perf_counter() - begin - (self.counted - counted)))

  def shares(self) -> dict[str, float]:
    total = time.perf_counter() - self._begin
    shares = {f'goodput/{kind}': min(1.0, seconds / total) for kind, seconds in self._seconds.items()}
    return {'goodput/step': max(0.0, 1 - sum(shares.values())), **shares}
