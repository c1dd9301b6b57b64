"""Watches the progress of all processes of a run, and ends them together where one is stuck, stopped or lost.

Each process has a thread that writes a report to the run's folder every BEAT seconds (base/reports.py). Process 0
reads all reports, the others read that of process 0. All durations are monotonic.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from llm_jax.base.activity import ACTIVITY, STEPS
from llm_jax.base.errors import Interrupted, LostError, StorageError, UserError
from llm_jax.base.hosts import durations, slowdown, step_times
from llm_jax.base.lock import LOCK
from llm_jax.base.progress import LINE
from llm_jax.base.reports import (
  FOLDER,
  ORDER,
  prepare_reports,
  read_report,
  remove_reports,
  still_exists,
  this_process,
  write_report,
)
from llm_jax.base.stopping import end_now, is_program

# Seconds without a sign of progress, by phase; times config.watchdog. A callback or the code that iterates over a run
# is the user's; 'start' includes reading data and checkpoints, whose progress counts.
LIMITS = {'start': 3600.0, 'compile': 3600.0, 'data': 300.0, 'evaluation': 1800.0, 'save': 1800.0, 'end': 1800.0,
          'callback': 600.0, 'caller': float('inf')}
# A step may take the larger of these seconds and this many median steps; with two beats, all have ended within 60 s.
STEP_SECONDS, STEP_MEDIANS = 55.0, 10.0
SLOW = 1.2  # a process whose steps would take so many times those of the others is named
BEAT = 2.0
SILENT = 16.0  # a process without a new report for so long is stopped or dead
GRACE = 8.0  # for a process to end after another one
NOTICE = 'RECEIVED_PREEMPTION_NOTICE'  # JAX stores the time of a SIGTERM to any process under this key
LOST_PEER = re.compile('gloo|nccl|connection|socket|unavailable|peer|coordination|heartbeat|aborted', re.IGNORECASE)


class Watchdog:
  """A context manager of one process of a run. `factor` multiplies the limits; 0: nothing is ended.

  `failed(reason)` is called on process 0 before it ends the run; `token` names the launch.
  """

  def __init__(self, workdir: Path, index: int, count: int, token: str, *, factor: float,
               failed: Callable[[str], None] = lambda reason: None):
    self._folder, self._index, self._count, self._token = workdir / FOLDER, index, count, token
    self._factor, self._failed = factor if is_program() else 0.0, failed
    self._stop, self._lock = threading.Event(), threading.Lock()
    self._number, self._left = 0, ''
    self._gone = 0  # beats in a row without the folder
    self._seen: dict[int, tuple[dict[str, Any], float]] = {}  # the newest report of each process and when it was new
    self._left_at: dict[int, float] = {}
    self._thread = threading.Thread(target=self._run, daemon=True, name='watchdog')
    self._poller = threading.Thread(target=self._poll_coordinator, daemon=True, name='coordinator') if (
        count > 1 and 'jax' in sys.modules) else None
    self._slow, self._first_step = set[int](), -1
    self._main = threading.main_thread().ident

  def __enter__(self) -> Watchdog:
    ACTIVITY.enter('start')
    ACTIVITY.reports = {}
    self._began = self._woke = time.monotonic()
    with contextlib.suppress(OSError):
      self._beat()
    self._thread.start()
    if self._poller is not None:
      self._poller.start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               trace: TracebackType | None) -> None:
    if self._count > 1 and error is not None and self._factor:
      self._leave_after(error)
    self.leave('finished' if error is None else f'{type(error).__name__}: {error}')

  def leave(self, reason: str, seconds: float = SILENT) -> bool:
    """Reports that this process ends; waits until the others do so too, and returns whether they do."""
    if self._stop.is_set():
      return True
    self._left = reason
    self._stop.set()
    for thread in (self._thread, self._poller):  # in C++ code a thread would abort the exit of Python
      if thread is not None and thread is not threading.current_thread():
        thread.join(5)
    with contextlib.suppress(OSError):
      self._beat()
    deadline = time.monotonic() + seconds
    while not (all_left := all(self._has_left(i) for i in self._others)) and time.monotonic() < deadline:
      time.sleep(0.05)
    if self._index == 0:
      remove_reports(self._folder)
    return all_left

  def _leave_after(self, error: BaseException) -> None:
    """Leaves after an error; if another process has caused it, that is found out first, and this one ends."""
    unexpected = not isinstance(error, UserError | GeneratorExit | KeyboardInterrupt)
    if unexpected and LOST_PEER.search(str(error)):
      ACTIVITY.enter('step')  # in which the other processes are needed
      time.sleep(SILENT + 2 * BEAT)  # meanwhile the thread ends this process, unless all others are well
    code = error.exit_code if isinstance(error, UserError) else 1
    if not self.leave(f'{type(error).__name__}: {error}') or unexpected:
      atexit.register(_exit, code)  # before that of JAX, which would wait for the other processes

  @property
  def _others(self) -> list[int]:
    return [i for i in range(self._count) if i != self._index]

  def _run(self) -> None:
    while not self._stop.wait(BEAT):
      now = time.monotonic()
      if now > self._woke + 3 * BEAT:  # this process was stopped and continues, as after Ctrl-Z
        ACTIVITY.sign()
        self._began = now
        self._seen.clear()
      self._woke = now
      for act in (self._check_owner, self._beat, self._check):
        with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):  # an unreadable report is seen as none
          act()

  def _beat(self) -> None:
    """Writes the report of this process."""
    self._number += 1
    report = {'token': self._token, 'number': self._number, 'left': self._left[:300], 'phase': ACTIVITY.phase,
              'step': ACTIVITY.step, 'idle': round(time.monotonic() - ACTIVITY.last, 3), 'limit': self._limit(),
              **durations(), 'at': self._place(), **this_process()}
    write_report(self._folder, self._index, report)

  def _limit(self) -> float:
    if ACTIVITY.phase in LIMITS:
      return LIMITS[ACTIVITY.phase] * self._factor
    return max(STEP_SECONDS, STEP_MEDIANS * ACTIVITY.step_seconds) * self._factor

  def _place(self) -> str:
    """Where the main thread is: the innermost frame that is not of a package."""
    frame = sys._current_frames().get(self._main or 0)
    frames = traceback.extract_stack(frame) if frame else []
    own = [f for f in frames if 'site-packages' not in f.filename and f.filename[:1] != '<'] or frames
    return f'{own[-1].filename}:{own[-1].lineno} in {own[-1].name}'[-200:] if own else ''

  def _check_owner(self) -> None:
    """Ends this process if another run has taken over the folder, as while this one was stopped, or it is gone."""
    report, workdir = read_report(self._folder, 0), self._folder.parent
    gone = not self._folder.exists() and not (workdir / LOCK).exists() and not self._stop.is_set()
    self._gone = self._gone + 1 if gone else 0
    if self._gone > 1 and self._factor:  # not for a moment
      self._exit(StorageError(f'--workdir: {workdir} was moved, removed or unmounted while the run was training; bring '
                              'it back, then repeat the command'))
    if not report and not gone and self._index == 0 and self._folder.parent.is_dir() and not self._stop.is_set():
      prepare_reports(self._folder, self._count)
    elif report and report['token'] != self._token and self._factor:
      self._exit(StorageError(f'--workdir: the run of process {report["pid"]} on {report["host"]} has taken over '
                              f'{self._folder.parent}; this one ends'))

  def _check(self) -> None:
    if not self._factor:
      return
    with contextlib.suppress(OSError):
      if order := (self._folder / ORDER).read_text():
        self._end(order)
    now = time.monotonic()
    needed = [] if ACTIVITY.phase == 'end' else self._others if self._index == 0 else [0]
    for i in needed if self._count > 1 else []:
      report, since = self._seen.get(i, ({}, self._began))
      newest = read_report(self._folder, i)
      if newest and newest['token'] == self._token and newest != report:
        report, since = newest, now
      self._seen[i] = report, since
      name = f'process {i}' + (f' on {report["host"]}' if report else '')
      if report.get('left') == 'finished':
        continue
      if report.get('left'):
        if now < self._left_at.setdefault(i, now) + GRACE:
          continue
        if report['left'] == 'interrupted':  # it had not trained a step, and this one just has
          self._exit(Interrupted(f'{name} was interrupted before its first step'))
        self.end_all(f'{name} has ended: {report["left"]}')
      elif report and still_exists(report) is False:
        self.end_all(f'{name} has died; its last report was of step {report["step"]}')
      elif now > since + SILENT:
        self.end_all(f'{name} has given no sign of life for {now - since:.0f} s, so it is dead or stopped; its last '
                     f'report was of step {report.get("step", 0)}')
    if self._index == 0:
      self._check_progress()

  def _check_progress(self) -> None:
    """Ends the run if no process has got on for longer than the limits of their phases."""
    own = read_report(self._folder, 0)
    reports = {0: own, **{i: self._seen[i][0] for i in self._others if i in self._seen}}
    if not all(reports.values()):
      return
    if self._first_step < 0 and own['phase'] == 'step':
      self._first_step = own['step']
    limits = [r['limit'] for r in reports.values() if r['phase'] != 'callback'] or [own['limit']]
    idle = min(r['idle'] for r in reports.values())
    ACTIVITY.reports = reports  # for the metrics
    self._name_slow(reports)
    if idle > max(limits):
      last = min(r['step'] for r in reports.values())
      behind = [i for i, r in reports.items() if r['step'] == last]
      lines = [f'  process {i} on {r["host"]}: step {r["step"]}, {r["phase"]}, at {r["at"]}'
               for i, r in reports.items() if i in behind][:8]
      which = (f'process {behind[0]} is behind' if len(behind) == 1 < self._count else
               'all processes are at the same step' if self._count > 1 else 'it is stuck')
      self.end_all(f'no progress for {idle:.0f} s (phase {reports[behind[0]]["phase"]}, limit {max(limits):.0f} s): '
                   f'{which}\n' + '\n'.join(lines))

  def _name_slow(self, reports: dict[int, dict[str, Any]]) -> None:
    """Names a process once if, over the newest steps, it takes longer than the others besides waiting for them."""
    times = step_times(reports)
    for i, report in reports.items() if len(reports) > 1 else ():
      times_as_long, others = slowdown(i, times)
      if i in self._slow or self._first_step < 0 or report['step'] < self._first_step + STEPS:
        continue
      if times_as_long > SLOW:
        self._slow.add(i)
        print(f'WARNING: process {i} on {report["host"]} is slow: its steps take {times[i]:.3g} s, of which it waits '
              f'{report["data_seconds"]:.3g} s for data; those of the others {others:.3g} s', flush=True)

  def end_all(self, reason: str) -> None:
    """Orders all processes to end, and ends this one."""
    path = self._folder / ORDER
    with contextlib.suppress(OSError):
      if not path.read_text():
        path.write_text(reason)
      reason = path.read_text()  # of the first
    self._end(reason)

  def _end(self, reason: str) -> None:
    """Writes the stacks of all threads, waits for the other processes, and ends this one."""
    with self._lock:  # only one thread
      stacks = self._folder / f'{self._index}.stacks'
      with contextlib.suppress(OSError), open(stacks, 'w') as f:
        f.write(f'{reason}\n\n')
        f.flush()
        faulthandler.dump_traceback(f, all_threads=True)
      message = (f'{reason}\nthe stacks of all threads are in {self._folder}/*.stacks; the same command resumes the '
                 'run (its limits: --config.watchdog)')
      if self._index == 0:
        threading.Timer(5, os._exit, [LostError.exit_code]).start()
        with contextlib.suppress(Exception):
          self._failed(reason)
      self._left = 'ended by the watchdog'
      with contextlib.suppress(OSError):
        self._beat()
      if self._index == 0:  # the coordinator, whose end kills the others
        deadline = time.monotonic() + 2 * BEAT
        while not all(self._has_left(i) for i in self._others) and time.monotonic() < deadline:
          time.sleep(0.1)
      self._exit(LostError(message))

  def _exit(self, error: UserError) -> None:
    threading.Timer(2, os._exit, [error.exit_code]).start()  # a terminal that nobody reads blocks the message
    with contextlib.suppress(Exception):
      LINE.clear()
      print(f'error: {error}', file=sys.stderr, flush=True)
    for child in psutil.Process().children(recursive=True):
      with contextlib.suppress(psutil.Error):
        child.kill()
    os._exit(error.exit_code)

  def _has_left(self, i: int) -> bool:
    report = read_report(self._folder, i)
    return bool(not report or report['token'] != self._token or report['left'])

  def _poll_coordinator(self) -> None:
    """Hears of a SIGTERM to any process, and of the end of the coordinator, process 0."""
    import jax
    from jax._src.distributed import global_state
    client, failures = global_state.client, 0
    while client is not None and not self._stop.wait(1):
      try:
        client.key_value_try_get(NOTICE)
        end_now()
        return
      except jax.errors.JaxRuntimeError as e:
        failures = 0 if 'NOT_FOUND' in str(e) else failures + 1
      if failures > 1 and self._factor and not self._stop.is_set():
        report, _ = self._seen.get(0, ({}, 0.0))
        self.end_all(f'process 0 on {report.get("host", "?")} has died: the coordinator does not answer; its last '
                     f'report was of step {report.get("step", 0)}')


def _exit(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
