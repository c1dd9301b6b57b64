"""ParamInfo: what optimizers know about a parameter: logical axes, shape and the role of each dimension."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

# batch: the array holds one matrix per index (layers, experts); in: summed over by the product; out: a dimension of
# the result; row: indexed by lookups, as in a table of embeddings.
Role = Literal['batch', 'in', 'out', 'row']

# Logical axes that stack parameters. Add the axis of a new kind of stack: STACK_AXES.add('depth').
STACK_AXES: set[str | None] = {'layers', 'experts'}
# Logical axes of tables and readouts, which do not map hidden states to hidden states.
TABLE_AXES: set[str | None] = {'vocab', 'positions', 'norm'}


@dataclasses.dataclass(frozen=True)
class ParamInfo:
  """Logical axes, shape and roles of one parameter, one entry per dimension; a leaf in a tree with their structure.

  `roles` is empty where the module that owns the parameter does not declare them; see `weight` in layers/linear.py.
  """

  axes: tuple[str | None, ...]
  shape: tuple[int, ...]
  roles: tuple[Role, ...] = ()

  @property
  def batch(self) -> tuple[int, ...]:
    """Dimensions along which the array is a stack."""
    if not self.roles:
      return tuple(i for i, axis in enumerate(self.axes) if axis in STACK_AXES)
    return self._dims('batch')

  @property
  def inputs(self) -> tuple[int, ...]:
    return self._dims('in')

  @property
  def outputs(self) -> tuple[int, ...]:
    return self._dims('out')

  @property
  def fan_in(self) -> int:
    """The number of terms in each sum of the product; 1 for tables, norms, biases and undeclared parameters."""
    return math.prod(self.shape[i] for i in self.inputs)

  @property
  def fan_out(self) -> int:
    return math.prod(self.shape[i] for i in self.outputs)

  @property
  def is_table(self) -> bool:
    """Whether its rows are looked up: embeddings of tokens and positions."""
    return 'row' in self.roles

  @property
  def is_hidden_matrix(self) -> bool:
    """Whether it maps hidden states to hidden states, unlike tables, readouts, norms and biases."""
    return bool(self.inputs and self.outputs) and not TABLE_AXES & set(self.axes)

  @property
  def is_undeclared_matrix(self) -> bool:
    """Whether it could be a hidden matrix, but does not declare its roles."""
    return not self.roles and len(self.axes) - len(self.batch) > 1 and not TABLE_AXES & set(self.axes)

  def _dims(self, role: Role) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(self.roles) if name == role)
