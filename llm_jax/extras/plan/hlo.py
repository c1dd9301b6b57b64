"""Parses the text of a compiled program (optimized HLO of XLA's CPU, GPU and TPU compilers) and counts executions."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from llm_jax.extras.plan import loops

COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
START = re.compile(r'  (ROOT )?%([\w.\-]+) = ')
ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
OPCODE = re.compile(r' ?([a-z][\w\-]*)\(')
CALLED = re.compile(r'\b(?:to_apply|calls|body|condition|branch_computations|true_computation|false_computation|'
                    r'called_computations)=(?:%([\w.\-]+)|\{([^}]*)\})')
NAME = re.compile(r'%([\w.\-]+)')
# Custom calls by which a TPU's compiler manages memory and hints, and which run no kernel.
HELPERS = {'AllocateBuffer', 'AssumeGatherIndicesInBound', 'AsyncCollectiveDone', 'AsyncCollectiveStart',
           'ConcatBitcast', 'GatherScatterIndicesBitpacked', 'Sharding', 'SPMDFullToShardShape',
           'SPMDShardToFullShape'}


class Array(NamedTuple):
  """The type of an array: dtype, dimensions and the memory that the layout names (0 is HBM)."""
  dtype: str
  shape: tuple[int, ...]
  space: int = 0

  @property
  def nbytes(self) -> int:
    """Bytes without a layout's padding; types of less than a byte are packed."""
    return math.ceil(math.prod(self.shape) * bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One instruction of a computation.

  `arrays` are those of the result, a tuple's in order; `operands` are names in the same computation; `argument` is the
  text in the parentheses, such as the number of a parameter; `attributes` is all the text that follows.
  """
  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  argument: str
  attributes: str

  @property
  def nbytes(self) -> int:
    return sum(array.nbytes for array in self.arrays)

  def attribute(self, name: str) -> str | None:
    """A value such as a number, a quoted text without its quotes, or a name without its %."""
    found = re.search(rf'\b{name}=(?:"([^"]*)"|%?([\w.\-]+))', self.attributes)
    return found and (found[1] or found[2])

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that the instruction calls."""
    return tuple(name for one, many in CALLED.findall(self.attributes.partition(', metadata=')[0])
                 for name in (NAME.findall(many) if many else [one]))


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
  """Instructions by name, in the order of the text, which is the schedule in a compiled program."""
  name: str
  instructions: dict[str, Instruction]
  root: Instruction

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(one.argument): one for one in self if one.op == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The instructions that have the named one as an operand."""
    users = collections.defaultdict(list)
    for one in self:
      for name in dict.fromkeys(one.operands):
        users[name].append(one)
    return users

  def operands(self, one: Instruction) -> list[Instruction]:
    return [self.instructions[name] for name in one.operands if name in self.instructions]

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
  """A parsed program.

  `executions` has how often each computation runs in a call of the program, `callers` the instruction (and its
  computation) that calls it, the first one in the text if several do.
  """
  computations: dict[str, Computation]
  entry: str
  executions: dict[str, int]
  callers: dict[str, tuple[Computation, Instruction]]
  tpu: bool

  def executed(self) -> Iterator[tuple[Computation, int]]:
    """Computations that run at least once, and how often."""
    for name, computation in self.computations.items():
      if self.executions.get(name):
        yield computation, self.executions[name]


def bits(dtype: str) -> int:
  """Bits of an element; 0 for a token."""
  if dtype == 'pred':
    return 8
  found = re.match(r'(?:bf|f|s|u|c)(\d+)', dtype)
  return int(found[1]) if found else 0


def arrays_of(text: str) -> tuple[Array, ...]:
  """The arrays in the text of a type, in order."""
  found = []
  for dtype, dims, layout in ARRAY.findall(text):
    space = re.search(r'S\((\d+)\)', layout)
    shape = tuple(int(n.removeprefix('<=')) for n in dims.split(',') if n)
    found.append(Array(dtype, shape, int(space[1]) if space else 0))
  return tuple(found)


def closing(text: str, start: int) -> int:
  """The place of the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r'[()]').finditer(text, start):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.start()
  return len(text)


