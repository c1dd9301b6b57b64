"""Arrays as stacks of matrices, inputs by outputs, for links that work on whole matrices."""

from __future__ import annotations

import math

import jax

from llm_jax.optim.masks import Dims


def as_matrices(x: jax.Array, dims: Dims) -> jax.Array:
  """An array as [stack, inputs, outputs]; `dims` has the dimensions of inputs and outputs."""
  rows, columns = dims
  stack = [i for i in range(x.ndim) if i not in (*rows, *columns)]
  sizes = [math.prod(x.shape[i] for i in part) for part in (stack, rows, columns)]
  return x.transpose(*stack, *rows, *columns).reshape(sizes)


def stack_shape(x: jax.Array, dims: Dims) -> tuple[int, ...]:
  """The sizes that `as_matrices` merges into `stack`."""
  return tuple(size for i, size in enumerate(x.shape) if i not in (*dims.reduction_axis, *dims.output_axis))


def from_matrices(m: jax.Array, like: jax.Array, dims: Dims) -> jax.Array:
  """The inverse of `as_matrices`, in the shape of `like`."""
  rows, columns = dims
  order = [i for i in range(like.ndim) if i not in (*rows, *columns)] + [*rows, *columns]
  return m.reshape([like.shape[i] for i in order]).transpose([order.index(i) for i in range(like.ndim)])
