"""NorMuon: Muon with one learning rate for each output (arXiv 2510.05491).

Dims: S stack of matrices, M inputs, N outputs of each.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.base.ranges import rate
from llm_jax.base.registry import register
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.masks import Dims
from llm_jax.optim.matrices import as_matrices, from_matrices, over_dims
from llm_jax.optim.muon import Muon, frobenius_norm, orthogonalized, shape_factor

EPS = 1e-10


@dataclasses.dataclass(frozen=True)
class NorMuon(Muon):
  """NorMuon: each output's weights of an orthogonalized update are divided by the root of their mean square so far.

  The whole is then scaled to an rms of consistent_rms (scale `moonshot`: algorithm 1 of arXiv 2510.05491), or to the
  norm before the division times sqrt(max(1, outputs / inputs)) (scale `jordan`: the authors' code, with nesterov).
  """

  b2: float = rate(0.95)  # decay of the mean square of each output's weights in an update, per step
  nesterov: bool = False  # look ahead along the momentum
  mix: Literal['corrected', 'uncorrected'] = 'uncorrected'  # with nesterov: as in NAdam, or Keller Jordan's

  def of_matrices(self, dims: Params) -> optax.GradientTransformation:
    return optax.chain(self.momentum(), self.normalized(dims))

  def normalized(self, dims: Params) -> optax.GradientTransformation:
    """Orthogonalizes momenta and normalizes the result; its state has the mean squares, [S, 1, N] for each stack."""
    def init(params: Params) -> Params:
      return over_dims(lambda d, p: jnp.zeros_like(as_matrices(p, d)[:, :1]), dims, params)

    def update(momenta: Params, state: Params, params: Params = None) -> tuple[Params, Params]:
      whole = over_dims(lambda d, m: orthogonalized(as_matrices(m, d), self.ns_steps), dims, momenta)
      squares = jax.tree.map(lambda v, o: self.b2 * v + (1 - self.b2) * jnp.mean(o * o, axis=1, keepdims=True),
                             state, whole)
      return over_dims(self.divided, dims, momenta, whole, squares), squares

    return optax.GradientTransformation(init, update)

  def divided(self, d: Dims, like: jax.Array, o_SMN: jax.Array, v_S1N: jax.Array) -> jax.Array:
    even = o_SMN / (jnp.sqrt(v_S1N) + EPS)
    _, M, N = o_SMN.shape
    size = (self.consistent_rms * (M * N) ** 0.5 if self.scale == 'moonshot'
            else shape_factor(self.scale, self.consistent_rms, o_SMN) * frobenius_norm(o_SMN))
    return from_matrices(even * size / (frobenius_norm(even) + EPS), like, d)


register(TRANSFORMS, 'normuon', NorMuon)
