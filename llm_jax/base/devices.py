"""Peak FLOP/s of devices, and what the current target (base/target.py) decides."""

from __future__ import annotations

import re

import jax

from llm_jax.base.target import current_target

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
  return platform() == 'cpu'


def platform() -> str:
  """cpu, gpu or tpu: the platform of the devices that programs are compiled for."""
  return current_target().platform


def has_fast_bf16() -> bool:
  """Whether a bf16 matmul is faster than a float32 one on the devices that programs are compiled for."""
  return current_target().fast_bf16


def peak_flops(devices: list[jax.Device]) -> float | None:
  """The sum over all devices; None where the kind is not in the table, as for CPUs."""
  peak = peak_of_kind(devices[0].device_kind)
  return peak and peak * len(devices)


def peak_of_kind(kind: str) -> float | None:
  """Peak FLOP/s of a device of this kind; None where it is not in the table."""
  known = (peak for name, peak in PEAK_FLOPS.items() if re.search(rf'\b{name}{VARIANT}', kind, re.IGNORECASE))
  return next(known, None)
