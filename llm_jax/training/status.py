"""status.json, which reports the progress of a run to other programs, and the load of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import psutil

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import Interrupted, StorageError
from llm_jax.base.files import set_aside, write_file
from llm_jax.base.hosts import HostLog, host_metrics
from llm_jax.base.multihost import gather, say
from llm_jax.base.redaction import redact
from llm_jax.training.launches import Launch, fruitless_launches

HURRY_AFTER, GIVE_UP_AFTER = 3, 6  # launches in a row that ended by themselves without a new checkpoint
SECONDS = 1.0  # between updates of the file, and of system metrics: each takes half a millisecond, steps can be short
STATES = ('starting', 'training', 'finished', 'stopped', 'failed')
TYPES: tuple[tuple[str, Any, Any], ...] = (  # of its values
    ('step', int, 0), ('num_steps', int, 0), ('saved', int | None, 0), ('seconds', int | float, 0),
    ('started', int | float, 0), ('best', int | float | None, 0), ('metrics', dict | None, {}))


class Status:
  """Writes `workdir`/status.json atomically; `state` is starting, training, finished, stopped or failed.

  A context manager: how it is left determines the final state. In a folder whose run has trained steps, the file does
  not change until `trained` is called, so that a launch that is refused leaves it as it is. `seconds` is the total time
  of the run, including earlier processes. Only process 0 writes; a full disk does not stop the run.
  """

  def __init__(self, workdir: Path, num_steps: int):
    self._fruitless = gather(fruitless_launches(workdir) if jax.process_index() == 0 else 0)[0]
    self._path = workdir / 'status.json'
    before = read_status(workdir)
    self._before = before.get('step', 0)
    if before['state'] == 'none' and self._path.is_file() and jax.process_index() == 0:
      with contextlib.suppress(OSError):
        aside = set_aside(self._path, 'damaged')
        print(f'WARNING: {self._path} is damaged and is now {aside.name}; a new one is written', file=sys.stderr,
              flush=True)
    known = {name: x for name, x in before.items() if name in ('step', 'best', 'metrics', 'saved')}
    self._seconds, self._finished = before.get('seconds', 0.0), before['state'] == 'finished'
    self._writes, self._launch = not before.get('step'), Launch(workdir)
    self.values: dict[str, Any] = {'state': 'starting', 'step': 0, **known, 'num_steps': num_steps,
                                   'process': os.getpid(), 'started': time.time()}
    self._written = self._asked = float('-inf')
    self._began = time.monotonic()
    self._system: dict[str, float] = {}
    self._host_log = HostLog(workdir, jax.process_index(), jax.process_count())

  def update(self, *, at_once: bool = True, **values: Any) -> None:
    """Stores the values and writes the file: at once, or only if it is older than SECONDS."""
    self.values |= {**values, 'updated': time.time(), 'seconds': self._seconds + time.monotonic() - self._began}
    if not self._writes or jax.process_index() != 0 or (not at_once and time.perf_counter() < self._written + SECONDS):
      return
    self._written = time.perf_counter()
    with contextlib.suppress(OSError):
      write_file(self._path, json.dumps(self.values, indent=2))

  def trained(self, **values: Any) -> None:
    """Notes that this launch has trained a step, and values for its line of launches.jsonl, if it is the first one."""
    self._writes = True
    self.update()
    if not self.has_trained:
      self._launch.update(lost_steps=max(0, self._before - values['begin']), **values)

  @property
  def hurried(self) -> bool:
    """Whether the launches before made no progress, so that the first step is to be saved at once."""
    return self._fruitless >= HURRY_AFTER

  def check_progress(self) -> None:
    """Says that the launches before made no progress. Raises StorageError if saving their first step did not help.

    The next launch then begins to count anew.
    """
    what = f'--workdir: the last {self._fruitless} launches in {self._path.parent} ended without a new checkpoint'
    if self._fruitless >= GIVE_UP_AFTER:
      raise StorageError(f'{what}, although {self._fruitless - HURRY_AFTER} saved their first step at once. Find what '
                         f'ends them (memory, time, disk): llm-jax runs {self._path.parent}; then repeat the command')
    if self.hurried:
      say(f'WARNING: {what}; this one saves its first step at once')

  @property
  def has_trained(self) -> bool:
    """Whether this launch has trained a step."""
    return 'begin' in self._launch.values

  def system(self, step: int) -> dict[str, float]:
    """The values of `system` and of all hosts, at most SECONDS old; adds a line to this process's log."""
    self._host_log.write(step)
    if time.perf_counter() > self._asked + SECONDS:
      self._asked, self._system = time.perf_counter(), system() | host_metrics(ACTIVITY.reports)
    return self._system

  def __enter__(self) -> Status:
    psutil.cpu_percent()  # measures since the previous call, so a first call is needed
    self.update()
    self._launch.update()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
               traceback: TracebackType | None) -> None:
    stopped = kind is not None and issubclass(kind, (Interrupted, GeneratorExit, KeyboardInterrupt))
    state = 'finished' if kind is None else 'stopped' if stopped else 'failed'
    failure: dict[str, Any] = {'error': redact(f'{kind.__name__}: {error}')} if kind is not None and not stopped else {}
    self._writes |= kind is None and not self._finished  # such as a run that was killed after its last checkpoint
    self.update(state=state, **failure)
    self._launch.update(ended=state, step=self.values['step'], seconds=time.monotonic() - self._began,
                        goodput=self.values.get('goodput', {}), **failure)


def read_status(workdir: Path) -> dict[str, Any]:
  """The contents of status.json; {'state': 'none'} if it does not exist or is damaged."""
  with contextlib.suppress(OSError, ValueError, RecursionError):
    values = json.loads((workdir / 'status.json').read_text())
    if isinstance(values, dict) and values.get('state') in STATES and all(
        isinstance(values.get(name, empty), types) for name, types, empty in TYPES):
      return values
  return {'state': 'none'}


def system() -> dict[str, float]:
  """Usage of this host (shares, and bytes of this process) and of its first device, if the device reports it."""
  values = {'system/host_cpu': psutil.cpu_percent() / 100, 'system/host_memory': psutil.virtual_memory().percent / 100,
            'system/process_bytes': float(psutil.Process().memory_info().rss)}
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_in_use' in stats:
    values['system/device_bytes'] = float(stats['bytes_in_use'])
    values['system/device_peak_bytes'] = float(stats.get('peak_bytes_in_use', stats['bytes_in_use']))
  if stats.get('bytes_limit'):
    values['system/device_memory'] = stats['bytes_in_use'] / stats['bytes_limit']
  if jax.default_backend() == 'gpu':
    with contextlib.suppress(Exception):  # no library, no driver, or a GPU that does not report it
      values['system/device_utilization'] = gpu_utilization()
  return values


def gpu_utilization() -> float:
  """The share of the last second in which the first visible NVIDIA GPU was busy."""
  import pynvml
  pynvml.nvmlInit()
  first = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')[0]
  device = (pynvml.nvmlDeviceGetHandleByUUID(first) if first.startswith('GPU-')
            else pynvml.nvmlDeviceGetHandleByIndex(int(first or 0)))
  return pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
