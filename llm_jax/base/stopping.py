"""Stops by SIGTERM and Ctrl-C: at once before the first step, then at a step that all processes of a run agree on."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from llm_jax.base.errors import Interrupted
from llm_jax.base.progress import LINE

_QUESTIONS = itertools.count(1)  # calls of reached() in this process, over all runs and stages


@contextlib.contextmanager
def stopping_at_once(begun: Callable[[], bool], end: Callable[[], str]) -> Iterator[None]:
  """Until `begun()`, SIGINT and SIGTERM end a program at once, also while its main thread compiles or reads data.

  Python's handlers would run only after that; so a thread calls `end()`, which cleans up and returns the message. Where
  something else handles SIGINT, as in a notebook or for several processes, nothing changes.
  """
  if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
    yield
    return
  numbers = (signal.SIGINT, signal.SIGTERM)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch() -> None:
    while number := os.read(reader, 1):
      if number[0] in numbers and not begun():
        threading.Timer(5, os._exit, [Interrupted.exit_code]).start()  # a terminal that nobody reads blocks the message
        LINE.clear()
        print(end(), file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_code)

  def handle(number: int, frame: object) -> None:
    if begun():
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  before = {number: signal.signal(number, handle) for number in numbers}
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  try:
    yield
  finally:
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(writer)
    thread.join()
    os.close(reader)


class StopSignal:
  """A context manager: after the first SIGTERM or SIGINT `reached()` is true; a second signal kills at once.

  With jax.distributed, JAX handles SIGTERM and its coordinator picks the step for all processes, so that a signal to
  one process is enough; see `interrupt_all` for Ctrl-C.
  """

  def __init__(self) -> None:
    self.requested = False
    self._alone = not jax.distributed.is_initialized()

  def __enter__(self) -> StopSignal:
    main = threading.current_thread() is threading.main_thread()  # other threads may not handle signals
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
    """Whether to stop after this step. With several processes each must call this at every step."""
    # JAX counts calls from 0 and stops at the next count: with step numbers instead, a run resumed at step 100 would
    # miss a signal from before its first step.
    number = next(_QUESTIONS)
    return self.requested if self._alone else multihost_utils.reached_preemption_sync_point(number)


def interrupt_all(number: int, frame: object) -> None:
  """Handles Ctrl-C in one of several processes: sends SIGTERM, which stops all of them together."""
  signal.signal(number, signal.SIG_DFL)
  os.kill(os.getpid(), signal.SIGTERM)
  _announce(number)


def _announce(number: int) -> None:
  name = signal.Signals(number).name
  # Not by print: the signal may interrupt a write to the live line of base/progress.py, whose lock would be held.
  with contextlib.suppress(OSError):
    os.write(2, f'\n{name}: saving, then stopping (repeat it to stop at once)\n'.encode())
