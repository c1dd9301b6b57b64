"""Implementations of causal attention with one signature, and the function that chooses among them.

Dims: B batch, T length, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, Registry, register
from llm_jax.base.sharding import (
  auto_axes,
  batch_axes,
  current_mesh_config,
  fitting_axes,
  num_batch_shards,
  num_length_shards,
)
from llm_jax.base.target import current_target
from llm_jax.layers.blocked import blocked

SPLASH_BLOCKS = (512, 256, 128)  # the largest one that divides T is used
MASK_BYTES = 2**32  # of the largest mask of a row that cudnn is given with mesh.context


def xla(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segment_ids_BT: jax.Array | None,
        prefix_BT: jax.Array | None, implementation: Literal['xla', 'cudnn'] = 'xla', **scores: Any) -> jax.Array:
  """JAX's dot_product_attention: computes all T x T scores at once. It lacks the options `scores`."""
  plain = prefix_BT is None  # causality and window are options, without a mask
  mask_BTT = None
  if segment_ids_BT is not None:
    mask_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  if prefix_BT is not None:
    positions_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1]), q_BTNH.shape[:2])
    seen_BTT = look_back(positions_BT, q_BTNH.shape[1], window) | prefix_BT[:, None, :]
    mask_BTT = seen_BTT if mask_BTT is None else seen_BTT & mask_BTT
  if scores:
    positions_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1]), q_BTNH.shape[:2])
    seen_BTT = look_back(positions_BT, q_BTNH.shape[1], window) if plain else jnp.ones((), bool)
    return attend_to_slots(q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2),
                           seen_BTT if mask_BTT is None else seen_BTT & mask_BTT, **scores)
  return jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, mask=None if mask_BTT is None else mask_BTT[:, None], is_causal=plain,
      local_window_size=(window - 1, 0) if window and plain else None, implementation=implementation)


def cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segment_ids_BT: jax.Array | None,
          prefix_BT: jax.Array | None) -> jax.Array:
  """NVIDIA's fused kernel: causality and window are options, segments and prefix a mask [B, 1, T, T].

  Its packed layout would need no mask, but a limit on segments per row, and JAX 0.10 passes it wrong offsets for
  grouped heads.
  """
  def local(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None,
            prefix_BT: jax.Array | None) -> jax.Array:
    return xla(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT, prefix_BT, 'cudnn')

  return on_each_device(local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, prefix_BT)


def splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segment_ids_BT: jax.Array | None,
           prefix_BT: jax.Array | None, interpret: bool = False, soft_cap: float | None = None) -> jax.Array:
  """The Pallas kernel for TPUs, run per device on its rows and heads; `interpret` runs it on any device, slowly."""
  assert prefix_BT is None, 'why_not() excludes prefixes'
  T = q_BTNH.shape[1]

  def local(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    kernel = splash_kernel(T, q_BTNH.shape[2], window, soft_cap, interpret)
    return splash_attend(kernel, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, segment_ids_BT)

  return on_each_device(local, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def splash_kernel(length: int, num_heads: int, window: int, soft_cap: float | None = None, interpret: bool = False,
                  orders: list[np.ndarray] | None = None) -> Any:
  """The kernel of a device for queries at all positions, or of several for those at each one's `orders`."""
  # Imported here, as only TPUs need it and importing Pallas takes a second.
  from jax.experimental.pallas.ops.tpu import splash_attention as lib
  shape = (length, length)
  mask = lib.LocalMask(shape, (window - 1, 0), 0) if window else lib.CausalMask(shape)
  if orders is not None:
    mask.q_sequence = np.concatenate(orders)
  num_shards = len(orders or (0,))
  size = next(size for size in SPLASH_BLOCKS if length // num_shards % size == 0)
  sizes = lib.BlockSizes(block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size,
                         block_kv_dq=size)
  return lib.make_splash_mha(lib.MultiHeadMask([mask] * num_heads), block_sizes=sizes, head_shards=1,
                             q_seq_shards=num_shards, interpret=interpret, attn_logits_soft_cap=soft_cap,
                             residual_checkpoint_name='attention')


def splash_attend(kernel: Any, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                  segment_ids_BT: jax.Array | None, segment_ids_BS: jax.Array | None) -> jax.Array:
  """Calls a splash_kernel for each row."""
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds
  segments = SegmentIds(segment_ids_BT, segment_ids_BS) if segment_ids_BT is not None else None  # type: ignore[arg-type]
  q_BTNH = (q_BTNH * q_BTNH.shape[3] ** -0.5).astype(q_BTNH.dtype)  # the kernel does not scale
  y_BNTH = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q_BTNH, k_BSKH, v_BSKH)), segments)
  return y_BNTH.swapaxes(1, 2)


