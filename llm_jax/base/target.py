"""Target: the devices that programs are compiled for, those of this machine or others that are not here.

What the code decides from a device, such as attention kernels, dtypes and sizes of chunks, it decides from
`current_target()`. `compiling_for` sets another one, with which llm-jax plan compiles for a TPU slice on a laptop.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices of one kind, with the properties that decide how a program is built."""

  platform: str  # cpu, gpu or tpu
  kind: str  # JAX's device_kind
  devices: tuple[Any, ...]  # of all processes, in JAX's order
  capability: tuple[int, int] = (0, 0)  # compute capability of NVIDIA GPUs; (0, 0) for other devices
  fast_bf16: bool = True  # whether a bf16 matmul is faster than a float32 one
  planned_memory: int | None = None  # bytes of a device that is not here
  is_here: bool = True  # whether programs can run on the devices

  @property
  def memory(self) -> int | None:
    """Bytes available for arrays on each device, that of this process with the least; None: unknown."""
    if not self.is_here:
      return self.planned_memory
    sizes = [device_memory(device) for device in jax.local_devices()]
    known = [size for size in sizes if size is not None]
    return min(known) if len(known) == len(sizes) else None


_planned: contextvars.ContextVar[Target | None] = contextvars.ContextVar('target', default=None)


def current_target() -> Target:
  """The target that `compiling_for` has set, else the devices of this machine."""
  planned = _planned.get()
  return target_here() if planned is None else planned


def target_here() -> Target:
  """JAX's devices. A bf16 matmul is fast except on GPUs before Ampere and on most CPUs."""
  devices = tuple(jax.devices())
  first = devices[0]
  if first.platform == 'cpu':
    return Target('cpu', first.device_kind, devices, fast_bf16=this_cpu_has_fast_bf16())
  if first.platform != 'gpu' or 'cuda' not in first.client.platform_version:
    return Target(first.platform, first.device_kind, devices)
  major, minor = map(int, str(first.compute_capability).split('.'))
  return Target('gpu', first.device_kind, devices, (major, minor), fast_bf16=major >= 8)


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
  """Makes `target` the current one."""
  token = _planned.set(target)
  try:
    yield
  finally:
    _planned.reset(token)


def device_memory(device: jax.Device) -> int | None:
  """Bytes available for arrays; for a CPU device, its share of the machine's free memory. None: unknown."""
  stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  if device.platform != 'cpu':
    return None
  lines = read_text('/proc/meminfo').splitlines()
  left = [int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable')]
  limit, used = read_text('/sys/fs/cgroup/memory.max').strip(), read_text('/sys/fs/cgroup/memory.current').strip()
  if limit.isdecimal() and used.isdecimal():  # a container may have less; the file cache can be reclaimed
    cached = re.search(r'^inactive_file (\d+)', read_text('/sys/fs/cgroup/memory.stat'), re.MULTILINE)
    left.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
  # Several processes may share one machine, so each counts on its share only.
  return min(left) // (len(device.client.local_devices()) * jax.process_count()) if left else None


@functools.cache
def this_cpu_has_fast_bf16() -> bool:
  """Whether XLA:CPU has bf16 kernels for this machine's CPU."""
  return cpu_has_fast_bf16(read_text('/proc/cpuinfo'))


def cpu_has_fast_bf16(cpuinfo: str) -> bool:
  """Whether XLA:CPU has bf16 kernels for this x86 CPU; otherwise it converts operands to float32 and back."""
  flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith('flags')), [])
  return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(flags)


def read_text(path: str) -> str:
  """The text of a kernel file; '' if it cannot be read."""
  try:
    return Path(path).read_text()
  except OSError:
    return ''
