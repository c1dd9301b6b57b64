"""What the processes of a run on several hosts take for a step, and which of them is slow.

The watchdog exchanges reports every few seconds anyway; the metrics are made of these, so that no step waits for them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.files import open_append

LOG_SECONDS = 5.0  # between two lines of a process's log, which are written at logged steps


def durations() -> dict[str, float]:
  """Medians over this process's newest steps, and the memory that is in use."""
  return {'step_seconds': round(ACTIVITY.step_seconds, 6), 'own_seconds': round(ACTIVITY.own_seconds, 6),
          'wait_seconds': round(ACTIVITY.wait_seconds, 6), 'data_seconds': round(ACTIVITY.data_seconds, 6),
          'host_memory': psutil.virtual_memory().percent / 100}


def step_times(reports: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
  """What a step would take if all processes were like each one: its own part, and the shortest wait for devices.

  A process that waits for others waits longer, so the shortest wait is that for the devices alone.
  """
  shared = min((r['wait_seconds'] for r in reports.values()), default=0.0)
  return {i: shared + r['own_seconds'] for i, r in reports.items()}


def slowdown(process: int, times: Mapping[int, float]) -> tuple[float, float]:
  """(how many times as long as for the others a step takes for a process, the median of the others)."""
  others = statistics.median(seconds for i, seconds in times.items() if i != process)
  return (times[process] / others if others else 1.0), others


def host_metrics(reports: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
  """Metrics over all processes; {} for a single one, or before each has trained a step."""
  if len(reports) < 2 or not all(r['step_seconds'] for r in reports.values()):
    return {}
  times = step_times(reports)
  slowest = max(times, key=lambda i: times[i])
  return {'host/slowest': float(slowest), 'host/spread': slowdown(slowest, times)[0],
          'host/data_seconds': max(r['data_seconds'] for r in reports.values()),
          'host/memory': max(r['host_memory'] for r in reports.values())}


class HostLog:
  """logs/process_INDEX.jsonl, the log of one of several processes; a full disk does not stop the run."""

  def __init__(self, workdir: Path, index: int, count: int):
    self._path = workdir / 'logs' / f'process_{index}.jsonl' if count > 1 else None
    self._next = 0.0

  def write(self, step: int) -> None:
    """Adds a line on the newest steps, if the one before is LOG_SECONDS old."""
    if self._path is None or time.monotonic() < self._next:
      return
    self._next = time.monotonic() + LOG_SECONDS
    line = {'time': round(time.time(), 1), 'step': step, **durations(),
            'process_bytes': psutil.Process().memory_info().rss, 'host': socket.gethostname()}
    with contextlib.suppress(OSError):
      self._path.parent.mkdir(exist_ok=True)
      with open_append(self._path) as f:
        f.write(json.dumps(line) + '\n')
