"""Stops by SIGTERM, Ctrl-C and SIGHUP: at once while nothing is unsaved, else at a step that all processes agree on."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator

from llm_jax.base.errors import ConfigError, Interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_SECONDS = 15.0  # the most that an end at once may take: a terminal that nobody reads blocks its message

_QUESTIONS = itertools.count(1)  # calls of reached() in this process, over all runs and stages
_WATCHED: list[int] = []  # the signals that a thread handles
_OTHERS: list[bool] = []  # whether this process is about to join others
_EARLY: list[int] = []  # signals of this process before it has joined the others
_ENDS: list[Callable[[], str] | None] = []  # how to end at once, the innermost last; None: a StopSignal is active


def is_program() -> bool:
  """Whether this process is one of our programs, whose signals and exit code are ours; false in a notebook."""
  return bool(_WATCHED) or signal.getsignal(signal.SIGINT) is signal.SIG_DFL


@contextlib.contextmanager
def stopping_at_once(end: Callable[[], str]) -> Iterator[None]:
  """SIGINT, SIGTERM and SIGHUP end the program at once, also while its main thread compiles or reads data.

  Python's handlers would run only after that; so a thread calls `end()`, which cleans up and returns the message. While
  a StopSignal is active, that handles them. Where something else handles SIGINT, as in a notebook, nothing changes.
  """
  watched = contextlib.nullcontext() if _WATCHED or not is_program() else _watching()
  if threading.current_thread() is not threading.main_thread():
    watched = contextlib.nullcontext()
  with watched:
    _ENDS.append(end)
    try:
      yield
    finally:
      _ENDS.pop()


def end_now() -> None:
  """Ends this process with the code of Interrupted, unless a StopSignal is active; called from a thread."""
  end = _ENDS[-1] if _ENDS else None
  if end is None:
    return
  threading.Timer(EXIT_SECONDS, os._exit, [Interrupted.exit_code]).start()
  from llm_jax.base.progress import LINE
  with contextlib.suppress(Exception):
    LINE.clear()
    print(end(), file=sys.stderr, flush=True)
  os._exit(Interrupted.exit_code)


@contextlib.contextmanager
def _watching() -> Iterator[None]:
  """Handles NUMBERS in a thread."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  handled = [number for number in NUMBERS if not (number == signal.SIGHUP and _ignored(number))]

  def watch() -> None:
    forwarded = set[int]()
    while number := os.read(reader, 1):
      if number[0] == signal.SIGHUP:
        leave_terminal()
      if number[0] not in handled or (_ENDS and _ENDS[-1] is None and not _is_distributed()):
        continue
      if not _is_distributed():
        others = '--distributed' in sys.argv or _OTHERS  # they would wait for this process; see `after_joining`
        if others and not _EARLY:
          _EARLY.append(number[0])
          _announce(number[0], 'stopping once all processes have joined')
          if _is_distributed():  # meanwhile
            after_joining()
        else:
          end_now()
      elif number[0] in forwarded:
        os._exit(128 + number[0])
      elif number[0] != signal.SIGTERM:  # JAX has replaced the handler of SIGTERM, which stops all processes together
        forwarded.add(number[0])
        os.kill(os.getpid(), signal.SIGTERM)
        if _ENDS and _ENDS[-1] is None:
          _announce(number[0])
      else:  # it came before JAX handled it
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=watch, daemon=True, name='signals')
  thread.start()
  _WATCHED.extend(handled)
  before = {number: signal.signal(number, lambda number, frame: None) for number in handled}
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  try:
    yield
  finally:
    _WATCHED.clear()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
      signal.signal(number, handler)
    os.close(writer)
    thread.join()
    os.close(reader)


def expect_others() -> None:
  """From now on a signal stops this process after it has joined the others, which wait for it."""
  _OTHERS.append(True)


def after_joining() -> None:
  """Ends all processes of a run if one of them got a signal before it had joined the others."""
  if _EARLY:
    os.kill(os.getpid(), signal.SIGTERM)


class StopSignal:
  """A context manager: after the first SIGTERM, SIGINT or SIGHUP `reached()` is true; a second signal kills at once.

  With jax.distributed, JAX handles SIGTERM and its coordinator picks the step for all processes, so that a signal to
  one process is enough; SIGINT and SIGHUP are forwarded to it (see `stopping_at_once`).
  """

  def __init__(self) -> None:
    self.requested = False
    self._alone = not _is_distributed()

  def __enter__(self) -> StopSignal:
    main = threading.current_thread() is threading.main_thread()  # other threads may not handle signals
    handled = [number for number in NUMBERS if self._alone and main and not (
        number == signal.SIGHUP and _ignored(number))]
    self._before = {number: signal.signal(number, self._handle) for number in handled}
    _ENDS.append(None)
    return self

  def __exit__(self, *exc: object) -> None:
    _ENDS.pop()
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: object) -> None:
    for handled in self._before:
      signal.signal(handled, signal.SIG_DFL)
    self.requested = True
    if number == signal.SIGHUP:
      leave_terminal()
    _announce(number)

  def reached(self) -> bool:
    """Whether to stop now. With several processes each must call this equally often, such as once in each step."""
    # JAX counts calls from 0 and stops at the next count: with step numbers instead, a run resumed at step 100 would
    # miss a signal from before its first step.
    number = next(_QUESTIONS)
    if not self._alone and not self.requested:
      from jax.experimental import multihost_utils
      self.requested = multihost_utils.reached_preemption_sync_point(number)
    return self.requested


def stop_after(duration: str | None) -> None:
  """Sends SIGTERM to this process after a duration such as '3h50m', '90m' or '45s'. Raises ConfigError."""
  if duration is None:
    return
  found = re.fullmatch(r'(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?', duration)
  seconds = sum(int(part or 0) * size for part, size in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
  if not seconds:
    raise ConfigError(f'--stop_after: must be a duration such as 3h50m, 90m or 45s; got {duration!r}')

  def stop() -> None:
    os.write(2, f'\n--stop_after={duration} is reached'.encode())
    os.kill(os.getpid(), signal.SIGTERM)

  timer = threading.Timer(seconds, stop)
  timer.daemon = True
  timer.start()


def leave_terminal() -> None:
  """After SIGHUP the terminal is gone: what goes to it is dropped, as a failed write would end the run."""
  null = os.open(os.devnull, os.O_WRONLY)
  for fd in (1, 2):
    with contextlib.suppress(OSError):
      if stat.S_ISCHR(os.fstat(fd).st_mode):
        os.dup2(null, fd)


def _ignored(number: signal.Signals) -> bool:
  """Whether a signal was ignored when the process started, as nohup does."""
  return signal.getsignal(number) is signal.SIG_IGN


def _is_distributed() -> bool:
  joined = getattr(sys.modules.get('jax._src.distributed'), 'global_state', None)
  # It has a manager once JAX handles SIGTERM.
  return joined is not None and joined.preemption_sync_manager is not None


def _announce(number: int, what: str = 'saving, then stopping') -> None:
  name = signal.Signals(number).name
  # Not by print: the signal may interrupt a write to the live line of base/progress.py, whose lock would be held.
  with contextlib.suppress(OSError):
    os.write(2, f'\n{name}: {what} (repeat it to stop at once)\n'.encode())
