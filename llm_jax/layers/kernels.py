"""Implementations of causal attention with one signature, and the function that chooses among them.

Dims: B batch, T length, N heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, Registry, register
from llm_jax.base.sharding import BATCH_AXES, RULES, num_batch_shards
from llm_jax.layers.blocked import blocked

SPLASH_BLOCKS = (512, 256, 128)  # the largest one that divides T is used


def xla(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segment_ids_BT: jax.Array | None,
        prefix_BT: jax.Array | None, implementation: Literal['xla', 'cudnn'] = 'xla') -> jax.Array:
  """JAX's dot_product_attention: computes all T x T scores at once."""
  plain = prefix_BT is None  # causality and window are options, without a mask
  mask_BTT = None
  if segment_ids_BT is not None:
    mask_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  if prefix_BT is not None:
    positions_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1]), q_BTNH.shape[:2])
    seen_BTT = look_back(positions_BT, q_BTNH.shape[1], window) | prefix_BT[:, None, :]
    mask_BTT = seen_BTT if mask_BTT is None else seen_BTT & mask_BTT
  return jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, mask=None if mask_BTT is None else mask_BTT[:, None], is_causal=plain,
      local_window_size=(window - 1, 0) if window and plain else None, implementation=implementation)


def cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segment_ids_BT: jax.Array | None,
          prefix_BT: jax.Array | None) -> jax.Array:
  """NVIDIA's fused kernel: causality and window are options, segments and prefix a mask [B, 1, T, T].

  Its packed layout would need no mask, but a limit on segments per row, and JAX 0.10 passes it wrong offsets for
  grouped heads.
  """
  return xla(q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT, prefix_BT, 'cudnn')


def splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, segment_ids_BT: jax.Array | None,
           prefix_BT: jax.Array | None, interpret: bool = False) -> jax.Array:
  """The Pallas kernel for TPUs, run per device on its rows and heads; `interpret` runs it on any device, slowly."""
  # Imported here, as only TPUs need it and importing Pallas takes a second.
  from jax.experimental.pallas.ops.tpu import splash_attention as lib
  assert prefix_BT is None, 'why_not() excludes prefixes'
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  mask = lib.LocalMask((T, T), (window - 1, 0), 0) if window else lib.CausalMask((T, T))
  size = next(size for size in SPLASH_BLOCKS if T % size == 0)
  sizes = lib.BlockSizes(block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size,
                         block_kv_dq=size)

  def local(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    kernel = lib.make_splash_mha(lib.MultiHeadMask([mask] * q_BTNH.shape[2]), block_sizes=sizes, head_shards=1,
                                 q_seq_shards=1, interpret=interpret, residual_checkpoint_name='attention')
    segments = None if segment_ids_BT is None else lib.SegmentIds(segment_ids_BT, segment_ids_BT)
    q_BTNH = (q_BTNH * H ** -0.5).astype(q_BTNH.dtype)  # the kernel does not scale
    y_BNTH = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH)), segments)
    return y_BNTH.swapaxes(1, 2)

  mesh: Any = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
  # A dimension that does not divide stays whole, as in sharding.constrain.
  rows = BATCH_AXES if q_BTNH.shape[0] % num_batch_shards(mesh) == 0 else None
  heads = RULES['act_kv_heads'] if k_BTKH.shape[2] % mesh.shape['tensor'] == 0 else None
  by_head = P(rows, None, heads)
  return jax.shard_map(local, in_specs=(by_head, by_head, by_head, P(rows)), out_specs=by_head, check_vma=False)(
      q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


Implementation = Callable[..., jax.Array]
# (q_BTNH, k_BTKH, v_BTKH, window, segment_ids_BT or None, prefix_BT or None) -> y_BTNH; see attention.AttentionMask.
ATTENTION = Registry('attention')
for _function in (cudnn, splash, xla, blocked):
  register(ATTENTION, _function.__name__, _function, NoSettings)
EXPLANATIONS = {'cudnn': ('the fused kernel of cuDNN',), 'splash': ('the Pallas kernel for TPUs',),
                'xla': ('all T x T scores at once',), 'blocked': ('a block of scores at a time, which saves memory',)}
# `auto` takes the first one that supports the case. On a CPU blocked was 1.3 to 2.2 times as fast as xla (T 64 to 512).
AUTO: dict[str, tuple[str, ...]] = {'gpu': ('cudnn', 'blocked'), 'tpu': ('splash', 'blocked'), 'cpu': ('blocked',)}


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


def local_device() -> tuple[str, tuple[int, int]]:
  """(platform of JAX's devices, compute capability of NVIDIA GPUs)."""
  device = jax.devices()[0]
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    return device.platform, (0, 0)
  major, minor = str(device.compute_capability).split('.')
  return device.platform, (int(major), int(minor))


def why_not(name: str, case: AttentionCase) -> str:
  """Why this implementation does not support the case; '' if it does."""
  widest = 256 if case.capability >= (9, 0) else 128
  reasons = {
      'cudnn': {
          'it needs an NVIDIA GPU of compute capability 8.0 or more': case.capability < (8, 0),
          f'it computes in bfloat16 or float16, not {case.dtype}': case.dtype not in ('bfloat16', 'float16'),
          f'head_dim must be a multiple of 8, at most {widest}; got {case.head_dim}':
              case.head_dim % 8 > 0 or case.head_dim > widest,
          f'with segments or a prefix the length must be even; got {case.length}':
              case.length % 2 > 0 and (case.segments or case.prefix),
      },
      'splash': {
          'it needs a TPU': case.platform != 'tpu',
          f'the length must be a multiple of {SPLASH_BLOCKS[-1]}; got {case.length}':
              case.length % SPLASH_BLOCKS[-1] > 0,
          'it does not support a prefix': case.prefix,
      },
  }
  return '; '.join(reason for reason, holds in reasons.get(name, {}).items() if holds)


def choose_attention(name: str, case: AttentionCase) -> str:
  """The implementation for `name`, one of ATTENTION or 'auto'. Raises ConfigError if it does not support the case."""
  if name == 'auto':
    return next(n for n in AUTO.get(case.platform, ('blocked',)) if not why_not(n, case))
  if reason := why_not(name, case):
    supported = [n for n in ATTENTION if not why_not(n, case)]
    raise ConfigError(f'config.model.attention: {name!r} cannot be used here: {reason}; '
                      f'set one of auto, {", ".join(supported)}')
  return name


def describe_attention(implementation: str, dtype: str, head_dim: int, length: int, *, segments: bool,
                       prefix: bool) -> str:
  """The chosen implementation for rows of this length, with an explanation, and the reasons against faster ones."""
  case = AttentionCase(*local_device(), dtype, head_dim, length, segments, prefix)
  chosen = choose_attention(implementation, case)
  against = [f'not {name}: {why_not(name, case)}' for name in AUTO.get(case.platform, ()) if why_not(name, case)]
  notes = [*EXPLANATIONS.get(chosen, ()), *(against if implementation == 'auto' else ())]
  return chosen + (f' ({"; ".join(notes)})' if notes else '')


def look_back(positions_BT: jax.Array, num_slots: int, window: int) -> jax.Array:
  """The causal mask, bool [B, T, S], of queries over slots, where slot s holds the token at position s."""
  distance_BTS = positions_BT[:, :, None] - jnp.arange(num_slots)[None, None, :]
  return (distance_BTS >= 0) & ((distance_BTS < window) if window else True)
