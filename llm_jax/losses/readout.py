"""Losses over tokens as plain functions, in float32, with the logits of one chunk of tokens in memory at a time.

Dims: B batch, T length, M chunks, C length of a chunk, S shards of the batch (of its rows, and of their length),
R rows of each, D embed, V vocab.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import PartitionSpec as P

from llm_jax.base.devices import platform
from llm_jax.base.sharding import (
  batch_axes,
  beside_weights,
  constrain,
  gathered,
  num_batch_shards,
  num_length_shards,
  shared_inside,
)

# Of float32 logits per device. With smaller chunks, accumulating the weight's gradient is slow; with one chunk devices
# sum and shard it while it is computed.
CHUNK_BYTES = {'cpu': 2**29, 'tpu': 2**30, 'gpu': 2**31}


def chunk_bytes(platform: str) -> int:
  """CHUNK_BYTES of a platform; those of CPUs for other kinds of devices."""
  return CHUNK_BYTES.get(platform, CHUNK_BYTES['cpu'])


@flax.struct.dataclass
class Readout:
  """Logits in factored form: project(w, x_BTD) -> float32 [B, T, V], independently for each token."""

  x_BTD: jax.Array
  w: Any  # a tree of arrays
  project: Callable[[Any, jax.Array], jax.Array] = flax.struct.field(pytree_node=False)
  dtype: Dtype = flax.struct.field(pytree_node=False, default=jnp.float32)  # in which devices gather w
  grad_dtype: Dtype = flax.struct.field(pytree_node=False, default=jnp.float32)  # in which they sum its gradient
  axes: tuple[str, ...] | None = flax.struct.field(pytree_node=False, default=None)  # logical, of w if it is one array

  def logits(self) -> jax.Array:
    x_BTD = self.x_BTD if self.axes is None else beside_weights(self.x_BTD, None, None, 'embed')
    return constrain(self.project(self.w, x_BTD), 'act_batch', 'act_length', 'act_vocab')

  @property
  def num_logits(self) -> int:
    return jax.eval_shape(self.project, self.w, self.x_BTD).shape[-1]


def cross_entropy(readout: Readout, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float = 0.0,
                  label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
  """(objective, nll), weighted sums in nats; the nll is for logging and has no gradient.

  For a token with target y, logits l and log p = l - log Z the objective is
  (1 - label_smoothing) * -log p_y + label_smoothing * mean_V(-log p) (Szegedy et al., arXiv 1512.00567, section 7)
  + z_loss * log(Z)^2, which keeps Z near 1 (PaLM, arXiv 2204.02311, section 5).
  """
  head = dataclasses.replace(readout, x_BTD=None, w=None)  # type: ignore[arg-type]  # the static part
  objective, nll = _cross_entropy(head, z_loss, label_smoothing, readout.w, readout.x_BTD, targets_BT, weights_BT)
  return objective, jax.lax.stop_gradient(nll)


def score(readout: Readout, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(nll in nats, float32; number of tokens more likely than the target), each [B, T]."""

  def chunk(_, w_S, x_SRCD, targets_SRC):
    logits_SRCV = _project(readout.project, w_S, x_SRCD)
    _, nll_SRC, *_ = _nats(logits_SRCV, targets_SRC, 0.0, 0.0)
    return None, (nll_SRC, rank(logits_SRCV, targets_SRC))

  return _over_chunks(chunk, lambda _: None, readout, readout.w, readout.x_BTD, targets_BT)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(head, z_loss, label_smoothing, w, x_BTD, targets_BT, weights_BT):
  def chunk(_, w_S, x_SRCD, targets_SRC):
    return None, _nats(_project(head.project, w_S, x_SRCD), targets_SRC, z_loss, label_smoothing)[:2]

  _, (objective_BT, nll_BT) = _over_chunks(chunk, lambda _: None, head, w, x_BTD, targets_BT)
  return jnp.sum(objective_BT * weights_BT), jnp.sum(nll_BT * weights_BT)


