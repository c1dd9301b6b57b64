"""Properties of devices: peak FLOP/s, memory, and whether bfloat16 is fast."""

from __future__ import annotations

import re
from pathlib import Path

import jax

# Dense bf16 peak FLOP/s of one jax device, accumulating in float32; the first key found in its device_kind counts.
# From the vendors' data sheets and white papers (NVIDIA's figures with sparsity are halved; Google's are per chip).
PEAK_FLOPS = {
    'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12,
    'TPU v6 lite': 918e12, 'TPU v6e': 918e12,
    'TPU7x': 2307e12 / 2,  # Ironwood: 2307 per chip, which is two devices
    'V100-PCIE': 112e12, 'V100': 125e12, 'T4': 65e12,  # fp16, having no bf16
    'A100': 312e12, 'A800': 312e12, 'A40': 149.7e12, 'A30': 165e12, 'A10G': 70e12, 'A10': 125e12, 'RTX A6000': 154.8e12,
    'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H800': 989e12, 'H20': 148e12,
    'H200 NVL': 835e12, 'H200': 989e12, 'GH200': 989e12,
    'B200': 2250e12, 'B300': 2250e12, 'GB200': 2500e12, 'GB300': 2500e12,
    'L4': 121e12, 'L40': 181e12, 'L40S': 362e12,
    'RTX 3090': 71e12, 'RTX 4090': 165e12, 'RTX 5090': 209.5e12, 'RTX 6000 Ada': 364e12,
}
# Suffixes that make a name another chip's.
VARIANT = r'(?!\w| ?(Ti|D|SUPER|Laptop|Max-Q|Mobile|lite)\b)'


def only_cpus() -> bool:
  """Whether no device is an accelerator."""
  return all(device.platform == 'cpu' for device in jax.devices())


def platform() -> str:
  """cpu, gpu or tpu: the platform of the devices that programs are compiled for."""
  return jax.devices()[0].platform


def peak_flops(devices: list[jax.Device]) -> float | None:
  """The sum over all devices; None where the kind is not in the table, as for CPUs."""
  kind = devices[0].device_kind
  known = (peak for name, peak in PEAK_FLOPS.items() if re.search(rf'\b{name}{VARIANT}', kind, re.IGNORECASE))
  peak = next(known, None)
  return peak and peak * len(devices)


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


def has_fast_bf16() -> bool:
  """Whether a bf16 matmul is faster than a float32 one: not on GPUs before Ampere, nor on most CPUs."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return 'cuda' not in device.client.platform_version or float(device.compute_capability) >= 8
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
