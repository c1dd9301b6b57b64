"""Properties of devices by kind."""

from types import SimpleNamespace

import jax
import pytest

from llm_jax.base.devices import PEAK_FLOPS, has_fast_bf16, only_cpus, peak_flops, platform
from llm_jax.base.target import Target, compiling_for, cpu_has_fast_bf16, device_memory, read_text
from llm_jax.layers.kernels import local_device


def peak(kind, count=1):
  return peak_flops([SimpleNamespace(device_kind=kind)] * count)


@pytest.mark.parametrize('kind, expected', [
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA A10G', 70e12), ('NVIDIA A10', 125e12), ('NVIDIA A40', 149.7e12),
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H100 NVL', 835e12),
    ('NVIDIA H200', 989e12), ('NVIDIA H20', 148e12), ('NVIDIA GH200 480GB', 989e12), ('NVIDIA GB200', 2500e12),
    ('NVIDIA B200', 2250e12), ('NVIDIA L4', 121e12), ('NVIDIA L40', 181e12), ('NVIDIA L40S', 362e12),
    ('Tesla T4', 65e12), ('Tesla V100-SXM2-16GB', 125e12), ('Tesla V100-PCIE-32GB', 112e12),
    ('NVIDIA GeForce RTX 4090', 165e12), ('NVIDIA RTX 6000 Ada Generation', 364e12),
    ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5p', 459e12), ('TPU v5', 459e12), ('TPU v6 lite', 918e12),
    ('TPU7x', 1153.5e12), ('tpu V6E', 918e12)])
def test_peak_flops_of_a_kind(kind, expected):
  assert peak(kind) == expected
  assert peak(kind, 8) == 8 * expected


@pytest.mark.parametrize('kind', [
    'cpu', 'TPU v4 lite', 'TPU v9', 'NVIDIA RTX A1000', 'NVIDIA GeForce GTX 1080', 'NVIDIA GeForce RTX 3090 Ti',
    'NVIDIA GeForce RTX 4090 D', 'NVIDIA GeForce RTX 4090 Laptop GPU', 'Quadro RTX 6000', 'Tesla V100S-PCIE-32GB'])
def test_unknown_kinds_have_no_peak_flops(kind):
  assert peak(kind) is None


def test_each_table_entry_matches_its_own_name():
  assert {name: peak(name) for name in PEAK_FLOPS} == PEAK_FLOPS


def test_cpu_devices_share_the_memory():
  device = jax.devices('cpu')[0]
  total = next(int(line.split()[1]) * 1024 for line in read_text('/proc/meminfo').splitlines() if 'MemTotal' in line)
  assert 0 < device_memory(device) * len(jax.devices('cpu')) <= total


def test_accelerators_report_their_memory():
  assert device_memory(SimpleNamespace(memory_stats=lambda: {'bytes_limit': 123, 'bytes_in_use': 4})) == 123
  assert device_memory(SimpleNamespace(memory_stats=lambda: None, platform='tpu')) is None


def test_bf16_is_fast_only_with_instructions_for_it(monkeypatch):
  assert cpu_has_fast_bf16('processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n')
  assert cpu_has_fast_bf16('flags : amx_bf16 sse')
  assert not cpu_has_fast_bf16('processor\t: 0\nmodel name : avx512_bf16\nflags\t\t: fpu avx512f avx512_bf16x\n')
  assert not cpu_has_fast_bf16('Features : fp asimd bf16 i8mm')  # ARM: unknown for XLA
  assert not cpu_has_fast_bf16('')
  for capability, version, fast in (('7.5', 'cuda 12', False), ('8.0', 'cuda 12', True), ('12.0', 'cuda 13', True),
                                    ('gfx90a', 'rocm 7', True)):
    device = SimpleNamespace(platform='gpu', device_kind='a GPU', compute_capability=capability,
                             client=SimpleNamespace(platform_version=version))
    monkeypatch.setattr(jax, 'devices', lambda device=device: [device])
    assert has_fast_bf16() == fast


def test_decisions_follow_the_target_that_is_compiled_for():
  before = platform(), local_device(), only_cpus()
  target = Target('gpu', 'NVIDIA H100 80GB HBM3', (SimpleNamespace(platform='gpu'),), (9, 0), planned_memory=80,
                  is_here=False)
  with compiling_for(target):
    assert (platform(), local_device(), only_cpus()) == ('gpu', ('gpu', (9, 0)), False)
    assert has_fast_bf16() and target.memory == 80
  assert (platform(), local_device(), only_cpus()) == before
