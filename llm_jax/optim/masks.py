"""Which parameters a rule is meant for, by their path, and how a matrix lies in its array, by its logical axes."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers as Dims  # (reduction_axis, output_axis); other axes are a stack

from llm_jax.base.batch import Params
from llm_jax.base.trees import path_of

# Axes of tables that are looked up or read out, and of heads: no maps between hidden states.
TABLE_AXES = {'vocab', 'positions', 'norm'}


def matrices(params: Params) -> Params:
  """True at matrices and embeddings, False at norms and biases, stacked or not."""
  def is_matrix(path: tuple, leaf: Any) -> bool:
    return path[-1].key == 'w' or (path[-1].key not in ('b', 'bias', 'scale') and np.ndim(leaf) > 1)

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def matching(pattern: str, params: Params) -> Params:
  """True where the regular expression is found in the parameter's path."""
  return jax.tree_util.tree_map_with_path(lambda path, _: re.search(pattern, path_of(path)) is not None, params)


def is_axes(x: Any) -> bool:
  """Whether it is a leaf of a tree of logical axes: a tuple of names."""
  return isinstance(x, tuple)


def matrix_dims(axes: Params) -> Params:
  """Dims of every matrix between hidden states, None of all else.

  Its inputs, summed over, come first. A matrix reads `embed`, which is then its first axis, or writes it.
  """
  def dims(path: tuple, names: tuple[str, ...]) -> Dims | None:
    places = [i for i, name in enumerate(names) if name != 'layers']
    if path[-1].key != 'w' or len(places) < 2 or TABLE_AXES & set(names):
      return None
    if names[places[0]] == 'embed':
      return Dims(tuple(places[:1]), tuple(places[1:]))
    return Dims(tuple(places[:-1]), tuple(places[-1:])) if names[places[-1]] == 'embed' else None

  return jax.tree_util.tree_map_with_path(dims, axes, is_leaf=is_axes)


def as_matrices(x: jax.Array, dims: Dims) -> jax.Array:
  """[stack, inputs, outputs] of an array in which they lie as `dims` says."""
  rows, columns = dims
  stack = [i for i in range(x.ndim) if i not in (*rows, *columns)]
  sizes = [math.prod(x.shape[i] for i in part) for part in (stack, rows, columns)]
  return x.transpose(*stack, *rows, *columns).reshape(sizes)


def from_matrices(m: jax.Array, like: jax.Array, dims: Dims) -> jax.Array:
  """What `as_matrices` was given."""
  rows, columns = dims
  order = [i for i in range(like.ndim) if i not in (*rows, *columns)] + [*rows, *columns]
  return m.reshape([like.shape[i] for i in order]).transpose([order.index(i) for i in range(like.ndim)])
