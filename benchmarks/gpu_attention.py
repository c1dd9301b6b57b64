"""The section `attention` of benchmarks/gpu.py: each way to compute attention on a GPU."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import MEAN_DOCUMENT, emit, segments, times


def attention(toy: bool) -> None:
  """Forward and backward pass of attention by each kernel, with documents, and the error of its gradients."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  B, T, N, H = (2, 256, 2, 64) if toy else (32, 1024, 12, 64)
  dtype = jnp.float32 if toy else jnp.bfloat16
  q, k, v, dy = jax.random.normal(jax.random.key(0), (4, B, T, N, H), dtype)
  ids = jnp.asarray(np.asarray(segments(B, T, MEAN_DOCUMENT), np.int32))
  exact = None
  for name, attend in kernels(toy):
    for documents in (True, False):
      given = ids if documents else None

      def both(q: Any, k: Any, v: Any, dy: Any, given: Any, attend: Any = attend) -> Any:
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v, given), q, k, v)
        return y, pull(dy)

      try:
        jitted = jax.jit(both)
        found = times(lambda: jitted(q, k, v, dy, given), 0.3)  # noqa: B023
        row: dict[str, Any] = {'ms': round(1e3 * statistics.median(found), 3)}
        forward = jax.jit(attend)
        row['forward_ms'] = round(1e3 * statistics.median(times(lambda: forward(q, k, v, given), 0.2)), 3)  # noqa: B023
        if documents:
          if exact is None:
            exact = reference(q, k, v, dy, ids)
          y, grads = jitted(q, k, v, dy, given)
          row['errors'] = [float(f'{difference(a, b):.1e}') for a, b in zip((y, *grads), exact, strict=True)]
        emit(what='attention', name=name, documents=documents, **row)
      except Exception as e:
        emit(what='attention', name=name, documents=documents, error=f'{type(e).__name__}: {e}'[:600])


def reference(q: Any, k: Any, v: Any, dy: Any, ids: Any) -> tuple[Any, ...]:
  """(y, dq, dk, dv) in float32, a row at a time."""
  import jax
  import jax.numpy as jnp

  from llm_jax.layers.kernels import xla

  def row(args: Any) -> Any:
    *arrays, ids = (x[None] for x in args)
    with jax.default_matmul_precision('highest'):
      q, k, v, dy = (x.astype(jnp.float32) for x in arrays)
      y, pull = jax.vjp(lambda q, k, v: xla(q, k, v, 0, ids, None), q, k, v)
      return tuple(x[0] for x in (y, *pull(dy)))

  return jax.jit(lambda *xs: jax.lax.map(row, xs))(q, k, v, dy, ids)


def difference(x: Any, exact: Any) -> float:
  import jax.numpy as jnp
  return float(jnp.linalg.norm((x.astype(jnp.float32) - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def kernels(toy: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
  """(name, attend(q, k, v, segment_ids or None)) of each way to compute attention."""
  from llm_jax.layers import kernels as ours

  def named(name: str) -> Callable[..., Any]:
    return lambda q, k, v, ids: ours.ATTENTION[name](q, k, v, 0, ids, None)

  if toy:
    yield from ((name, named(name)) for name in ('blocked', 'xla'))
    return
  yield 'cudnn', named('cudnn')
  for limit in (16, 64):
    yield f'cudnn packed, {limit} documents', functools.partial(packed, limit=limit)
  yield from pallas_variants()
  yield 'blocked', named('blocked')
  yield 'xla', named('xla')


def packed(q: Any, k: Any, v: Any, ids: Any, limit: int) -> Any:
  """cuDNN's packed layout: lengths and offsets of up to `limit` documents of a row."""
  import jax.numpy as jnp
  from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
  scale = q.shape[-1] ** -0.5
  if ids is None:
    return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.CAUSAL)
  lengths = jnp.sum(ids[:, :, None] == 1 + jnp.arange(limit), axis=1, dtype=jnp.int32)  # [B, M]
  ends = jnp.cumsum(lengths, axis=1)
  begins = jnp.where(lengths > 0, ends - lengths, -1)
  offsets = jnp.concatenate([begins, jnp.full((len(ids), 1), -1)], axis=1).astype(jnp.int32)
  lengths = jnp.where(lengths > 0, lengths, -1)
  return dot_product_attention(q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=offsets, kv_offsets=offsets,
                               scale=scale, mask_type=MaskType.PADDING_CAUSAL)


def pallas_variants() -> Iterator[tuple[str, Callable[..., Any]]]:
  """JAX's Triton kernel at several block sizes."""
  from jax.experimental.pallas.ops.gpu import attention as lib
  for forward, backward in (((128, 64), 64), ((128, 128), 32), ((64, 64), 64), ((128, 64), 128)):
    sizes = lib.BlockSizes(*forward, backward, backward, backward, backward)
    yield (f'pallas {forward[0]}x{forward[1]}, backward {backward}',
           lambda q, k, v, ids, sizes=sizes: lib.mha(q, k, v, ids, sm_scale=q.shape[-1] ** -0.5, causal=True,
                                                     block_sizes=sizes))
