"""Work that takes long: in a terminal one live line on stderr, elsewhere plain lines every 10 seconds.

The live line shows the innermost task that is open. What is printed meanwhile appears above it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from rich import filesize
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from llm_jax.base.activity import ACTIVITY

PLAIN_SECONDS = 10.0  # between the lines of a task where there is no terminal
BAR_WIDTH, NARROW = 20, 60  # in a terminal of fewer columns there is no bar


def is_terminal() -> bool:
  """Whether stderr can show a live line."""
  return sys.stderr.isatty() and os.environ.get('TERM') not in ('dumb', 'unknown')


def duration(seconds: float) -> str:
  """Seconds as '1:02:03' or '2:03'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class Progress:
  """Something that takes long, shown until it is closed: with a bar if its `total` is known, else with its time.

  `note` replaces the amount, rate and time beside the bar. A task that is not `shown` displays nothing.
  """

  def __init__(self, name: str, total: float | None = None, unit: str = '', initial: float = 0, *,
               shown: bool = True):
    self.name, self.total, self.unit, self.n, self.note = name, total, unit, initial, ''
    self._initial, self._shown = initial, shown
    self._begin = self._printed = time.monotonic()
    self._spinner = Spinner('dots')
    ACTIVITY.sign()
    if shown:
      LINE.open(self)

  def update(self, amount: float) -> None:
    self.n += amount
    ACTIVITY.sign()
    if self._shown and not LINE.live and time.monotonic() > self._printed + PLAIN_SECONDS:
      self._printed = time.monotonic()
      print(f'{self.name}: {self._progress()}', file=sys.stderr, flush=True)

  def close(self) -> None:
    ACTIVITY.sign()
    LINE.close(self)

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
    bar = ProgressBar(self.total, self.n, width=BAR_WIDTH) if self.total else self._spinner
    cells = [Text(self.name), *([bar] if options.max_width >= NARROW or not self.total else [])]
    note, taken = Text(self.note or self._progress()), sum(terminal.measure(cell).maximum + 1 for cell in cells)
    note.truncate(max(1, options.max_width - taken), overflow='ellipsis')
    line = Table.grid(padding=(0, 1))
    for _ in (*cells, note):
      line.add_column(no_wrap=True, overflow='ellipsis')
    line.add_row(*cells, note)
    yield line

  def _progress(self) -> str:
    """'1.2/3.4 MB  0.5 MB/s  0:04 left', or the time that has passed."""
    passed = time.monotonic() - self._begin
    if not self.n:
      return duration(passed)
    amount = self._amount(self.n) + (f'/{self._amount(self.total)}' if self.total else '')
    rate = (self.n - self._initial) / max(passed, 1e-3)
    left = f'  {duration((self.total - self.n) / rate)} left' if self.total and rate else ''
    return f'{amount}  {self._amount(rate)}/s{left}'

  def _amount(self, value: float) -> str:
    return filesize.decimal(int(value)) if self.unit == 'B' else f'{value:,.0f}{self.unit and " " + self.unit}'


class Terminal(Console):
  """A terminal whose cursor stays visible: a program that a signal kills could not show it again."""

  def show_cursor(self, show: bool = True) -> bool:
    return False


class LiveLine:
  """The last line of the terminal, which belongs to the newest of the open tasks."""

  def __init__(self) -> None:
    self._tasks: list[Progress] = []
    self._live: Live | None = None
    self._lock = threading.RLock()

  @property
  def live(self) -> bool:
    return self._live is not None

  def open(self, task: Progress) -> None:
    with self._lock:
      self._tasks.append(task)
      if self._live is None and is_terminal():
        # Long lines are left to the terminal to wrap, so that paths and commands can be copied. Only what goes to a
        # terminal is moved above the live line; a redirected stdout remains as it is.
        terminal = Terminal(file=sys.stderr, force_jupyter=False, force_terminal=True, soft_wrap=True, highlight=False,
                            markup=False, emoji=False)
        self._live = Live(get_renderable=self._newest, console=terminal, transient=True,
                          redirect_stdout=sys.stdout.isatty())
        self._live.start()

  def close(self, task: Progress) -> None:
    with self._lock:
      if task in self._tasks:
        self._tasks.remove(task)
      if not self._tasks and self._live is not None:
        self._live.stop()
        self._live = None

  def clear(self) -> None:
    """Removes the line for good, as before the program exits."""
    with self._lock:
      for task in list(self._tasks):
        self.close(task)

  def _newest(self) -> Any:
    return self._tasks[-1] if self._tasks else ''


LINE = LiveLine()


def progress_bar(name: str, total: float | None, unit: str, initial: float = 0) -> Progress:
  """A task with an amount, rate and time left."""
  return Progress(name, total, unit, initial)
