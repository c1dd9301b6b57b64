"""Reads the collectives of a compiled program: mesh axes, bytes on the wire, executions, overlap with compute."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import numpy as np

from llm_jax.extras.plan.hlo import Array, Computation, Instruction, Module, parse

Kind = Literal['all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute']
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
COMPUTE = {'fusion', 'dot', 'convolution', 'custom-call', 'while', 'conditional', 'call', 'reduce', 'sort', 'scatter',
           'gather'}


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a program.

  `axes` are the mesh axes over which the devices of a group differ, in mesh order; `outside` is the share
  of `wire_bytes` that leaves a slice or host, see `share_outside`. `dtype` and `shape` are those of the
  largest operand (of the result for an all-gather). `wire_bytes` is what one device sends in one execution on a ring:
  (n - 1) / n of the whole array for an all-gather, a reduce-scatter or an all-to-all, twice that for an all-reduce, all
  of it for a permute. `executions` is per call of the program. `overlapped` says that the schedule has other compute
  while the collective is under way. `op` is the path of the operation in the traced function.
  """
  kind: Kind
  axes: tuple[str, ...]
  dtype: str
  shape: tuple[int, ...]
  wire_bytes: float
  executions: int
  overlapped: bool
  op: str
  outside: float = 0.0


def read_collectives(text: str, axes: dict[str, int], parts: Sequence[int] = ()) -> list[Collective]:
  """The collectives of a compiled program, by total bytes on the wire, the largest first.

  `axes` has the sizes of the mesh's axes in order; devices are numbered in the order of the mesh, and `parts` has the
  number of each device's slice or host. Collectives in groups of one device send nothing and are left out.
  """
  module, members = parse(text), numbered(text, axes, parts)
  found = [collective for computation, one, executions in executed(module)
           if (collective := read(module, computation, one, executions, axes, parts, members))]
  found += between_slices(module, axes, parts)
  return sorted(found, key=lambda one: -one.wire_bytes * one.executions)


def numbered(text: str, axes: dict[str, int], parts: Sequence[int]) -> np.ndarray:
  """The places in the mesh of the devices that a program numbers: all, or those of one of several TPU slices."""
  places, found = np.arange(math.prod(axes.values())), re.search(r'\bnum_partitions=(\d+)', text[:text.find('\n')])
  if found is None or not len(parts) or int(found[1]) == len(places):
    return places
  return places[np.array(parts) == parts[0]]


def executed(module: Module) -> Iterator[tuple[Computation, Instruction, int]]:
  """Instructions that are collectives, once each, with their executions.

  A TPU's asynchronous collective fusions repeat a collective, with its channel, in the computations that start it, that
  move a part of it beside other compute and that finish it. The pieces that start it are counted; where none does,
  the rarest piece.
  """
  pieces: dict[tuple[str, str], list[tuple[Computation, Instruction, int]]] = {}
  for computation, times in module.executed():
    for one in computation:
      if base(one.op) not in KINDS or one.op.endswith('-done'):
        continue
      if in_async_fusion(module, computation):
        channel = one.attribute('channel_id') or one.name
        pieces.setdefault((one.op, channel), []).append((computation, one, times))
      else:
        yield computation, one, times
  for group in pieces.values():
    starts = [piece for piece in group if has_target(piece[0], 'AsyncCollectiveStart')]
    first = (starts or sorted(group, key=lambda piece: piece[2]))[0]
    yield first[0], first[1], sum(times for _, _, times in starts) or first[2]


def read(module: Module, computation: Computation, one: Instruction, executions: int,
         axes: dict[str, int], parts: Sequence[int], members: np.ndarray) -> Collective | None:
  """An instruction as a Collective, or None if no device sends anything."""
  kind, size = cast(Kind, base(one.op)), 1
  if kind == 'collective-permute':
    pairs = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', one.attributes)
    groups = [[int(n) for n in pair.split(',')] for pair in re.findall(r'[\d,]+(?=\})', pairs[1] if pairs else '')]
    groups = [pair for pair in groups if pair[0] != pair[1]]
  else:
    groups = replica_groups(one.attributes, len(members)).tolist()
    size = max(map(len, groups), default=1)
  groups = [members[group].tolist() for group in groups]
  if not groups or (size == 1 and kind != 'collective-permute'):
    return None
  arrays = [array for operand in computation.operands(one) for array in operand.arrays]
  whole = sum(array.nbytes for array in arrays) * (size if kind == 'all-gather' else 1)
  if kind == 'all-gather':
    arrays = [array for array in one.arrays if array.nbytes == size * max(a.nbytes for a in arrays)] or arrays
  if kind == 'all-reduce' and scatters(module, computation, one, size):
    kind = 'reduce-scatter'
  largest = max(arrays, key=lambda array: array.nbytes, default=Array('token', ()))
  return Collective(kind, spanned(groups, axes), largest.dtype, largest.shape, whole * share_sent(kind, size),
                    executions, overlapped(module, computation, one), op_name(module, computation, one),
                    share_outside(kind, groups, parts) if len(parts) else 0.0)


