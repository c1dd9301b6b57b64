"""Parameter masks by path; fan-in and fan-out dimensions of each matrix, as its module declares them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers as Dims  # (reduction_axis, output_axis); other axes are a stack

from llm_jax.base.batch import Params
from llm_jax.base.trees import path_of


def matrices(params: Params) -> Params:
  """True at matrices and embeddings, False at norms and biases, stacked or not."""
  def is_matrix(path: tuple, leaf: Any) -> bool:
    return path[-1].key == 'w' or (path[-1].key not in ('b', 'bias', 'scale') and np.ndim(leaf) > 1)

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def matrix_dims(info: Params) -> Params:
  """Dims of each matrix between hidden states; None for tables, readouts, norms, biases and undeclared parameters."""
  return jax.tree.map(lambda p: Dims(p.inputs, p.outputs) if p.is_hidden_matrix else None, info)


def check_declared(info: Params) -> None:
  """Raises ValueError for parameters that could be matrices but do not declare fan-in and fan-out."""
  undeclared = [f'{path_of(path)} {p.shape} with axes ({", ".join(map(str, p.axes))})'
                for path, p in jax.tree_util.tree_leaves_with_path(info) if p.is_undeclared_matrix]
  if undeclared:
    raise ValueError(
        'chain: muon, soap and adaptive_grad_clip need fan-in and fan-out of every matrix, and these parameters do not '
        'declare them:\n  '
        + '\n  '.join(undeclared) + '\nCreate them with layers.linear.Einsum, or with layers.linear.weight(..., '
        "roles=('in', 'out')), one of batch, in, out, row per dimension; for tables and readouts, which Adam updates, "
        'declare an axis vocab, positions or norm; or use another optimizer')
