"""L equal blocks with parameters stacked on a leading `layers` axis, run by one scan.

A block is a Flax module called as block(x, positions, context, cache, layer, train) -> (x, cache). All blocks of a
stack get the same context, such as an AttentionMask; `layer`, a Layer, is what differs between them. The config sets
how far the scan is unrolled: unrolled it runs faster, rolled its compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.typing import Dtype
from jax.ad_checkpoint import Offloadable, Recompute, Saveable, checkpoint_name

from llm_jax.base.batch import Params
from llm_jax.layers.attention import AttentionMask, Layer
from llm_jax.layers.pipeline import in_stages

UNMASKED = AttentionMask()


def keep(*names: str, where: Any = Saveable) -> Callable[..., Any]:
  """The jax.checkpoint policy that saves values with these `checkpoint_name`s and recomputes all others.

  It goes by names because jax.checkpoint_policies does not find matrix products inside a custom_vjp.
  """
  def policy(prim: Any, *_: Any, **params: Any) -> Any:
    named = prim.name == 'name' and params['name'] in names
    # cuDNN's kernel is one primitive, and its softmax statistics have no name.
    fused = 'attention' in names and prim.name.startswith('dot_product_attention_fwd')
    return where if named or fused else Recompute
  return policy


# What a block saves from its forward pass for its backward pass, from most memory and least work to the opposite.
# Called as REMAT[name](function, prevent_cse=...).
REMAT: dict[str, Callable[..., Callable]] = {
    'none': lambda f, prevent_cse: f,  # everything
    'save_matmuls': partial(jax.checkpoint, policy=keep('matmul', 'attention')),  # outputs of matrices and attention
    'save_attention': partial(jax.checkpoint, policy=keep('attention')),  # outputs of attention, and the block's input
    'full': jax.checkpoint,  # only the block's input
    # The block's input and attention's outputs, in the host's memory; nothing on the device.
    'offload': partial(jax.checkpoint, policy=keep('block', 'attention', where=Offloadable('device', 'pinned_host'))),
}


def init_stack(block: nn.Module, num_layers: int, embed_dim: int,
               context: Any = UNMASKED) -> Callable[[jax.Array], Params]:
  """A function key -> boxed parameters of `num_layers` blocks: leaves [L, ...] with the logical axis `layers` first."""
  x, positions = jnp.zeros((1, 1, embed_dim)), jnp.zeros((1, 1), jnp.int32)

  def init(key: jax.Array) -> Params:
    def init_block(key: jax.Array) -> Params:
      return block.init(key, x, positions, context, None, Layer(), False)['params']
    stacked = jax.vmap(init_block)(jax.random.split(key, num_layers))
    return meta.add_axis(stacked, 0, {nn.PARTITION_NAME: 'layers'})

  return init


def stack_experts(kind: type[nn.Module], num_experts: int) -> type[nn.Module]:
  """The module vmapped over experts: parameters, inputs and outputs get a leading dimension, logical axis `experts`.

  A vmap without the collection `copies` would make modules cast their weights again in each layer; see `apply_stack`.
  """
  return nn.vmap(kind, variable_axes={'params': 0, 'copies': 0, 'losses': 0, 'metrics': 0},
                 split_rngs={'params': True, 'dropout': True}, axis_size=num_experts,
                 metadata_params={nn.PARTITION_NAME: 'experts'})


def apply_stack(block: nn.Module, params: Params, x_BTD: jax.Array, positions_BT: jax.Array,
                context: Any, *, layers: tuple[Layer, ...], dropout_key: jax.Array | None = None, train: bool = False,
                dtype: Dtype = jnp.float32, unroll: int = 1, remat: str = 'none') -> tuple[jax.Array, dict[str, Any]]:
  """Runs the blocks. Block l gets layers[l % len(layers)]; len(layers) must divide L.

  `dtype` is that of matrix operands. Returns x [B, T, D] and the values that the blocks sowed into `losses` and
  `metrics`, leaves [L, ...]. Arrays of `context` have the rows of x. Over the mesh axis `stage` the blocks form a
  pipeline.
  """
  period = len(layers)

  def run(kind: Layer, rest: Any, number: jax.Array | None, select: Callable[[Any], Any], x: jax.Array,
          layer: Any) -> tuple[jax.Array, Any]:
    layer_params, layer_copies, key = select(layer)
    if key is not None and number is not None:
      key = jax.random.fold_in(key, number)
    (x, _), sown = block.apply(
        {'params': layer_params, 'copies': layer_copies}, checkpoint_name(x, 'block'), *rest, None, kind, train,
        rngs=None if key is None else {'dropout': key}, mutable=['losses', 'metrics'])
    return x, sown

  def run_blocks(groups: Any, x: jax.Array, *args: Any) -> tuple[jax.Array, Any]:
    # Otherwise XLA could recompute all blocks of one loop body at once, before the first one is needed.
    prevent_cse = unroll > 1 or period > 1
    blocks = [REMAT[remat](partial(run, kind, *args), prevent_cse=prevent_cse) for kind in layers]

    def body(x: jax.Array, group: Any) -> tuple[jax.Array, list[Any]]:
      outputs = []
      for run_block, layer in zip(blocks, group, strict=True):
        x, output = run_block(x, layer)
        outputs.append(output)
      return x, outputs

    return jax.lax.scan(body, x, groups, unroll=min(unroll, jax.tree.leaves(groups)[0].shape[0]))

  # Casts all layers' matrices at once: XLA also moves this out of a loop over microbatches, so it runs once per step.
  copies = {} if dtype == jnp.float32 else jax.tree.map(lambda w: jax.lax.stop_gradient(w).astype(dtype), params)
  keys = None if dropout_key is None else jax.random.split(dropout_key, jax.tree.leaves(params)[0].shape[0])
  # Layers are grouped by kind before the scan: slices made inside the loop would be saved for the backward pass, a
  # copy of every weight.
  groups = [jax.tree.map(lambda a: a[i::period], (params, copies, keys)) for i in range(period)]  # noqa: B023
  x_BTD, sown = in_stages(run_blocks, groups, x_BTD, (positions_BT, context))
  return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *sown)


def unstack(params: Params, dtype: Dtype) -> tuple[Params, ...]:
  """The variables of each block, for `apply_layers`, with its matrices in `dtype`."""
  def layer(i: int) -> Params:
    own = jax.tree.map(lambda a: a[i], params)
    return {'params': own} if dtype == jnp.float32 else {'params': own, 'copies': copies_of(own, dtype)}

  return tuple(layer(i) for i in range(jax.tree.leaves(params)[0].shape[0]))


def copies_of(params: Params, dtype: Dtype) -> Params:
  """The matrices w of a tree in `dtype`; integers, such as packed weights, have no copy."""
  return {name: copies_of(x, dtype) if isinstance(x, dict) else x.astype(dtype) for name, x in params.items()
          if isinstance(x, dict) or (name == 'w' and jnp.issubdtype(x.dtype, jnp.floating))}


def apply_layers(block: nn.Module, variables: tuple[Params, ...], x_BTD: jax.Array, positions_BT: jax.Array,
                 context: Any, *, layers: tuple[Layer, ...],
                 cache: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
  """Runs the blocks, each with its variables and cache; returns x [B, T, D] and the caches.

  Each layer has arrays of its own, as a scan would copy its slices of all weights and caches for each token.
  """
  caches = []
  for i, (own, layer_cache) in enumerate(zip(variables, cache, strict=True)):
    x_BTD, layer_cache = block.apply(own, x_BTD, positions_BT, context, layer_cache, layers[i % len(layers)], False)
    caches.append(layer_cache)
  return x_BTD, tuple(caches)
