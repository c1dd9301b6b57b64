"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).

Dims: S stack of matrices, M inputs, N outputs of each; A, C eigenvectors of either side.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.base.ranges import decay, epsilon, positive, rate
from llm_jax.base.registry import register
from llm_jax.extras.matrices import as_matrices, from_matrices
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link
from llm_jax.optim.masks import Dims, check_declared, matrices, matrix_dims


class Basis(NamedTuple):
  """Second moments of both sides of a parameter, and their eigenvectors in columns."""

  left_SMM: jax.Array
  right_SNN: jax.Array
  q_SMA: jax.Array
  q_SNC: jax.Array


class SoapState(NamedTuple):
  step: jax.Array  # int32
  mu: Params
  nu: Params  # in the eigenbasis
  bases: Params  # of Basis


@dataclasses.dataclass(frozen=True)
class Soap(Link):
  """SOAP for matrices between hidden states, AdamW for other parameters. Its bases are replicated on all devices.

  The bases are updated every `precondition_every` steps by one power iteration and a QR decomposition.
  """

  b1: float = rate(0.95)  # decay of the mean of gradients, per step
  b2: float = rate(0.95)  # decay of the mean of squared gradients, per step
  eps: float = epsilon(1e-8)  # added to the denominator
  weight_decay: float = decay(0.1)  # decoupled, times the learning rate; 0: none
  precondition_every: int = positive(10)  # steps between updates of the bases

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    check_declared(info)
    dims = matrix_dims(info)
    is_leaf = lambda x: x is None or isinstance(x, Dims)  # noqa: E731
    labels = jax.tree.map(lambda d: 'adam' if d is None else 'soap', dims, is_leaf=is_leaf)
    masked = jax.tree.map(lambda d: optax.MaskedNode() if d is None else d, dims, is_leaf=is_leaf)
    return optax.chain(
        optax.partition({'soap': scale_by_soap(masked, self.b1, self.b2, self.eps, self.precondition_every),
                         'adam': optax.scale_by_adam(self.b1, self.b2, self.eps)}, labels),
        optax.add_decayed_weights(self.weight_decay, matrices), optax.scale_by_learning_rate(schedule))


def scale_by_soap(dims: Params, b1: float, b2: float, eps: float, every: int) -> optax.GradientTransformation:
  """Adam's updates in the eigenbasis (algorithm 3 of the paper); `dims` is a tree of Dims."""

  def over(f, *trees: Params) -> Params:
    return jax.tree.map(f, dims, *trees, is_leaf=lambda x: isinstance(x, Dims))

  def init(params: Params) -> SoapState:
    def basis(d: Dims, p: jax.Array) -> Basis:
      S, M, N = as_matrices(p, d).shape
      left, right = (jnp.broadcast_to(jnp.eye(size), (S, size, size)) for size in (M, N))
      return Basis(jnp.zeros_like(left), jnp.zeros_like(right), left, right)

    return SoapState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params),
                     over(basis, params))

  def update(grads: Params, state: SoapState, params: Params = None) -> tuple[Params, SoapState]:
    count = optax.safe_increment(state.step)
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)

    def moments(d: Dims, g: jax.Array, basis: Basis) -> Basis:
      g_SMN = as_matrices(g, d)
      left = b2 * basis.left_SMM + (1 - b2) * jnp.einsum('SMN,SKN->SMK', g_SMN, g_SMN)
      right = b2 * basis.right_SNN + (1 - b2) * jnp.einsum('SMN,SMK->SNK', g_SMN, g_SMN)
      basis = basis._replace(left_SMM=left, right_SNN=right)
      return jax.lax.cond(state.step == 0, eigenbasis, lambda basis: basis, basis)

    bases = over(moments, grads, state.bases)

    def turned(d: Dims, x: jax.Array, basis: Basis) -> jax.Array:
      x_SAC = jnp.einsum('SMN,SMA,SNC->SAC', as_matrices(x, d), basis.q_SMA, basis.q_SNC)
      return from_matrices(x_SAC, x, d)

    def turned_back(d: Dims, x: jax.Array, basis: Basis) -> jax.Array:
      x_SMN = jnp.einsum('SAC,SMA,SNC->SMN', as_matrices(x, d), basis.q_SMA, basis.q_SNC)
      return from_matrices(x_SMN, x, d)

    nu = optax.tree.update_moment_per_elem_norm(over(turned, grads, bases), state.nu, b2, 2)
    mu_hat = optax.tree.bias_correction(over(turned, mu, bases), b1, count)
    nu_hat = optax.tree.bias_correction(nu, b2, count)
    updates = over(turned_back, jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat), bases)
    bases = over(lambda d, basis: jax.lax.cond(count % every == 0, iterated, lambda basis: basis, basis), bases)
    return updates, SoapState(count, mu, nu, bases)

  return optax.GradientTransformation(init, update)


def eigenbasis(basis: Basis) -> Basis:
  return basis._replace(q_SMA=jnp.linalg.eigh(basis.left_SMM)[1], q_SNC=jnp.linalg.eigh(basis.right_SNN)[1])


def iterated(basis: Basis) -> Basis:
  """One power iteration from the previous basis (algorithm 4)."""
  return basis._replace(q_SMA=jnp.linalg.qr(basis.left_SMM @ basis.q_SMA)[0],
                        q_SNC=jnp.linalg.qr(basis.right_SNN @ basis.q_SNC)[0])


register(TRANSFORMS, 'soap', Soap)
