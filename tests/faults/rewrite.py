"""Rewrites a checkpoint with other arrays; runs in a fork of the server, as it starts a JAX backend."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def embedding(tree: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
  """The tree with its first array of two dimensions or more changed."""
  import jax
  leaves, structure = jax.tree.flatten(tree)
  index = next(i for i, leaf in enumerate(leaves) if leaf.ndim >= 2)
  leaves[index] = change(leaves[index])
  return jax.tree.unflatten(structure, leaves)


def with_nan(array: np.ndarray) -> np.ndarray:
  array = array.copy()
  array.flat[array.size // 2] = np.nan
  return array


def renamed(tree: dict[str, Any]) -> dict[str, Any]:
  first = sorted(tree)[0]
  return {(f'{name}_old' if name == first else name): leaf for name, leaf in tree.items()}


CHANGES: dict[str, Callable[[Any], Any]] = {
    'float16': lambda tree: embedding(tree, lambda x: x.astype(np.float16)),
    'int32': lambda tree: embedding(tree, lambda x: x.astype(np.int32)),
    'transposed': lambda tree: embedding(tree, lambda x: np.ascontiguousarray(np.swapaxes(x, 0, 1))),
    'longer': lambda tree: embedding(tree, lambda x: np.concatenate([x, x[:1]])),
    'nan': lambda tree: embedding(tree, with_nan),
    'missing': lambda tree: {name: leaf for name, leaf in tree.items() if name != sorted(tree)[0]},
    'renamed': renamed,
    'extra': lambda tree: tree | {'surplus': np.ones((2, 2), np.float32)},
}


def main() -> None:
  """argv: the folder of a step, and one of CHANGES."""
  import orbax.checkpoint as ocp

  from faults.lab import item_arrays
  step, change = Path(sys.argv[1]).absolute(), sys.argv[2]
  tree = CHANGES[change](item_arrays(step / 'params'))
  shutil.rmtree(step / 'params')
  ocp.PyTreeCheckpointer().save(step / 'params', tree)
  (step / 'manifest.json').unlink(missing_ok=True)
