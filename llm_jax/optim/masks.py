"""Which parameters a rule is meant for, by their path."""

import jax

from llm_jax.types import Params


def matrices(params: Params) -> Params:
  """True at every matrix and embedding (leaves named `w`), False at norms and biases, stacked or not."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'w', params)