def _cross_entropy_fwd(head, z_loss, label_smoothing, w, x_BTD, targets_BT, weights_BT):
  # The gradient of a weighted sum is known up to one factor, so it is computed here, while a chunk's logits exist.
  def chunk(dw_S, w_S, x_SRCD, targets_SRC, weights_SRC):
    logits_SRCV, pull = jax.vjp(functools.partial(_project, head.project), w_S, x_SRCD)
    objective_SRC, nll_SRC, log_z_SRC, p_SRCV = _nats(logits_SRCV, targets_SRC, z_loss, label_smoothing)
    hit_SRCV = jax.lax.broadcasted_iota(targets_SRC.dtype, p_SRCV.shape, 3) == targets_SRC[..., None]
    target_SRCV = (1 - label_smoothing) * hit_SRCV + label_smoothing / p_SRCV.shape[-1]
    slope_SRC1 = (weights_SRC * (1 + 2 * z_loss * log_z_SRC))[..., None]
    # The barrier frees the slopes of a chunk's logits before the next chunk or layer begins.
    more_S, dx_SRCD = jax.lax.optimization_barrier(
        pull(p_SRCV * slope_SRC1 - target_SRCV * weights_SRC[..., None]))
    return jax.tree.map(jnp.add, dw_S, more_S), (objective_SRC, nll_SRC, dx_SRCD)

  dw_S, (objective_BT, nll_BT, dx_BTD) = _over_chunks(
      chunk, functools.partial(jax.tree.map, jnp.zeros_like), head, w, x_BTD, targets_BT, weights_BT)
  dw = jax.tree.map(lambda dw_S: _sum_of_shards(dw_S.astype(head.grad_dtype)), dw_S)
  if head.axes is not None:
    dw = constrain(dw, *head.axes)
  dw = jax.tree.map(lambda dw, w: dw.astype(w.dtype), dw, w)
  return (jnp.sum(objective_BT * weights_BT), jnp.sum(nll_BT * weights_BT)), (dw, dx_BTD, objective_BT)


def _cross_entropy_bwd(head, z_loss, label_smoothing, residuals, cotangents):
  dw, dx_BTD, dweights_BT = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), residuals)
  return dw, dx_BTD, None, dweights_BT


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def rank(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """The number of logits [..., V] ranked above the target's; among equal logits the first ranks highest."""
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode='clip')
  before = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) < targets[..., None]
  return jnp.sum((logits > own) | ((logits == own) & before), axis=-1)


def _project(project, w_S, x_SRCD):
  if len(x_SRCD) == 1:  # with a batch dimension of size one, XLA:CPU makes a transposed copy of w
    logits_RCV = project(jax.tree.map(lambda w: w[0], w_S), x_SRCD[0])
    return constrain(logits_RCV, 'act_batch', 'act_length', 'act_vocab')[None]
  return constrain(jax.vmap(project)(w_S, x_SRCD), 'act_shards', None, None, 'act_vocab')


def _nats(logits, targets, z_loss, label_smoothing):
  """(objective, nll, log Z, and p [..., V]) of logits [..., V]; float32."""
  top = jnp.max(logits, axis=-1, keepdims=True)
  e = jnp.exp(logits - top)
  z = jnp.sum(e, axis=-1, keepdims=True)
  log_z = (jnp.log(z) + top)[..., 0]
  nll = log_z - _of_targets(logits, targets)
  objective = nll + z_loss * log_z**2
  if label_smoothing:  # needs another pass over the logits
    objective += label_smoothing * (log_z - jnp.mean(logits, axis=-1) - nll)
  return objective, nll, log_z, e / z


def _sum_of_shards(dw_S):
  """The sum over the first dimension, in the dtype of dw_S; jnp.sum would send float32 between devices."""
  return jax.lax.reduce(dw_S, jnp.zeros((), dw_S.dtype), jax.lax.add, (0,))