def parse_instruction(text: str) -> Instruction:
  """An instruction from its lines, joined."""
  head = START.match(text)
  assert head, text[:80]
  start = head.end()
  end = closing(text, start) + 1 if text[start] == '(' else text.index(' ', start)  # of the result's type
  opcode = OPCODE.match(text, end)
  assert opcode, text[:200]
  last = closing(text, opcode.end() - 1)
  argument = text[opcode.end():last]
  names = () if opcode[1] in ('constant', 'parameter') else tuple(NAME.findall(argument))
  return Instruction(head[2], opcode[1], arrays_of(text[start:end]), names, argument, text[last + 1:])


def parse_computations(text: str) -> tuple[dict[str, Computation], str]:
  """Computations by name, and the name of the entry."""
  computations: dict[str, Computation] = {}
  pieces: list[str] = []
  entry = name = root = ''
  for line in text.splitlines():
    if not name:
      if head := COMPUTATION.match(line):
        name, pieces, root = head[2], [], ''
        entry = name if head[1] else entry
    elif line == '}' or line.startswith('}, execution_thread'):
      instructions = {one.name: one for one in map(parse_instruction, pieces)}
      last = root or next(reversed(instructions))
      computations[name] = Computation(name, instructions, instructions[last])
      name = ''
    elif head := START.match(line):
      pieces.append(line)
      root = head[2] if head[1] else root
    elif pieces:  # an attribute with a line break in it
      pieces[-1] += line
  return computations, entry


def parse(text: str) -> Module:
  """Parses a program and counts executions.

  A loop's body counts once an iteration, its condition once more. Each branch of a conditional counts as if it were
  taken whenever the conditional is reached, so that what only one branch does is never missed and the sum over branches
  is an upper bound.
  """
  computations, entry = parse_computations(text)
  executions: collections.Counter[str] = collections.Counter({entry: 1})
  callers: dict[str, tuple[Computation, Instruction]] = {}
  for computation in callers_first(computations, entry):
    times = executions[computation.name]
    for one in computation:
      if one.op.endswith(('-done', '-update')):  # which name the computation that the start ran
        continue
      rounds = loops.trips(computations, callers, computation, one) if one.op == 'while' else 1
      for name in one.called:
        executions[name] += times * (rounds + 1 if name == one.attribute('condition') else rounds)
        callers.setdefault(name, (computation, one))
  return Module(computations, entry, dict(executions), callers, ':T(' in text)


def callers_first(computations: dict[str, Computation], entry: str) -> list[Computation]:
  """The computations that the entry reaches, each after all that call it."""
  order: dict[str, None] = {}

  def visit(name: str) -> None:
    if name in order or name not in computations:
      return
    for one in computations[name]:
      for called in one.called:
        visit(called)
    order[name] = None

  visit(entry)
  return [computations[name] for name in reversed(order)]


def kernels(text: str) -> dict[str, int]:
  """Executions of kernels that are not XLA's own code, by name, the most executed first.

  They are custom calls (a Pallas kernel by its own name, a library's by the call's target, such as __cudnn$fmhaSoftmax)
  and fusions that Triton or cuDNN compiles, by the kind in their configuration.
  """
  found: collections.Counter[str] = collections.Counter()
  for computation, times in parse(text).executed():
    for one in computation:
      if name := kernel_name(one):
        found[name] += times
  return dict(found.most_common())


def kernel_name(one: Instruction) -> str | None:
  """The name of the kernel that an instruction runs, or None."""
  if one.op == 'fusion' and 'kind=kCustom' in one.attributes:
    kind = re.search(r'"kind":"(__\w[^"]*)"', one.attributes)
    return kind and kind[1]
  target = one.attribute('custom_call_target') if one.op == 'custom-call' else None
  if target is None or target in HELPERS:
    return None
  if target not in ('tpu_custom_call', 'mosaic_gpu_v2', 'mosaic_gpu') and 'triton' not in target:
    return target
  own = re.search(r'\b(?:kernel_name|name) ?= ?"?([\w.\-]+)', one.attributes.partition('metadata=')[0])
  name = own[1] if own else re.sub(r'\.\d+$', '', one.name)
  if not own and name.startswith('custom-call'):  # the compiler's name; the path of the operation may have the kernel's
    path = (one.attribute('op_name') or '').split('/')
    name = path[-2] if path[-1:] == ['pallas_call'] and len(path) > 1 else target
  return name
