"""The table of parameters: shape, logical axes, mesh axes and bytes of a device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llm_jax.base.trees import path_of
from llm_jax.extras.plan.building import Built
from llm_jax.training.shardings import shard_bytes


@dataclasses.dataclass(frozen=True)
class Row:
  """One parameter."""

  name: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]  # logical
  spec: tuple[Any, ...]  # mesh axes of each dimension
  shard: tuple[int, ...]  # shape on a device
  bytes: int  # on a device


def parameter_rows(built: Built) -> list[Row]:
  """One row for each parameter, in the order of the tree."""
  infos = dict(jax.tree_util.tree_leaves_with_path(built.info, is_leaf=lambda x: hasattr(x, 'axes')))
  rows = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(built.abstract.params):
    spec = (*leaf.sharding.spec, *(None,) * leaf.ndim)[:leaf.ndim]
    rows.append(Row(path_of(path), leaf.shape, infos[path].axes, spec, leaf.sharding.shard_shape(leaf.shape),
                    shard_bytes(leaf)))
  return rows
