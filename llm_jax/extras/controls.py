"""Links after the optimizer from the records of modded-nanogpt's track 3: floors, cautious decay, tail averages.

They are in github.com/KellerJordan/modded-nanogpt, records/track_3_optimization. Dims: as in optim/muon.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Params
from llm_jax.base.params import ParamInfo
from llm_jax.base.ranges import at_least, decay, positive, share
from llm_jax.base.registry import register
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link
from llm_jax.optim.masks import Dims, check_declared, matrices, matrix_dims
from llm_jax.optim.matrices import as_matrices, from_matrices

EPS = 1e-8  # least norm of weights and of an update before the learning rate, as in the records
TINY = 1e-30  # so that zeros are not divided by 0


@dataclasses.dataclass(frozen=True)
class UpdateFloor(Link):
  """Scales small updates u of matrices w between hidden states up to |u| = learning rate * ratio * |w|.

  `per` matrix: the u/w floor of record 9, which replaces weight decay there (0.35); output: the row floor of record 46,
  for the weights of each output alone (0.3825; the record's radius pin, which follows there, is not part of it).
  """

  ratio: float = positive(0.35)  # least norm of an update before the learning rate, as a multiple of the weights' norm
  per: Literal['matrix', 'output'] = 'matrix'  # what has a norm of its own
  place = 'control'
  scales = True

  def check(self, optim: Any) -> None:
    if optim.weight_decay or any(group.scales for group in optim.groups.values()):
      raise ValueError('update_floor sets the size of updates, so they must not contain decay, and groups cannot scale '
                       f'them: set the optimizer\'s weight_decay to 0; got {optim.weight_decay}')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    check_declared(info)
    dims = matrix_dims(info)
    axes = (1, 2) if self.per == 'matrix' else (1,)

    def norm(x_SMN: jax.Array) -> jax.Array:
      largest = jnp.maximum(jnp.max(jnp.abs(x_SMN), axis=axes, keepdims=True), TINY)  # whose square may overflow
      return largest * jnp.linalg.norm(x_SMN / largest, axis=axes, keepdims=True)

    def update(updates: Params, step: jax.Array, params: Params) -> tuple[Params, jax.Array]:
      rate = schedule(step)

      def raised(u: jax.Array, p: jax.Array, d: Dims | None) -> jax.Array:
        if d is None:
          return u
        u_SMN = as_matrices(u, d)
        least = rate * self.ratio * jnp.maximum(norm(as_matrices(p, d)), EPS)
        return from_matrices(u_SMN * jnp.maximum(1, least / jnp.maximum(norm(u_SMN), rate * EPS + TINY)), u, d)

      return jax.tree.map(raised, updates, params, dims), optax.safe_increment(step)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


@dataclasses.dataclass(frozen=True)
class CautiousDecay(Link):
  """Decoupled decay of only the weights that the update shrinks, in place of the optimizer's decay.

  Algorithm 1 of arXiv 2510.12402: x = x - rate (u + weight_decay I(u x >= 0) x), entry by entry, for matrices and
  embeddings.
  """

  weight_decay: float = decay(0.1)  # times the learning rate of the schedule; factors of groups do not apply
  place = 'control'

  def check(self, optim: Any) -> None:
    if optim.weight_decay:
      raise ValueError(f'cautious_decay takes the place of the optimizer\'s weight_decay: set that to 0; got '
                       f'{optim.weight_decay}')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def update(updates: Params, step: jax.Array, params: Params) -> tuple[Params, jax.Array]:
      factor = self.weight_decay * schedule(step)
      updates = jax.tree.map(lambda u, p, decays: u - factor * jnp.where(u * p <= 0, p, 0) if decays else u,
                             updates, params, matrices(params))
      return updates, optax.safe_increment(step)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


class TailState(NamedTuple):
  average: Params
  step: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class TailEma(Link):
  """Evaluates and exports the weights part of the way to their average since step `start`; must be the last link.

  Record 45: a = w after step `start`, then a = a + (w - a) / horizon; evaluated is w + share (a - w). Tables of tokens
  are not averaged.
  """

  start: int = at_least(1, 2400)  # the step after which the average begins; before, the weights are evaluated
  horizon: float = at_least(1, 150.0)  # steps over which the average extends
  share: float = share(0.6)  # of the average in the evaluated weights
  place = 'control'
  averages = True

  def check(self, optim: Any) -> None:
    if optim.links[-1] != self:
      raise ValueError(f'tail_ema must be the last link of chain; got {", ".join(optim.chain)}')

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def averaged(p: jax.Array, i: ParamInfo) -> Any:
      return optax.MaskedNode() if i.is_table and 'vocab' in i.axes else jnp.copy(p)

    def init(params: Params) -> TailState:
      return TailState(jax.tree.map(averaged, params, info), jnp.zeros((), jnp.int32))

    def update(updates: Params, state: TailState, params: Params = None) -> tuple[Params, TailState]:
      step = optax.safe_increment(state.step)

      def moved(a: jax.Array, p: jax.Array, u: jax.Array) -> jax.Array:
        return jnp.where(step <= self.start, p + u, a + (p + u - a) / self.horizon)

      return updates, TailState(averages_or(lambda a, *_: a, moved, state.average, params, updates), step)

    return optax.GradientTransformation(init, update)

  def evaluated(self, state: TailState, params: Params) -> Params:
    return averages_or(lambda a, p: p, lambda a, p: p + self.share * (a - p), state.average, params)


def averages_or(without: Callable[..., Any], f: Callable[..., Any], average: Params, *trees: Params) -> Params:
  """The tree of f(average, *leaves), and of `without` where there is no average."""
  return jax.tree.map(lambda a, *leaves: (without if isinstance(a, optax.MaskedNode) else f)(a, *leaves),
                      average, *trees, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


for _name, _link in (('update_floor', UpdateFloor), ('cautious_decay', CautiousDecay), ('tail_ema', TailEma)):
  register(TRANSFORMS, _name, _link)
