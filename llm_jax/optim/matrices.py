"""Arrays as stacks of matrices, inputs by outputs, for links that work on whole matrices.

Dims: S stack of matrices, M inputs, N outputs of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from llm_jax.base.batch import Params
from llm_jax.optim.masks import Dims, check_declared, matrices, matrix_dims


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


def over_dims(f: Callable[..., Any], dims: Params, *trees: Params) -> Params:
  """The tree of f(dims, *leaves) over the matrices of a tree of Dims; other leaves of `dims` must be MaskedNode."""
  return jax.tree.map(f, dims, *trees, is_leaf=lambda x: isinstance(x, Dims))


def each_stack(f: Callable[[jax.Array], jax.Array], dims: Params) -> optax.GradientTransformation:
  """Applies f to each update as a stack [S, M, N]."""
  return optax.stateless(lambda updates, params: over_dims(
      lambda d, x: from_matrices(f(as_matrices(x, d)), x, d), dims, updates))


def with_adam(info: Params, of_matrices: Callable[[Params], optax.GradientTransformation],
              adam: optax.GradientTransformation, schedule: optax.Schedule,
              weight_decay: float) -> optax.GradientTransformation:
  """`of_matrices(dims)` for matrices between hidden states, `adam` for other parameters, with decoupled decay."""
  check_declared(info)
  dims = matrix_dims(info)
  is_leaf = lambda x: x is None or isinstance(x, Dims)  # noqa: E731
  labels = jax.tree.map(lambda d: 'adam' if d is None else 'matrices', dims, is_leaf=is_leaf)
  masked = jax.tree.map(lambda d: optax.MaskedNode() if d is None else d, dims, is_leaf=is_leaf)
  return optax.chain(optax.partition({'matrices': of_matrices(masked), 'adam': adam}, labels),
                     optax.add_decayed_weights(weight_decay, matrices), optax.scale_by_learning_rate(schedule))
