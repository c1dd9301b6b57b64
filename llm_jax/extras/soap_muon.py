"""SOAP-Muon: Muon of a momentum that SOAP's second moments have whitened.

From records 14 and 44 of modded-nanogpt's track 3 (github.com/KellerJordan/modded-nanogpt, records/
track_3_optimization), without their trust gate, radius pin and schedules. Dims: as in soap.py.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.base.ranges import positive, rate
from llm_jax.base.registry import register
from llm_jax.extras.soap import Basis, Step, first_basis, observed, renewed, turned, turned_back, unzipped
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.masks import Dims
from llm_jax.optim.matrices import as_matrices, from_matrices, over_dims
from llm_jax.optim.muon import EXACT, MomentumState, Muon, frobenius_norm, orthogonalized, shape_factor

EPS = 1e-8


class SoapMuonState(NamedTuple):
  momentum: MomentumState
  nu: Params  # in the eigenbasis
  bases: Params  # of soap.Basis


@dataclasses.dataclass(frozen=True)
class SoapMuon(Muon):
  """SOAP-Muon: the momentum, divided in SOAP's eigenbasis by the root of its mean square, then orthogonalized.

  The bases are those of the gradients before the update; the first update is Muon's.
  """

  b2: float = rate(0.9)  # decay of the second moments and of the mean square, per step
  precondition_every: int = positive(1)  # steps between updates of the bases
  ns_steps: int = positive(12)  # Newton-Schulz iterations, with coefficients that end at singular values of 1
  mix: Literal['corrected', 'uncorrected'] = 'uncorrected'  # with nesterov: as in NAdam, or Keller Jordan's
  scale: Literal['moonshot', 'jordan'] = 'jordan'  # of updates by the shape of their matrix

  def of_matrices(self, dims: Params) -> optax.GradientTransformation:
    momentum = self.momentum()

    def init(params: Params) -> SoapMuonState:
      return SoapMuonState(momentum.init(params), optax.tree.zeros_like(params), over_dims(first_basis, dims, params))

    def update(grads: Params, state: SoapMuonState, params: Params = None) -> tuple[Params, SoapMuonState]:
      step = state.momentum.step
      ahead, moved = momentum.update(grads, state.momentum)

      def one(d: Dims, g: jax.Array, u: jax.Array, v: jax.Array, basis: Basis) -> Step:
        u_SMN, v_SAC = as_matrices(u, d), as_matrices(v, d)
        u_SAC = turned(u_SMN, basis)
        v_SAC = jnp.where(step > 0, self.b2 * v_SAC + (1 - self.b2) * u_SAC**2, v_SAC)
        white_SMN = turned_back(u_SAC / jnp.sqrt(jnp.maximum(v_SAC, EPS**2)), basis)
        update_SMN = self.finish(jnp.where(step > 0, white_SMN, u_SMN))
        basis, v_SAC = renewed(observed(as_matrices(g, d), basis, self.b2), v_SAC, step, self.precondition_every)
        return Step(from_matrices(update_SMN, g, d), from_matrices(v_SAC, v, d), basis)

      updates, nu, bases = unzipped(over_dims(one, dims, grads, ahead, state.nu, state.bases))
      return updates, SoapMuonState(moved, nu, bases)

    return optax.GradientTransformation(init, update)

  def finish(self, x_SMN: jax.Array) -> jax.Array:
    factor = shape_factor(self.scale, self.consistent_rms, x_SMN)
    return factor * orthogonalized(x_SMN, self.ns_steps, EXACT, schatten_norm)


def schatten_norm(x_SMN: jax.Array) -> jax.Array:
  """The fourth root of the sum of the singular values' fourth powers: nearer to the largest than the norm of all."""
  return jnp.sqrt(frobenius_norm(x_SMN @ jnp.swapaxes(x_SMN, 1, 2)))


register(TRANSFORMS, 'soap_muon', SoapMuon)