def _of_targets(logits, targets):
  """The logit of each target.

  Inside jax.shard_map, where the compiler aborts if it has to split a gather (jaxlib 0.10 and 0.11), it is a sum over
  the logits if devices share the vocabulary, in which all others count as 0.
  """
  if shared_inside('act_vocab', logits.shape[-1]) is None:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1, mode='clip')[..., 0]
  places = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  return jnp.sum(jnp.where(places == targets[..., None], logits, 0), axis=-1)


def _over_chunks(f, init, head, w, x_BTD, *arrays_BT):
  """Scans f(carry, w_S, *chunks [S, R, C, ...]) -> (carry, chunks) over chunks: (carry, arrays [B, T, ...]).

  The carry starts as init(w_S). With several chunks each shard has its own w, so it is gathered, and its gradient
  reduced, once and not once per chunk.
  """
  B, T = x_BTD.shape[:2]
  mesh: Any = jax.sharding.get_abstract_mesh()
  logits_bytes = 4 * jax.eval_shape(head.project, w, x_BTD).size / max(1, mesh.size)
  parts = num_length_shards(T)  # a chunk is a part of each part of a row, so that no token moves
  t = T // parts
  M = num_chunks(t, logits_bytes)
  C = math.ceil(t / M)
  if M == 1 or mesh.empty or B % num_batch_shards(mesh):
    S, parts, t, C = 1, 1, T, math.ceil(T / M)
  else:
    S = num_batch_shards(mesh)

  def cut(x_BT):  # padded with zeros, also in the weights
    x_BPt = x_BT.reshape(B, parts, t, *x_BT.shape[2:])
    x_BPt = jnp.pad(x_BPt, [(0, 0), (0, 0), (0, M * C - t)] + [(0, 0)] * (x_BT.ndim - 2))
    x_SRPMC = x_BPt.reshape(S, B // S, parts, M, C, *x_BT.shape[2:])
    x_MSPRC = jnp.moveaxis(x_SRPMC, (3, 2), (0, 2))
    return x_MSPRC.reshape(M, S * parts, B // S, C, *x_BT.shape[2:])

  def join(x_MSRC):
    x_MSPRC = x_MSRC.reshape(M, S, parts, *x_MSRC.shape[2:])
    x_SRPMC = jnp.moveaxis(x_MSPRC, (0, 2), (3, 2))
    return x_SRPMC.reshape(B, parts, M * C, *x_SRPMC.shape[5:])[:, :, :t].reshape(B, T, *x_SRPMC.shape[5:])

  axes = batch_axes(mesh) + (('context',) if parts > 1 else ())
  on_each_shard = functools.partial(_on_each_shard, S * parts, axes)
  low = jax.tree.map(lambda w: w.astype(head.dtype), w)
  low_S = jax.tree.map(on_each_shard, low if head.axes is None else gathered(constrain(low, *head.axes), head.axes))

  def wide():  # in the dtype of w, so that gradients are accumulated in it
    return jax.tree.map(lambda low_S, w: low_S.astype(w.dtype), low_S, w)

  xs = [cut(x) for x in (x_BTD, *arrays_BT)]
  carry, outs = jax.lax.scan(lambda carry, xs: f(carry, wide(), *xs), init(wide()), xs, unroll=M == 1)
  return carry, jax.tree.map(join, outs)


def num_chunks(T, logits_bytes):
  """The number of chunks: the fewest that CHUNK_BYTES allow, or up to twice as many if that divides T."""
  least = min(T, math.ceil(logits_bytes / chunk_bytes(platform())))
  return next((n for n in range(least, 2 * least) if T % n == 0), least)


def _on_each_shard(S, axes, w):
  w_S = jnp.broadcast_to(w, (S, *w.shape))
  return jax.lax.with_sharding_constraint(w_S, P(axes, *(P.UNCONSTRAINED,) * w.ndim)) if S > 1 else w_S
