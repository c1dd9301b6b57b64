"""Trees of parameters: nested dicts of arrays, addressed by paths such as blocks/attn/q/w."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llm_jax.base.batch import Params


def path_of(path: tuple) -> str:
  """A key path as text: 'blocks/attn/q/w'."""
  return '/'.join(str(key.key) for key in path)


def leaf_name(path: tuple) -> str:
  """A key path of any tree as text: 'opt_state/1/0/mu/blocks/attn/q/w'."""
  return '/'.join(str(getattr(key, 'key', getattr(key, 'idx', getattr(key, 'name', key)))) for key in path)


def by_name(params: Params) -> dict[str, Any]:
  """{'blocks/attn/q/w': leaf}."""
  return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def split(params: Params, is_trainable: Callable[[tuple], bool]) -> tuple[Params, Params]:
  """(trainable, frozen): splits nested dicts in two; every leaf keeps its path."""
  def part(tree: Any, path: tuple, trainable: bool) -> Any:
    found = {}
    for key, value in tree.items():
      here = (*path, jax.tree_util.DictKey(key))
      if isinstance(value, dict):
        if below := part(value, here, trainable):
          found[key] = below
      elif is_trainable(here) == trainable:
        found[key] = value
    return found

  return part(params, (), True), part(params, (), False)


def merge(trainable: Params, frozen: Params) -> Params:
  """The inverse of `split`."""
  if not frozen:
    return trainable
  both = {**trainable, **frozen}
  for key in trainable.keys() & frozen.keys():
    both[key] = merge(trainable[key], frozen[key])
  return {key: both[key] for key in sorted(both)}