def share_sent(kind: Kind, size: int) -> float:
  """The bytes that a device sends, as a share of the whole array, in a group of this size."""
  return 1 if kind == 'collective-permute' else (size - 1) / size * (2 if kind == 'all-reduce' else 1)


def between_slices(module: Module, axes: dict[str, int], parts: Sequence[int]) -> Iterator[Collective]:
  """What TPU slices send each other: the operands of sends to the runtime that connects them.

  Their attributes name the kind of collective and the devices, by number as slice * 100000 + device or as sets of
  slices and of devices, `{1,2}x{0:3}`. Slices are numbered from 1.
  """
  for computation, times in module.executed():
    for one in computation:
      if one.op != 'send' or one.attribute('_xla_host_transfer_handler_name') != 'xla_megascale_runtime':
        continue
      named = (one.attribute('_xla_megascale_transfer_type') or '').lower().replace('_', '-')
      kind = cast(Kind, named if named in KINDS else 'collective-permute')
      array, slices = computation.operands(one)[0].arrays[0], slices_of(one.attributes)
      group = [place for number in slices for place in np.flatnonzero(np.array(parts) == number - 1)[:1].tolist()]
      whole = array.nbytes * (len(slices) if kind == 'all-gather' else 1)
      yield Collective(kind, spanned([group], axes) if len(parts) else (), array.dtype, array.shape,
                       whole * share_sent(kind, len(slices)), times, received_later(computation, one),
                       op_name(module, computation, one), 1.0)