def on_each_device(kernel: Callable[..., jax.Array], q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
                   *of_rows: jax.Array | None) -> jax.Array:
  """kernel(q, k, v, *of_rows) of each device's rows and heads. The compiler cannot split a kernel."""
  mesh: Any = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return kernel(q_BTNH, k_BTKH, v_BTKH, *of_rows)
  # A dimension that does not divide stays whole, as in sharding.constrain.
  rows = batch_axes(mesh) if q_BTNH.shape[0] % num_batch_shards(mesh) == 0 else None
  heads = fitting_axes('act_kv_heads', k_BTKH.shape[2], mesh)
  by_head = P(rows, None, heads)
  return jax.shard_map(kernel, in_specs=(*(by_head,) * 3, *(P(rows),) * len(of_rows)), out_specs=by_head,
                       check_vma=False, axis_names=auto_axes(mesh))(
      q_BTNH, k_BTKH, v_BTKH, *of_rows)


Implementation = Callable[..., jax.Array]
# (q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT or None, prefix_BT or None) -> y_BTNH; see attention.AttentionMask.
# Those that support them have the keywords soft_cap and sinks_N; see attend_to_slots.
ATTENTION = Registry('attention')
for _function in (cudnn, splash, xla, blocked):
  register(ATTENTION, _function.__name__, _function, NoSettings)
EXPLANATIONS = {'cudnn': ('the fused kernel of cuDNN',), 'splash': ('the Pallas kernel for TPUs',),
                'xla': ('all T x T scores at once',), 'blocked': ('a block of scores at a time, which saves memory',)}
OPTIONS = {'soft_cap': 'attention_soft_cap', 'sinks_N': 'attention_sinks'}  # by field of the config
# `auto` takes the first one that supports the case. On a CPU blocked was 1.3 to 2.2 times as fast as xla (T 64 to 512).
AUTO: dict[str, tuple[str, ...]] = {'gpu': ('cudnn', 'blocked'), 'tpu': ('splash', 'blocked'), 'cpu': ('blocked',)}
LAST = 'xla'  # supports every case but a ring


@dataclasses.dataclass(frozen=True)
class AttentionCase:
  """The properties of an attention call that decide which implementations support it, all known while tracing."""

  platform: str  # cpu, gpu or tpu
  capability: tuple[int, int]  # compute capability of an NVIDIA GPU; (0, 0) for other devices
  dtype: str
  head_dim: int
  length: int
  segments: bool = False
  prefix: bool = False
  scores: tuple[str, ...] = ()  # of soft_cap and sinks_N, those that are used
  context: int = 1  # devices that split the length
  ring: bool = False  # whether keys are passed around them


def local_device() -> tuple[str, tuple[int, int]]:
  """(platform of the devices that programs are compiled for, compute capability of NVIDIA GPUs)."""
  target = current_target()
  return target.platform, target.capability


def attention_case(dtype: str, head_dim: int, length: int, *, segments: bool, prefix: bool,
                   scores: tuple[str, ...]) -> AttentionCase:
  """The case of these inputs on the devices and the mesh that programs are compiled for."""
  context = num_length_shards(length)
  ring = context > 1 and current_mesh_config().context_attention == 'ring'
  return AttentionCase(*local_device(), dtype, head_dim, length, segments, prefix, scores, context, ring)


def why_not(name: str, case: AttentionCase) -> str:
  """Why this implementation does not support the case; '' if it does."""
  widest, part = 256 if case.capability >= (9, 0) else 128, case.length // case.context
  reasons = {
      'cudnn': {
          'it needs an NVIDIA GPU of compute capability 8.0 or more': case.capability < (8, 0),
          f'it computes in bfloat16 or float16, not {case.dtype}': case.dtype not in ('bfloat16', 'float16'),
          f'head_dim must be a multiple of 8, at most {widest}; got {case.head_dim}':
              case.head_dim % 8 > 0 or case.head_dim > widest,
          f'with segments or a prefix the length must be even; got {case.length}':
              case.length % 2 > 0 and (case.segments or case.prefix),
          f'with mesh.context its mask has 1.5 x length^2 / context bytes a row, more than {MASK_BYTES >> 30} GiB':
              case.context > 1 and 3 * case.length**2 // (2 * case.context) > MASK_BYTES,
      },
      'splash': {
          'it needs a TPU': case.platform != 'tpu',
          f'the length{" / mesh.context" * (case.context > 1)} must be a multiple of {SPLASH_BLOCKS[-1]}; got {part}':
              part % SPLASH_BLOCKS[-1] > 0,
          'it does not support a prefix': case.prefix,
      },
      'blocked': {'with mesh.context it does not support a prefix': case.prefix and case.context > 1},
  }
  ring = ('mesh.context_attention=ring needs blocked',) if case.ring and name != 'blocked' else ()
  known = inspect.signature(ATTENTION[name]).parameters
  missing = [option for option in case.scores if option not in known and 'scores' not in known]
  return '; '.join([*ring, *(reason for reason, holds in reasons.get(name, {}).items() if holds),
                    *(f'it does not support {OPTIONS[option]}' for option in missing)])


