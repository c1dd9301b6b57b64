"""L equal blocks as one: parameters stacked on a leading `layers` axis, run by one scan.

A block is a Flax module called as block(x, positions, visible, cache, window, train) -> (x, cache).
Stacked parameters serve laptop and pod alike: the scan's unroll is a config value (unrolled runs faster, rolled
compiles in a time that does not grow with depth).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from llm_jax.layers.attention import Visible
from llm_jax.types import Params

REMAT: dict[str, Callable[[Callable], Callable]] = {
    'none': lambda f: f,
    # Keeps only each block's input and computes the rest again in the backward pass.
    'full': partial(jax.checkpoint, prevent_cse=False),
}


def init_stack(block: nn.Module, num_layers: int, embed_dim: int) -> Callable[[jax.Array], Params]:
  """key -> boxed parameters of `num_layers` blocks, each leaf [L, ...] with the logical axis `layers` in front."""
  x, positions = jnp.zeros((1, 1, embed_dim)), jnp.zeros((1, 1), jnp.int32)

  def init(key: jax.Array) -> Params:
    def init_block(key):
      return block.init(key, x, positions, Visible(), None, 0, False)['params']
    stacked = jax.vmap(init_block)(jax.random.split(key, num_layers))
    return meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})

  return init


def apply_stack(block: nn.Module, params: Params, x_BTD: jax.Array, positions_BT: jax.Array,
                visible: Visible, *, windows: tuple[int, ...], cache: Any = None,
                dropout_key: jax.Array | None = None, train: bool = False,
                unroll: int = 1, remat: str = 'none') -> tuple[jax.Array, Any, dict[str, Any]]:
  """Runs the blocks. Layer l looks back windows[l % len(windows)] tokens; their number must divide L.

  Returns x [B, T, D], the cache, and what the blocks sowed into `losses` and `metrics`, leaves [L, ...].
  """
  num_layers = jax.tree.leaves(params)[0].shape[0]
  period = len(windows)
  keys = None if dropout_key is None else jax.random.split(dropout_key, num_layers)

  def body(x, group):
    outputs = []
    for i, window in enumerate(windows):
      layer_params, layer_cache, key = jax.tree.map(lambda leaf: leaf[i], group)  # noqa: B023
      (x, layer_cache), sown = block.apply(
          {'params': layer_params}, x, positions_BT, visible, layer_cache, window, train,
          rngs=None if key is None else {'dropout': key}, mutable=['losses', 'metrics'])
      outputs.append((layer_cache, sown))
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

  grouped = jax.tree.map(lambda a: a.reshape(num_layers // period, period, *a.shape[1:]), (params, cache, keys))
  x_BTD, outputs = jax.lax.scan(REMAT[remat](body), x_BTD, grouped, unroll=min(unroll, num_layers // period))
  cache, sown = jax.tree.map(lambda a: a.reshape(num_layers, *a.shape[2:]), outputs)
  return x_BTD, cache, sown