def slices_of(attributes: str) -> list[int]:
  """The slices of the first group of devices that a transfer between slices names."""
  text = attributes.partition('_xla_megascale_target=')[2]
  if text.startswith('{{'):
    return sorted({int(device) // 100_000 for device in numbers(text[:text.index('}')])})
  found = re.match(r'"?\{([\d,:]+)\}', text)
  ranges = [numbers(part) for part in found[1].split(',')] if found else []
  return [number for part in ranges for number in range(part[0], part[-1] + 1)]


def received_later(computation: Computation, send: Instruction) -> bool:
  """Whether other compute is scheduled before what the other slices send has been received."""
  key, started = send.attribute('_xla_host_transfer_rendezvous'), False
  for other in computation:
    if other.name == send.name:
      started = True
    elif started and other.op == 'recv-done':
      received = computation.operands(other)
      if received and received[0].attribute('_xla_host_transfer_rendezvous') == key:
        return False
    elif started and computes(other):
      return True
  return True


def share_outside(kind: Kind, groups: Sequence[Sequence[int]], parts: Sequence[int]) -> float:
  """The share of what a device sends that goes over the network between slices or hosts.

  With l devices of a group in each part, rings for each of them leave the part once: 1/l, which is also what sums
  inside, across and inside again send. In an all-to-all each device sends to all others alike.
  """
  counts = [np.unique([parts[device] for device in group], return_counts=True)[1] for group in groups]
  if all(len(count) == 1 for count in counts):
    return 0.0
  if kind == 'collective-permute':
    return sum(len(count) > 1 for count in counts) / len(counts)
  inside, size = int(max(count.min() for count in counts)), max(map(len, groups))
  return (size - inside) / (size - 1) if kind == 'all-to-all' else 1 / inside


def base(op: str) -> str:
  """The opcode without -start or -done."""
  return op.removesuffix('-start').removesuffix('-done')


def replica_groups(attributes: str, devices: int) -> np.ndarray:
  """The groups of devices of a collective, as rows of an array.

  Lists `{{0,1},{2,3}}` (`{}` for all devices in one), iotas `[4,2]<=[2,4]T(1,0)`, and axes of a mesh
  `mesh['a'=4,'b'=2] {'a'}`, where `'a':(2)2` is the factor of size 2 of an axis after a factor of size 2.
  """
  text = attributes.partition('replica_groups=')[2]
  if text.startswith('{{'):
    groups = [[int(n) for n in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', text[:text.index('}}') + 1])]
    return np.array(groups)
  if text.startswith('mesh['):
    return mesh_groups(text)
  if found := re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    shape, dims, order = (numbers(part) for part in found.groups())
    return iota(dims, order).reshape(shape)
  return np.arange(devices)[None]


def mesh_groups(text: str) -> np.ndarray:
  """The groups in the form of a mesh and the axes of it that a group spans."""
  found = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?,? \{([^}]*)\}", text)
  assert found, text[:80]
  sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
  listed = found[2] or ''
  permuted = re.match(r'\[([\d,]+)\](?:T\(([\d,]+))?', listed)
  if permuted:
    ids = iota(numbers(permuted[1]), numbers(permuted[2]))
  else:
    ids = np.array(numbers(listed)) if listed else np.arange(math.prod(sizes.values()))
  dims: list[int] = []  # of the mesh, with an axis of which a group spans a factor split into factors
  places: dict[tuple[str, int], int] = {}  # of an axis, or of a factor that starts after a product of others
  spans = [(name, int(before or 1), int(size or sizes[name]))
           for name, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", found[3])]
  for name, size in sizes.items():
    cuts = sorted({1, size} | {cut for axis, start, length in spans if axis == name for cut in (start, start * length)})
    for start, end in itertools.pairwise(cuts):
      places[name, start] = len(dims)
      dims.append(end // start)
  inner = [places[name, start] for name, start, size in spans if size > 1]
  outer = [place for place in range(len(dims)) if place not in inner]
  return ids.reshape(dims).transpose(outer + inner).reshape(-1, math.prod(dims[place] for place in inner))


def iota(dims: list[int], order: list[int]) -> np.ndarray:
  ids = np.arange(math.prod(dims)).reshape(dims)
  return ids.transpose(order) if order else ids


def numbers(text: str | None) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text or '')]


def spanned(groups: list[list[int]], axes: dict[str, int]) -> tuple[str, ...]:
  """The mesh axes along which devices of a group differ."""
  sizes = tuple(axes.values())
  found = set()
  for group in groups:
    coordinates = np.stack(np.unravel_index(group, sizes))
    found.update(np.flatnonzero((coordinates != coordinates[:, :1]).any(axis=1)).tolist())
  return tuple(name for place, name in enumerate(axes) if place in found)


def has_target(computation: Computation, target: str) -> bool:
  return any(one.attribute('custom_call_target') == target for one in computation if one.op == 'custom-call')


def in_async_fusion(module: Module, computation: Computation) -> bool:
  """Whether a computation is a piece of a TPU's asynchronous collective fusion."""
  return (computation.name.startswith('async_collective_fusion') or has_target(computation, 'AsyncCollectiveStart')
          or has_target(computation, 'AsyncCollectiveDone'))


def scatters(module: Module, computation: Computation, one: Instruction, size: int) -> bool:
  """Whether an all-reduce is fused with a slice that keeps 1/size of it, which a TPU runs as a reduce-scatter."""
  _, caller = module.callers.get(computation.name, (None, None))
  if caller is None or 'kind=kCustom' not in caller.attributes:
    return False
  users = computation.users[one.name]
  while users and all(user.op in ('bitcast', 'reshape', 'copy', 'get-tuple-element') for user in users):
    users = [user for name in users for user in computation.users[name.name]]
  return bool(users) and all(user.op in ('dynamic-slice', 'slice') for user in users) and (
    sum(user.nbytes for user in users) * size == one.nbytes)


def overlapped(module: Module, computation: Computation, one: Instruction) -> bool:
  """Whether other compute is scheduled between the start and the end of a collective.

  The pieces of a TPU's asynchronous collective fusion run beside the compute that they are fused with. A start whose
  end is in another computation, such as the next iteration of a loop, is under way during all that lies between.
  """
  if in_async_fusion(module, computation):
    return True
  if not one.op.endswith('-start'):
    caller_computation, caller = module.callers.get(computation.name, (None, None))
    if caller_computation is None or caller is None or caller.op != 'async-start':
      return False
    computation, one = caller_computation, caller
  if '"is_sync":true' in one.attributes:
    return False
  started, names = False, {one.name}
  for other in computation:
    if other.name == one.name:
      started = True
    elif started and names.intersection(other.operands):
      if other.op.endswith('-done'):
        return False
      names.add(other.name)  # an update, or an element of the start's tuple
    elif started and computes(other):
      return True
  return True


def computes(one: Instruction) -> bool:
  """Whether an instruction is work on an array; arithmetic on a loop's counter is not."""
  return one.op in COMPUTE and any(math.prod(array.shape) > 1 for array in one.arrays)


def op_name(module: Module, computation: Computation, one: Instruction) -> str:
  """The path in the traced function, that of the instruction that calls the computation if it has none itself."""
  while (name := one.attribute('op_name')) is None:
    if computation.name not in module.callers:
      return ''
    computation, one = module.callers[computation.name]
  return name