def choose_attention(name: str, case: AttentionCase) -> str:
  """The implementation for `name`, one of ATTENTION or 'auto'. Raises ConfigError if it does not support the case."""
  if name == 'auto':
    reasons = {n: why_not(n, case) for n in (*AUTO.get(case.platform, ('blocked',)), LAST)}
    if (chosen := next((n for n in reasons if not reasons[n]), None)) is not None:
      return chosen
    raise ConfigError('config.model.attention: none can be used here: ' + '; '.join(
        f'{n}: {reason}' for n, reason in reasons.items()))
  if reason := why_not(name, case):
    supported = [n for n in ATTENTION if not why_not(n, case)]
    raise ConfigError(f'config.model.attention: {name!r} cannot be used here: {reason}; '
                      f'set one of auto, {", ".join(supported)}')
  return name


def describe_attention(implementation: str, dtype: str, head_dim: int, length: int, *, segments: bool,
                       prefix: bool, scores: tuple[str, ...] = ()) -> str:
  """The chosen implementation for rows of this length, with an explanation, and the reasons against faster ones."""
  case = attention_case(dtype, head_dim, length, segments=segments, prefix=prefix, scores=scores)
  chosen = choose_attention(implementation, case)
  against = [f'not {name}: {why_not(name, case)}' for name in AUTO.get(case.platform, ()) if why_not(name, case)]
  notes = [*EXPLANATIONS.get(chosen, ()), *(against if implementation == 'auto' else ())]
  return chosen + (f' ({"; ".join(notes)})' if notes else '')


def look_back(positions_BT: jax.Array, num_slots: int, window: int) -> jax.Array:
  """The causal mask, bool [B, T, S], of queries over slots, where slot s holds the token at position s."""
  distance_BTS = positions_BT[:, :, None] - jnp.arange(num_slots)[None, None, :]
  return (distance_BTS >= 0) & ((distance_BTS < window) if window else True)


def attend_to_slots(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array, *,
                    soft_cap: float | None = None, sinks_N: jax.Array | None = None) -> jax.Array:
  """Attention to the slots of a cache where `mask_BTS` is True; the result has the dtype of the queries.

  `soft_cap`: scores become cap * tanh(scores / cap) (Gemma 2, arXiv 2408.00118). `sinks_N`: a score for each head that
  takes part in the softmax and adds nothing (gpt-oss, arXiv 2508.10925). With the heads before the slots no product
  needs a transposed copy of the cache.
  """
  B, T, N, H = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(B, T, k_BKSH.shape[1], -1, H)
  if local_device()[0] == 'cpu':  # whose kernels of batched products lack bfloat16
    q_BTKGH, k_BKSH, v_BKSH = (x.astype(jnp.float32) for x in (q_BTKGH, k_BKSH, v_BKSH))
  scores_BKGTS = jnp.einsum('BTKGH,BKSH->BKGTS', q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) / H ** 0.5
  if soft_cap is not None:
    scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
  scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
  if sinks_N is not None:
    sinks_1KG11 = sinks_N.reshape(1, *q_BTKGH.shape[2:4], 1, 1)
    sinks_BKGT1 = jnp.broadcast_to(sinks_1KG11, (*scores_BKGTS.shape[:4], 1))
    probs_BKGTS = jax.nn.softmax(jnp.concatenate([scores_BKGTS, sinks_BKGT1], -1), axis=-1)[..., :-1]
  else:
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
  y_BTKGH = jnp.einsum('BKGTS,BKSH->BTKGH', probs_BKGTS.astype(v_BKSH.dtype), v_BKSH,
                       preferred_element_type=jnp.float32)
  return y_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)
