"""Targets of --on: devices that are not here, as the compilers for TPUs and GPUs describe them."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from llm_jax.base import runtime
from llm_jax.base.errors import ConfigError
from llm_jax.extras.plan.kinds import GPU_SHARE, KINDS, Kind

EXAMPLES = 'v5e:4x4, v5p:2x2x1, h100:8, h100:2x8 (2 hosts with 8 each), cpu:8'
VIRTUAL = 'xla_force_host_platform_device_count'  # XLA's flag for several devices of one CPU
# What describes a GPU to XLA, of NVIDIA's data sheets and of device queries.
DESCRIPTION = '''gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{device_kind}"
'''


@dataclasses.dataclass(frozen=True)
class Place:
  """What --on and --slices name: a kind, the shape of a slice or of hosts, and the number of slices."""

  kind: Kind
  shape: tuple[int, ...]  # of TPUs: of a slice; of GPUs: (hosts, GPUs of each); of CPUs: (devices,)
  slices: int = 1

  @property
  def num_devices(self) -> int:
    size = self.slices
    for side in self.shape:
      size *= side
    return size

  @property
  def memory(self) -> int | None:
    """Bytes of a device that a run may use."""
    if self.kind.platform != 'gpu' or self.kind.memory is None:
      return self.kind.memory
    return int(self.kind.memory * float(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION') or GPU_SHARE))

  def __str__(self) -> str:
    shape = 'x'.join(map(str, self.shape))
    return f'{self.kind.name}:{shape}' + (f' x {self.slices} slices' if self.slices > 1 else '')


def parse_place(text: str, slices: int = 1) -> Place:
  """The Place that --on names. Raises ConfigError for unknown kinds and shapes."""
  name, _, shape = text.partition(':')
  if name not in KINDS:
    raise ConfigError(f'--on: {name!r} is not a kind of device; legal are {", ".join(KINDS)}; for example {EXAMPLES}')
  kind = KINDS[name]
  if not re.fullmatch(r'[1-9]\d{0,4}(x[1-9]\d{0,4})*', shape):
    raise ConfigError(f'--on: {text!r} has no shape, such as {(kind.shapes or ("8",))[0]}; for example {EXAMPLES}')
  sides = tuple(map(int, shape.split('x')))
  if kind.platform == 'tpu' and len(sides) != kind.dims:
    raise ConfigError(f'--on: a slice of {name} has {kind.dims} sides, got {shape}; legal are '
                      f'{", ".join(kind.shapes)} and larger ones')
  if kind.platform == 'gpu' and len(sides) == 1:
    hosts, left = divmod(sides[0], kind.per_host)
    sides = (hosts, kind.per_host) if hosts else (1, left)
    if hosts and left:
      raise ConfigError(f'--on: {shape} GPUs are not whole hosts of {kind.per_host}; set HOSTSxGPUS')
  if len(sides) != {'tpu': kind.dims, 'gpu': 2, 'cpu': 1}[kind.platform]:
    more = f' and {name}:HOSTSxN' if kind.platform == 'gpu' else ''
    raise ConfigError(f'--on: {text!r}: legal are {name}:N{more}')
  if slices < 1 or (slices > 1 and kind.platform != 'tpu'):
    raise ConfigError(f'--slices: {slices}: only TPUs have slices, at least 1; more hosts of GPUs are '
                      'h100:HOSTSxGPUS')
  return Place(kind, sides, slices)


def missing_compiler(place: Place) -> str:
  """What must be installed to compile for the place; '' if it is there."""
  if place.kind.platform == 'tpu' and importlib.util.find_spec('libtpu') is None:
    return "the compiler for TPUs is not installed: pip install 'llm_jax[plan-tpu]'"
  if place.kind.platform == 'gpu' and not any(
      importlib.util.find_spec(f'jax_cuda{version}_plugin') for version in (12, 13)):
    return "the compiler for NVIDIA GPUs is not installed: pip install 'llm_jax[plan-gpu]'"
  return ''


def prepare(place: Place, environ: MutableMapping[str, str]) -> list[str]:
  """Sets the environment in which the compiler starts, before JAX is imported; returns the XLA flags that were added.

  Nothing runs on an accelerator of this machine, and no compiled program is taken from the cache, whose compile time
  would not be known.
  """
  environ['JAX_PLATFORMS'] = 'cpu'
  environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
  environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
  environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no question to the metadata server of a cloud
  environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  if place.kind.platform == 'cpu' or missing_compiler(place):  # see stand_in_target
    count = f'--{VIRTUAL}={place.num_devices}'
    others = [flag for flag in environ.get('XLA_FLAGS', '').split() if VIRTUAL not in flag]
    environ['XLA_FLAGS'] = ' '.join([*others, count])
  return runtime.add_xla_flags(place.kind.platform, environ, place.kind.name)


def open_target(place: Place) -> Any:
  """The Target with the place's devices. Raises ConfigError for a shape that the compiler refuses."""
  import jax

  from llm_jax.base.target import Target, target_here
  if place.kind.platform == 'cpu':
    here = jax.devices('cpu')
    if len(here) < place.num_devices:
      raise ConfigError(f'--on: JAX has already started with {len(here)} CPU devices; run llm-jax plan in '
                        'a process of its own')
    fast = target_here().fast_bf16 if jax.default_backend() == 'cpu' else False
    return Target('cpu', here[0].device_kind, tuple(here[:place.num_devices]), fast_bf16=fast)
  jax.numpy.zeros(1).block_until_ready()  # compiling fails unless an operation has run before
  devices = tpu_devices(place) if place.kind.platform == 'tpu' else gpu_devices(place)
  return Target(place.kind.platform, devices[0].device_kind, tuple(devices), place.kind.capability,
                planned_memory=place.memory, is_here=False)


