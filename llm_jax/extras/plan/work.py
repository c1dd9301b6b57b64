"""FLOPs, tokens, time and money of a run, and the seconds of its collectives, by the figures of the kind of device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llm_jax.base.devices import peak_of_kind
from llm_jax.base.networks import network_parts
from llm_jax.extras.plan.building import Built
from llm_jax.extras.plan.targets import Place
from llm_jax.training.stages import make_stages


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of a run. None: not known, as of CPUs."""

  flops_per_token: float
  tokens_per_step: int
  tokens: int  # of the whole run
  data_tokens: int | None
  epochs: float | None
  mfu: float
  step_seconds: float | None
  hours: float | None
  device_hours: float | None
  price: float  # dollars for an hour of one device
  dollars: float | None


def work_of(built: Built, place: Place, mfu: float, price: float | None, data_tokens: int | None) -> Work:
  """The work of the run on the place at this MFU and price."""
  config, peak = built.config, peak_of_kind(built.target.kind)
  tokens = sum((stage.end - stage.begin) * stage.config.batch_tokens for stage in make_stages(config))
  known = data_tokens or built.train_tokens or None
  price = place.kind.price if price is None else price
  rate = peak * mfu * place.num_devices if peak else None  # FLOP/s
  hours = built.flops_per_token * tokens / rate / 3600 if rate else None
  device_hours = hours * place.num_devices if hours is not None else None
  return Work(built.flops_per_token, config.batch_tokens, tokens, known, tokens / known if known else None, mfu,
              built.flops_per_token * config.batch_tokens / rate if rate else None, hours, device_hours, price,
              device_hours * price if device_hours is not None else None)


def network_parts_on(place: Place, mesh: Mesh) -> list[int]:
  """The slice or host of each device of the mesh, in its order; for devices that stand in for others, by number."""
  devices = mesh.devices.flatten().tolist()
  if devices[0].platform == place.kind.platform:
    return network_parts(devices)
  within = place.shape[1] if place.kind.platform == 'gpu' else place.num_devices // place.slices
  return [device.id // within for device in devices]


def bandwidth(place: Place, mesh: Mesh, axes: Iterable[str]) -> float:
  """Bytes a second that a device sends in a collective over these mesh axes; 0: unknown.

  The slowest part counts: the network, if the axes leave a slice or a host.
  """
  parts = np.array(network_parts_on(place, mesh)).reshape(mesh.devices.shape)
  places = [i for i, name in enumerate(mesh.axis_names) if name in axes]
  crosses = any((parts != parts.take([0], axis=i)).any() for i in places)
  return place.kind.network if crosses else place.kind.link


def collective_rows(collectives: Iterable[Any], place: Place) -> list[dict[str, Any]]:
  """Collectives grouped by kind, axes, dtype, network and overlap: executions, bytes on the wire, seconds of a step.

  Links and the network between slices or hosts are in use at once, so the slower part of what is sent counts.
  """
  found: dict[tuple, dict[str, Any]] = {}
  for each in collectives:
    key = each.kind, each.axes, each.dtype, each.outside, each.overlapped
    row = found.setdefault(key, {'kind': each.kind, 'axes': list(each.axes), 'dtype': each.dtype,
                                 'outside': each.outside, 'overlapped': each.overlapped, 'executions': 0,
                                 'wire_bytes': 0.0})
    row['executions'] += each.executions
    row['wire_bytes'] += each.wire_bytes * each.executions
  for row in found.values():
    row['network_bytes'] = row['wire_bytes'] * row.pop('outside')
    inside = row['wire_bytes'] - row['network_bytes']
    speeds = ((inside, place.kind.link), (row['network_bytes'], place.kind.network))
    row['seconds'] = max(sent / speed for sent, speed in speeds) if place.kind.link else None
  return sorted(found.values(), key=lambda row: -row['wire_bytes'])
