"""The order of devices in a mesh over several networks: TPU slices, or hosts of GPUs, with a slow network between them.

The part of a mesh axis inside a slice or host is the inner one, so that neighbours on the axis have fast links.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from llm_jax.base.errors import ConfigError

# Axes that go over the slow network where the config does not say which: the first one that can.
OUTER = ('stage', 'data', 'fsdp')


def network_parts(devices: Sequence[Any]) -> list[int]:
  """For each device the number of its part: of its TPU slice, of its host of GPUs, or of its process.

  JAX numbers as slices also hosts of GPUs, or what NVLink connects, however many processes they have.
  """
  slices = [getattr(device, 'slice_index', 0) or 0 for device in devices]
  by_slice = devices[0].platform == 'tpu' or len(set(slices)) > 1
  return slices if by_slice else [device.process_index for device in devices]


def over_networks(sizes: dict[str, int], between: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray | None:
  """The devices of a mesh with axes of these sizes, of which factors `between` go over the slow network.

  None: any order will do. Factors of 1 alone are those that the config did not set: then slices are put on the first
  axis that can be. Raises ConfigError for factors that fit neither the axes nor the slices or hosts.
  """
  parts, num_parts = network_parts(devices), len(set(network_parts(devices)))
  is_tpu, num_slices = devices[0].platform == 'tpu', len({getattr(d, 'slice_index', 0) or 0 for d in devices})
  if math.prod(between.values()) == 1:
    split = next((name for name in OUTER if sizes.get(name, 1) % num_slices == 0), None)
    if split is None and is_tpu:
      listed = ' or '.join(f'{name} {sizes[name]}' for name in OUTER if name in sizes)
      raise ConfigError(f'config.mesh: {listed} must be a multiple of the {num_slices} slices')
    if split is None or num_slices == 1:
      return None
    between = {split: num_slices}
  for name, factor in between.items():
    if sizes[name] % factor:
      raise ConfigError(f'config.mesh: dcn_{name} {factor} must divide {name}, which is {sizes[name]}')
  count, kind = math.prod(between.values()), 'slices' if is_tpu or num_slices > 1 else 'processes'
  if num_parts % count or (is_tpu and num_slices > 1 and num_parts != count):
    raise ConfigError(f'config.mesh: {" x ".join(f"dcn_{name}" for name in between)} = {count}, but there are '
                      f'{num_parts} {kind} here; set factors whose product is {num_parts}')
  return arranged(sizes, between, grouped(parts, count, devices))


def grouped(parts: list[int], count: int, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
  """The devices in `count` groups of as many parts each, in the order of parts. Raises ConfigError for unequal ones."""
  order = sorted(range(len(devices)), key=lambda i: parts[i])  # stable
  by_part = [[devices[i] for i in group] for _, group in itertools.groupby(order, key=lambda i: parts[i])]
  if len(set(map(len, by_part))) > 1:
    raise ConfigError(f'config.mesh: slices or hosts have different numbers of devices: {list(map(len, by_part))}')
  size = len(by_part) // count
  return [[device for part in by_part[i:i + size] for device in part] for i in range(0, len(by_part), size)]


def arranged(sizes: dict[str, int], between: dict[str, int], groups: list[list[jax.Device]]) -> np.ndarray:
  """The devices as an array of the mesh's shape: along each axis, group after group."""
  outer = [between.get(name, 1) for name in sizes]
  inner = [size // factor for size, factor in zip(sizes.values(), outer, strict=True)]
  blocks = np.empty((len(groups), *inner), object)
  for block, group in zip(blocks, groups, strict=True):
    block[...] = mesh_utils.create_device_mesh(inner, group)
  place = [i + shift for i in range(len(inner)) for shift in (0, len(inner))]  # outer 0, inner 0, outer 1, inner 1, ...
  return blocks.reshape(*outer, *inner).transpose(place).reshape(tuple(sizes.values()))
