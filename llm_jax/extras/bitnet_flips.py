"""A link that logs how many codes of quantized matrices each update changes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.registry import register
from llm_jax.base.trees import path_of
from llm_jax.extras.bitnet import weight_codes
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link
from llm_jax.optim.masks import Dims, matrix_dims
from llm_jax.optim.matrices import as_matrices


@dataclasses.dataclass(frozen=True)
class BitnetFlips(Link):
  """Logs the share of each matrix's codes that an update changed (see extras/bitnet.py); does not change updates."""

  weight_bits: Literal['1.58', '1'] = '1.58'  # that of model.bitnet
  place = 'control'

  def problems(self, config: Any) -> list[str]:
    bitnet = config.model.sections.get('bitnet') if getattr(config.model, 'einsum', '') == 'bitnet' else None
    if bitnet is not None and bitnet.weight_bits == self.weight_bits:
      return []
    return [f'optim.bitnet_flips needs model.einsum bitnet with weight_bits {self.weight_bits}; the model has '
            f'{getattr(config.model, "einsum", "no einsum")} {bitnet.weight_bits if bitnet else ""}'.rstrip()]

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    dims = matrix_dims(info)

    def codes(p: jax.Array, d: Dims) -> jax.Array:
      return jax.vmap(lambda w: weight_codes(w, self.weight_bits)[0])(as_matrices(p, d))

    def over_matrices(f: Any, *trees: Params) -> dict[str, jax.Array]:
      leaves = [dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in trees]
      found = jax.tree_util.tree_leaves_with_path(dims, is_leaf=lambda x: isinstance(x, Dims))
      return {path_of(path[:-1]): f(d, *(leaf[path] for leaf in leaves)) for path, d in found if path in leaves[0]}

    def init(params: Params) -> dict[str, jax.Array]:
      return over_matrices(lambda d, p: jnp.zeros(as_matrices(p, d).shape[0]), params)

    def update(updates: Params, state: dict[str, jax.Array],
               params: Params = None) -> tuple[Params, dict[str, jax.Array]]:
      del state
      return updates, over_matrices(
          lambda d, p, u: jnp.mean(codes(p, d) != codes(p + u, d), axis=(1, 2)), params, updates)

    return optax.GradientTransformation(init, update)

  def report(self, state: dict[str, jax.Array]) -> Metrics:
    return {f'{path}/flipped/{i:02}': share for path, shares in state.items() for i, share in enumerate(shares)}


register(TRANSFORMS, 'bitnet_flips', BitnetFlips)
