"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).

Dims: S stack of matrices, M inputs, N outputs of each; A, C eigenvectors of either side, by falling eigenvalues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.base.ranges import decay, epsilon, positive, rate
from llm_jax.base.registry import register
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link
from llm_jax.optim.masks import Dims
from llm_jax.optim.matrices import as_matrices, from_matrices, over_dims, with_adam


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


class Step(NamedTuple):
  """What one update makes of one parameter."""

  update: jax.Array
  nu: jax.Array
  basis: Basis


@dataclasses.dataclass(frozen=True)
class Soap(Link):
  """SOAP for matrices between hidden states, AdamW for other parameters. Its bases are replicated on all devices.

  The bases are updated every `precondition_every` steps by one power iteration and a QR decomposition. As in the
  authors' soap.py, an update uses the basis of the gradients before it, so the first gradient only makes the bases.
  """

  b1: float = rate(0.95)  # decay of the mean of gradients, per step
  b2: float = rate(0.95)  # decay of the mean of squared gradients, per step
  eps: float = epsilon(1e-8)  # added to the denominator
  weight_decay: float = decay(0.1)  # decoupled, times the learning rate; 0: none
  precondition_every: int = positive(10)  # steps between updates of the bases

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    return with_adam(info, lambda dims: scale_by_soap(dims, self.b1, self.b2, self.eps, self.precondition_every),
                     optax.scale_by_adam(self.b1, self.b2, self.eps), schedule, self.weight_decay)


def scale_by_soap(dims: Params, b1: float, b2: float, eps: float, every: int) -> optax.GradientTransformation:
  """Adam's updates in the eigenbasis (algorithm 3 of the paper, in the order of soap.py); `dims` is a tree of Dims."""

  def init(params: Params) -> SoapState:
    return SoapState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params),
                     over_dims(first_basis, dims, params))

  def update(grads: Params, state: SoapState, params: Params = None) -> tuple[Params, SoapState]:
    begun = state.step > 0  # whether there is a basis
    mu = optax.tree.where(begun, optax.tree.update_moment(grads, state.mu, b1, 1), state.mu)
    count = jnp.maximum(state.step, 1)  # of the moments
    factor = begun * jnp.sqrt(1 - b2**count) / (1 - b1**count)

    def one(d: Dims, g: jax.Array, m: jax.Array, v: jax.Array, basis: Basis) -> Step:
      g_SMN, v_SAC = as_matrices(g, d), as_matrices(v, d)
      v_SAC = jnp.where(begun, b2 * v_SAC + (1 - b2) * turned(g_SMN, basis) ** 2, v_SAC)
      u_SMN = turned_back(factor * turned(as_matrices(m, d), basis) / (jnp.sqrt(v_SAC) + eps), basis)
      basis, v_SAC = renewed(observed(g_SMN, basis, b2), v_SAC, state.step, every)
      return Step(from_matrices(u_SMN, g, d), from_matrices(v_SAC, v, d), basis)

    updates, nu, bases = unzipped(over_dims(one, dims, grads, mu, state.nu, state.bases))
    return updates, SoapState(optax.safe_increment(state.step), mu, nu, bases)

  return optax.GradientTransformation(init, update)


def unzipped(steps: Params) -> tuple[Params, Params, Params]:
  """(updates, second moments, bases) of a tree of Steps."""
  part = lambda i: jax.tree.map(lambda step: step[i], steps, is_leaf=lambda x: isinstance(x, Step))  # noqa: E731
  return part(0), part(1), part(2)


def first_basis(d: Dims, p: jax.Array) -> Basis:
  """No moments, and identities as eigenvectors."""
  S, M, N = as_matrices(p, d).shape
  left, right = (jnp.broadcast_to(jnp.eye(size), (S, size, size)) for size in (M, N))
  return Basis(jnp.zeros_like(left), jnp.zeros_like(right), left, right)


def turned(x_SMN: jax.Array, basis: Basis) -> jax.Array:
  """x in the eigenbasis, [S, A, C]."""
  return jnp.einsum('SMN,SMA,SNC->SAC', x_SMN, basis.q_SMA, basis.q_SNC)


def turned_back(x_SAC: jax.Array, basis: Basis) -> jax.Array:
  return jnp.einsum('SAC,SMA,SNC->SMN', x_SAC, basis.q_SMA, basis.q_SNC)


def observed(g_SMN: jax.Array, basis: Basis, b2: float) -> Basis:
  """The basis with a gradient in its moments."""
  left = b2 * basis.left_SMM + (1 - b2) * jnp.einsum('SMN,SKN->SMK', g_SMN, g_SMN)
  right = b2 * basis.right_SNN + (1 - b2) * jnp.einsum('SMN,SMK->SNK', g_SMN, g_SMN)
  return basis._replace(left_SMM=left, right_SNN=right)


def renewed(basis: Basis, v_SAC: jax.Array, step: jax.Array, every: int) -> tuple[Basis, jax.Array]:
  """(basis, second moments in it): eigenvectors at step 0, one power iteration at each multiple of `every`."""
  kind = jnp.where(step == 0, 1, jnp.where(step % every == 0, 2, 0))
  return jax.lax.switch(kind, [lambda *same: same, eigenbasis, iterated], basis, v_SAC)


def one_by_one(f: Callable[[jax.Array], jax.Array], x_SMM: jax.Array) -> jax.Array:
  """f of each matrix. On CPUs in sequence: stacks of QR wait for each other's threads, for ever if there are few."""
  return jax.lax.platform_dependent(x_SMM, cpu=lambda x: jax.lax.map(f, x), default=jax.vmap(f))


def eigenbasis(basis: Basis, v_SAC: jax.Array) -> tuple[Basis, jax.Array]:
  def falling(moments: jax.Array) -> jax.Array:
    return jnp.flip(one_by_one(lambda m: jnp.linalg.eigh(m)[1], moments), -1)

  return basis._replace(q_SMA=falling(basis.left_SMM), q_SNC=falling(basis.right_SNN)), v_SAC


def iterated(basis: Basis, v_SAC: jax.Array) -> tuple[Basis, jax.Array]:
  """One power iteration (algorithm 4) from the previous basis, sorted by its estimated eigenvalues, as are the moments.

  The sorting is not in the paper; it is in soap.py.
  """
  def side(moments: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    power = moments @ q
    order = jnp.argsort(jnp.sum(q * power, axis=1), descending=True)
    return one_by_one(lambda m: jnp.linalg.qr(m)[0], jnp.take_along_axis(power, order[:, None, :], -1)), order

  q_SMA, order_SA = side(basis.left_SMM, basis.q_SMA)
  q_SNC, order_SC = side(basis.right_SNN, basis.q_SNC)
  v_SAC = jnp.take_along_axis(jnp.take_along_axis(v_SAC, order_SA[:, :, None], 1), order_SC[:, None, :], 2)
  return basis._replace(q_SMA=q_SMA, q_SNC=q_SNC), v_SAC


register(TRANSFORMS, 'soap', Soap)