def stand_in_target(place: Place) -> Any:
  """The Target with virtual CPU devices in place of the place's, for estimates where its compiler is missing."""
  from llm_jax.base.target import Target
  devices = open_target(Place(KINDS['cpu'], (place.num_devices,))).devices
  # Without a compute capability, as JAX does not trace cuDNN's attention without its plugin.
  return Target(place.kind.platform, place.kind.device_kind, devices, planned_memory=place.memory, is_here=False)


def tpu_devices(place: Place) -> list[Any]:
  """The chips of the slices. Raises ConfigError."""
  from jax.experimental import topologies
  name = f'{place.kind.name}:{"x".join(map(str, place.shape))}'
  try:
    return topologies.get_topology_desc(name, 'tpu', num_slices=place.slices).devices
  except Exception as e:  # of many types
    raise ConfigError(f'--on: the compiler refuses the shape {name}: {str(e).splitlines()[0][:200]}; legal are '
                      f'{", ".join(place.kind.shapes)} and larger ones') from None


def gpu_devices(place: Place) -> list[Any]:
  """The GPUs of the hosts. Raises ConfigError."""
  from jax.experimental import topologies
  load_cudnn()
  kind, (major, minor) = place.kind, place.kind.capability
  description = DESCRIPTION.format(bandwidth=int(kind.hbm), memory=kind.memory, major=major, minor=minor,
                                   device_kind=kind.device_kind)
  try:
    return topologies.get_topology_desc(kind.name, 'cuda', topology='x'.join(map(str, (1, *place.shape))),
                                        target_config=description).devices
  except Exception as e:
    raise ConfigError(f'--on: the compiler refuses {place}: {str(e).splitlines()[0][:200]}') from None


def load_cudnn() -> bool:
  """Loads cuDNN's libraries from its wheel, where the CUDA plugin does not look without a driver; whether it found
  them."""
  spec = importlib.util.find_spec('nvidia')
  found = [path for root in (spec.submodule_search_locations or () if spec else ())
           for path in sorted(Path(root).glob('cudnn/lib/libcudnn*.so.*'))]
  for path in found:
    try:
      ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError:  # one that needs a driver
      continue
  return bool(found)
