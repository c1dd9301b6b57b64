"""How often a loop of a compiled program runs: from the compiler's note, else from the loop's own counter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from llm_jax.extras.plan.hlo import Computation, Instruction

Computations = Mapping[str, 'Computation']
Callers = Mapping[str, tuple['Computation', 'Instruction']]
COPIES = ('copy', 'bitcast', 'convert', 'reshape', 'copy-start', 'copy-done')


def trips(computations: Computations, callers: Callers, caller: Computation, loop: Instruction) -> int:
  """Iterations of a while loop; 1 if they depend on data.

  The counter is the element of the loop's tuple that the condition compares with a bound. Iterations are
  (bound - start) / step, with the start from the loop's operand and the step from one evaluation of the body.
  """
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if noted:
    return int(noted[1])
  values = Values(computations, callers)
  condition, body = (computations[loop.attribute(name) or ''] for name in ('condition', 'body'))
  compared = values.comparison(condition)
  if compared is None:
    return 1
  (left, right), direction = compared
  for counter, bound, sign in ((left, right, 1), (right, left, -1)):
    index = values.element(condition, counter)
    if index is None:
      continue
    start = values.initial(caller, loop, index)
    limit = values.inside(caller, loop, condition, bound)
    after = None if start is None else values.after(caller, loop, body, index, start)
    if start is None or limit is None or after is None or after == start:
      continue
    distance, step = limit - start, after - start
    if direction == ('LE' if sign * step > 0 else 'GE'):
      distance += 1 if step > 0 else -1
    return max(0, -(-distance // step))
  return 1


class Values:
  """Evaluates integer scalars of a program as far as they follow from constants."""

  def __init__(self, computations: Computations, callers: Callers) -> None:
    self.computations, self.callers = computations, callers

  def comparison(self, condition: Computation) -> tuple[tuple[str, str], str] | None:
    """The two names in the condition that its root compares, also inside a fusion, and the direction."""
    root = condition.root
    if root.op == 'compare':
      return (root.operands[0], root.operands[1]), root.attribute('direction') or 'LT'
    inner = self.computations.get(root.called[0]) if root.op == 'fusion' and root.called else None
    if inner is None or inner.root.op != 'compare':
      return None
    names = []
    for name in inner.root.operands:
      one = plain(inner, name)
      names.append(root.operands[int(one.argument)] if one.op == 'parameter' else f'{inner.name}/{one.name}')
    return (names[0], names[1]), inner.root.attribute('direction') or 'LT'

  def find(self, computation: Computation, name: str) -> tuple[Computation, Instruction]:
    """The instruction of a name, which has its computation before a slash if it is inside a fusion."""
    inner, slash, last = name.partition('/')
    place = self.computations[inner] if slash else computation
    return place, plain(place, last if slash else name)

  def element(self, computation: Computation, name: str) -> int | None:
    """Which element of the computation's tuple the name is, if it is one."""
    place, one = self.find(computation, name)
    if one.op != 'get-tuple-element' or place.instructions[one.operands[0]].op != 'parameter':
      return None
    return int(one.attribute('index') or 0)

  def initial(self, caller: Computation, loop: Instruction, index: int) -> int | None:
    """The value with which an element of a loop's tuple starts."""
    operand = plain(caller, loop.operands[0])
    if operand.op != 'tuple' or index >= len(operand.operands):
      return None
    return self.value(caller, operand.operands[index], {})

  def inside(self, caller: Computation, loop: Instruction, computation: Computation, name: str) -> int | None:
    """A value in a loop's condition that is a constant or that the loop passes on unchanged."""
    index = self.element(computation, name)
    if index is None:
      return self.value(computation, name, {})
    body = self.computations[loop.attribute('body') or '']
    if body.root.op != 'tuple' or self.element(body, body.root.operands[index]) != index:
      return None
    return self.initial(caller, loop, index)

  def after(self, caller: Computation, loop: Instruction, body: Computation, index: int, start: int) -> int | None:
    """The value of an element of the tuple after the first iteration."""
    if body.root.op != 'tuple':
      return None
    known = {index: start}
    operand = plain(caller, loop.operands[0])
    for other in range(len(operand.operands) if operand.op == 'tuple' else 0):
      if other != index and (value := self.value(caller, operand.operands[other], {})) is not None:
        known[other] = value
    return self.value(body, body.root.operands[index], known)

  def value(self, computation: Computation, name: str, known: Mapping[int, int]) -> int | None:
    """The value of a scalar, with `known` elements of the tuple that is the computation's parameter."""
    place, one = self.find(computation, name)
    if one.op == 'constant':
      return int(one.argument) if re.fullmatch(r'-?\d+', one.argument) else None
    if one.op == 'get-tuple-element':
      return self.passed(place, one, known)
    if one.op in ('add', 'subtract', 'multiply'):
      left, right = (self.value(place, operand, known) for operand in one.operands)
      if left is None or right is None:
        return None
      return left + right if one.op == 'add' else left - right if one.op == 'subtract' else left * right
    if one.op == 'fusion' and one.called:
      inner = self.computations[one.called[0]]
      given = {n: self.value(place, operand, known) for n, operand in enumerate(one.operands)}
      return self.in_fusion(inner, inner.root.name, given)
    return None

  def passed(self, place: Computation, one: Instruction, known: Mapping[int, int]) -> int | None:
    """The value of an element of a tuple: known, or passed unchanged through the loop around this computation."""
    source, index = plain(place, one.operands[0]), int(one.attribute('index') or 0)
    if source.op == 'tuple':
      return self.value(place, source.operands[index], known)
    if source.op != 'parameter':
      return None
    if index in known:
      return known[index]
    caller, loop = self.callers.get(place.name, (None, None))
    if caller is None or loop is None or loop.op != 'while':
      return None
    return self.inside(caller, loop, place, one.name)

  def in_fusion(self, inner: Computation, name: str, given: Mapping[int, int | None]) -> int | None:
    """The value of a scalar in a fusion whose parameters have the given values."""
    one = plain(inner, name)
    if one.op == 'parameter':
      return given.get(int(one.argument))
    if one.op in ('add', 'subtract', 'multiply'):
      left, right = (self.in_fusion(inner, operand, given) for operand in one.operands)
      if left is None or right is None:
        return None
      return left + right if one.op == 'add' else left - right if one.op == 'subtract' else left * right
    return self.value(inner, one.name, {}) if one.op == 'constant' else None


def plain(computation: Computation, name: str) -> Instruction:
  """The instruction of a name, through copies and conversions."""
  one = computation.instructions[name]
  while one.op in COPIES and one.operands:
    one = computation.instructions[one.operands[0]]
  return one
