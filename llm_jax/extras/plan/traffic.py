"""Estimates the bytes that a compiled program reads from and writes to a device's memory (HBM)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llm_jax.extras.plan.collectives import KINDS, base
from llm_jax.extras.plan.hlo import HELPERS, Array, Computation, Instruction, Module, parse

CALLS = ('while', 'conditional', 'call', 'async-start')  # whose computations run as programs of their own
FREE = {*CALLS, 'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'partition-id', 'replica-id',
        'after-all', 'opt-barrier', 'add-dependency', 'domain', 'async-update', 'async-done', 'fusion-done', 'send',
        'send-done', 'recv', 'recv-done'}
SLICES = ('dynamic-slice', 'slice', 'gather')
# A slice of the result of one of these needs only a slice of the operand.
ELEMENTWISE = ('convert', 'copy', 'negate', 'reshape', 'transpose')


def hbm_bytes(text: str) -> float:
  """Bytes that one device reads and writes in HBM in a call of the program.

  Each instruction that runs on its own (a fusion, a product, a custom call, a copy, a collective) reads its operands
  once and writes its results once, times its executions. What stays inside a fusion costs nothing; a slice, or an
  update of a slice in place, costs the slice. Arrays in a TPU's on-chip memory and in a host's memory do not count.
  Rereads by a kernel, caches and a layout's padding are not modelled. Each branch of a conditional counts in full.
  """
  module = parse(text)
  return float(sum(times * sum(moved(module, computation, one) for one in computation)
                   for computation, times in programs(module)))


def programs(module: Module) -> Iterator[tuple[Computation, int]]:
  """The computations that are no part of a fusion or a reduction, and how often they run."""
  for computation, times in module.executed():
    name = computation.name
    while name in module.callers and module.callers[name][1].op in CALLS:
      name = module.callers[name][0].name
    if name == module.entry:
      yield computation, times


def moved(module: Module, computation: Computation, one: Instruction) -> int:
  """Bytes that one execution of an instruction reads and writes."""
  if one.op in FREE or (one.op == 'custom-call' and one.attribute('custom_call_target') in HELPERS):
    return 0
  if one.op in ('fusion', 'fusion-start'):
    return fusion_bytes(module, computation, one)
  operands = computation.operands(one)
  if base(one.op) in SLICES:
    return sliced(module, operands, one)
  if one.op in ('dynamic-update-slice', 'scatter'):
    return sum(hbm(module, operand.arrays) for operand in operands[1:]) + replaced(module, computation, one)
  # An asynchronous operation reads when it starts and writes when it is done.
  read = 0 if one.op.endswith('-done') else sum(hbm(module, operand.arrays) for operand in operands)
  written = 0 if one.op.endswith('-start') else hbm(module, one.arrays)
  return read + written


def in_hbm(module: Module, array: Array) -> bool:
  """Whether an array is in HBM; a GPU has memory for collectives, space 1, in it as well."""
  return array.space == 0 or (array.space == 1 and not module.tpu)


def hbm(module: Module, arrays: tuple[Array, ...]) -> int:
  return sum(array.nbytes for array in arrays if in_hbm(module, array))


def sliced(module: Module, operands: list[Instruction], one: Instruction) -> int:
  """Bytes of an instruction that takes a slice of its first operand."""
  if one.op.endswith('-done'):
    return hbm(module, one.arrays)
  result = one.arrays[len(operands)] if one.op.endswith('-start') else one.arrays[0]
  read = result.nbytes if hbm(module, operands[0].arrays) else 0
  return (read + sum(hbm(module, operand.arrays) for operand in operands[1:])
          + (0 if one.op.endswith('-start') else hbm(module, one.arrays)))


def replaced(module: Module, computation: Computation, one: Instruction) -> int:
  """Bytes that an update in place writes: those of the update."""
  update = computation.instructions[one.operands[1 if one.op == 'dynamic-update-slice' else -1]]
  return update.nbytes if hbm(module, one.arrays) else 0


def fusion_bytes(module: Module, computation: Computation, one: Instruction) -> int:
  """Bytes of a fusion: what it uses of its operands, and what it writes of its results.

  One that a GPU runs beside others has its operands and a context in the result of its start.
  """
  inner, arrays = module.computations[one.called[0]], one.arrays
  if one.op == 'fusion-start':
    arrays = arrays[sum(len(operand.arrays) for operand in computation.operands(one)):-1]
  read = 0
  for place, operand in enumerate(computation.operands(one)):
    if hbm(module, operand.arrays) and place in inner.parameters:
      whole = math.prod(operand.arrays[0].shape)
      part = min(whole, elements_read(module, inner, inner.parameters[place]))
      read += hbm(module, operand.arrays) * part // max(whole, 1)
  parts = inner.root.operands if inner.root.op == 'tuple' else (inner.root.name,)
  if inner.root.op == 'custom-call' or len(parts) != len(arrays):
    return read + hbm(module, async_results(inner, arrays))
  return read + sum(array.nbytes * elements_written(module, inner, name) // max(math.prod(array.shape), 1)
                    for name, array in zip(parts, arrays, strict=True) if in_hbm(module, array))


def async_results(inner: Computation, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
  """The arrays that a fusion around a collective of a TPU writes: of its start all results, of its end none."""
  target = inner.root.attribute('custom_call_target')
  if target == 'AsyncCollectiveDone':
    return ()
  if target != 'AsyncCollectiveStart':
    return arrays
  shapes = {array.shape for collective in inner.operands(inner.root) for array in collective.arrays}
  return tuple(array for array in arrays if array.shape in shapes)


def elements_read(module: Module, computation: Computation, source: Instruction, exact: bool = True) -> int:
  """How many elements of an array its users inside a fusion need; `exact` is False after a conversion."""
  whole = math.prod(source.arrays[0].shape) if source.arrays else 0
  total = 0
  for user in computation.users.get(source.name, []):
    first = user.operands[0] == source.name
    if user.op in SLICES and first:
      total += math.prod(user.arrays[0].shape)
    elif user.op == 'bitcast':
      total += elements_read(module, computation, user, exact)
    elif user.op in ELEMENTWISE:
      total += elements_read(module, computation, user, exact=False) if user is not computation.root else whole
    elif user.op == 'fusion':
      inner = module.computations[user.called[0]]
      total += sum(elements_read(module, inner, inner.parameters[place], exact)
                   for place, name in enumerate(user.operands) if name == source.name and place in inner.parameters)
    elif not (exact and passed_on(computation, user, first)):
      return whole
  return min(total, whole)


def passed_on(computation: Computation, user: Instruction, first: bool) -> bool:
  """Whether a user leaves an array in its place: the result's tuple, an update of a slice, a collective under way."""
  if user.op in KINDS or user.op == 'custom-call':
    return computation.name.startswith('async_collective_fusion') or (
      computation.root.attribute('custom_call_target') == 'AsyncCollectiveDone')
  return user.op == 'tuple' or (user.op in ('dynamic-update-slice', 'scatter') and first)


def elements_written(module: Module, computation: Computation, name: str) -> int:
  """How many elements of a fusion's result are written: none of a parameter, only the slice of an update in place."""
  one = computation.instructions[name]
  whole = math.prod(one.arrays[0].shape) if one.arrays else 0
  index = 0
  while one.op in ('bitcast', 'get-tuple-element'):
    index = int(one.attribute('index') or 0) if one.op == 'get-tuple-element' else index
    one = computation.instructions[one.operands[0]]
  if one.op == 'parameter' or (one.op in KINDS and computation.name.startswith('async_collective_fusion')):
    return 0
  if one.op in ('dynamic-update-slice', 'scatter'):
    update = computation.instructions[one.operands[1 if one.op == 'dynamic-update-slice' else -1]]
    return math.prod(update.arrays[0].shape)
  if one.op == 'fusion':
    inner = module.computations[one.called[0]]
    return elements_written(module, inner, inner.root.operands[index] if inner.root.op == 'tuple' else inner.root.name)
  return whole
