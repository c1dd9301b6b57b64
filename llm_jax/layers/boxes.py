"""Boxes of parameters, which carry their logical axes and the roles of their dimensions through Flax's transforms."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct

from llm_jax.base.params import ParamInfo, Role


class Described(nn.LogicallyPartitioned, eq=False):
  """A boxed parameter with its logical axes and roles; an axis that a transform adds has the role batch."""

  roles: tuple[Role, ...] = flax.struct.field(default=(), pytree_node=False)

  def add_axis(self, index: int, params: dict[Any, Any]) -> Any:
    roles = (*self.roles[:index], 'batch', *self.roles[index:]) if self.roles else ()
    return super().add_axis(index, params).replace(roles=roles)

  def remove_axis(self, index: int, params: dict[Any, Any]) -> Any:
    return super().remove_axis(index, params).replace(roles=self.roles[:index] + self.roles[index + 1:])


def info_of(box: Any) -> ParamInfo:
  """The ParamInfo of a boxed parameter, or of a plain array, which has no logical axes."""
  value = getattr(box, 'value', box)
  axes = (*getattr(box, 'names', ()), *(None,) * value.ndim)[:value.ndim]
  return ParamInfo(axes, value.shape, getattr(box, 'roles', ()))
