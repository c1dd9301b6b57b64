"""Leaving in good order: SIGTERM and Ctrl-C end a run at a step that all its processes agree on."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

_QUESTIONS = itertools.count(1)  # of a process, whatever runs or stages it does


class StopSignal:
  """A context manager that turns the first SIGTERM or SIGINT into `reached()`; a second one kills at once.

  Once jax.distributed is up it hears SIGTERM itself, and its coordinator picks the step for all processes, so that
  one notified process is enough; see `interrupt_all` for Ctrl-C.
  """

  def __init__(self) -> None:
    self.requested = False
    self._alone = not jax.distributed.is_initialized()

  def __enter__(self) -> StopSignal:
    main = threading.current_thread() is threading.main_thread()  # no other one may handle signals
    handled = (signal.SIGINT, signal.SIGTERM) if self._alone and main else ()
    self._before = {number: signal.signal(number, self._handle) for number in handled}
    return self

  def __exit__(self, *exc: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: object) -> None:
    for handled in self._before:
      signal.signal(handled, signal.SIG_DFL)
    self.requested = True
    _announce(number)

  def reached(self) -> bool:
    """Whether to stop after this step. With several processes every one must ask at every step."""
    # jax counts from 0 and stops at the next count: asked by step number, a run that goes on from step 100 would never
    # hear of a signal that came before its first step.
    number = next(_QUESTIONS)
    return self.requested if self._alone else multihost_utils.reached_preemption_sync_point(number)


def interrupt_all(number: int, frame: object) -> None:
  """A handler of Ctrl-C for one of several processes, which may not leave alone: SIGTERM, for all of them."""
  signal.signal(number, signal.SIG_DFL)
  os.kill(os.getpid(), signal.SIGTERM)
  _announce(number)


def _announce(number: int) -> None:
  name = signal.Signals(number).name
  print(f'\n{name}: saving, then leaving (once more: leave at once)', file=sys.stderr, flush=True)
