"""A decoder whose config covers GPT-2 (OpenAI 2019), Llama (arXiv 2302.13971) and Qwen3 (arXiv 2505.09388).

Dims: B batch, T length, S cache length, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from llm_jax.base.batch import Batch, Cache, Params
from llm_jax.layers.attention import Attention, AttentionMask, Layer
from llm_jax.layers.embed import Embed
from llm_jax.layers.stack import apply_layers, apply_stack, init_stack, unstack
from llm_jax.losses.readout import Readout
from llm_jax.models.blocks import (
  OutputMatrix,
  activation_dtype,
  add_to_stream,
  make_heads,
  make_mlp,
  make_norm,
  make_readout,
  off_stream,
  onto_stream,
)
from llm_jax.models.decoder_config import DecoderConfig


class Block(nn.Module):
  """Attention, then a feed-forward layer, each with norms before or after it and added to the residual stream."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, mask: AttentionMask, cache, layer: Layer, train: bool):
    cfg = self.cfg
    before, after = (self.norms(position) for position in ('pre', 'post'))
    out_init = nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5)
    dropout = nn.Dropout(cfg.dropout, deterministic=not train)
    attend = self.make_attention(out_init)
    h_BTD, cache = attend(off_stream(before('attn_norm', x_BTD)), positions_BT, mask, cache, layer)
    y_BTD = add_to_stream(x_BTD, cfg.residual_scale * dropout(after('attn_post_norm', onto_stream(h_BTD))))
    mlp = make_mlp(cfg, out_init, name='mlp')
    h_BTD = mlp(off_stream(before('mlp_norm', x_BTD if cfg.parallel_residual else y_BTD)))
    return add_to_stream(y_BTD, cfg.residual_scale * dropout(after('mlp_post_norm', onto_stream(h_BTD)))), cache

  def norms(self, position: str) -> Callable[[str, jax.Array], jax.Array]:
    """The function (name, x) of the norms before ('pre') or after ('post') the layers; the identity without them."""
    norm = make_norm(self.cfg)
    used = self.cfg.norm_position in (position, 'both')
    return lambda name, x_BTD: norm(name=name)(x_BTD) if used else x_BTD

  def make_attention(self, out_init: Initializer) -> nn.Module:
    """The attention layer, for subclasses to replace."""
    return make_heads(self.cfg, Attention, out_init, name='attn')


class Decoder(nn.Module):
  """A LanguageModel (see models/protocol.py)."""

  cfg: DecoderConfig
  reads = frozenset({'tokens', 'targets', 'loss_mask', 'positions', 'segment_ids', 'prefix_mask'})  # of a Batch
  needs: frozenset[str] = frozenset()  # features that not all tasks provide
  prompt_in_row = True
  cache_grows = True
  block_type = Block  # for subclasses to replace

  def setup(self) -> None:
    cfg = self.cfg
    init, dtype = nn.initializers.normal(cfg.embed_std), activation_dtype(cfg, 'stream_dtype')
    self.embed = Embed(cfg.V, cfg.embed_dim, init, dtype=dtype)
    if cfg.positions == 'learned':
      self.positions = Embed(cfg.max_len or 0, cfg.embed_dim, init, ('positions', 'embed'), dtype)
    self.dropout = nn.Dropout(cfg.dropout)
    self.block = self.block_type(cfg, parent=None)
    self.layers: Any = self.get_variable('layers', 'blocks')  # unstacked blocks, while text is generated
    self.blocks: Any = None if self.layers else self.param(
        'blocks', init_stack(self.block, cfg.num_layers, cfg.embed_dim))
    self.final_norm = make_norm(cfg)()
    if not cfg.tie_embeddings:
      self.head = OutputMatrix(cfg, cfg.readout_std)

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    return self.readout(batch, train=train).logits()

  def readout(self, batch: Batch, *, train: bool = False) -> Readout:
    positions_BT = batch.positions
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    prefix_BT = batch.prefix_mask > 0 if self.cfg.prefix_attention and batch.prefix_mask is not None else None
    return self.output(self.hidden(batch.tokens, positions_BT, AttentionMask(batch.segment_ids, prefix_BT), train))

  def embedded(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    x_BTD = self.cfg.embed_scale * self.embed.encode(tokens_BT)
    if self.cfg.positions == 'learned':
      x_BTD += self.positions.encode(positions_BT)
    return x_BTD

  def hidden(self, tokens_BT, positions_BT, mask: AttentionMask, train: bool = False):
    """The residual stream after all blocks [B, T, D]."""
    cfg, x_BTD = self.cfg, self.embedded(tokens_BT, positions_BT)
    dropout_key = self.make_rng('dropout') if train else None
    if dropout_key is not None:
      key = jax.random.fold_in(dropout_key, cfg.num_layers)
      x_BTD = self.dropout(x_BTD, deterministic=False, rng=key)
    x_BTD, sown = apply_stack(
        self.block, self.blocks, x_BTD, positions_BT, mask, layers=cfg.layers, dropout_key=dropout_key, train=train,
        dtype=cfg.operand_dtype, unroll=cfg.scan_unroll, remat=cfg.remat)
    for collection, values in sown.items():
      self.sow(collection, 'blocks', values)
    return x_BTD

  def output(self, x_BTD: jax.Array) -> Readout:
    return make_readout(self.cfg, self.final_norm(x_BTD), self.embed if self.cfg.tie_embeddings else self.head)

  def decode_variables(self, params: Params) -> dict[str, Any]:
    """The variables for prefill and decode: each layer and the readout in arrays of their own, cast once."""
    dtype, last = self.cfg.operand_dtype, 'embed' if self.cfg.tie_embeddings else 'head'
    rest = {name: x for name, x in params.items() if name != 'blocks'}
    copies = {} if dtype == jnp.float32 else {last: {'w': rest[last]['w'].astype(dtype)}}
    return {'params': rest, 'layers': {'blocks': unstack(params['blocks'], dtype)}, 'copies': copies}

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    cfg = self.cfg
    empty = jnp.zeros((batch_size, cfg.K, max_len, cfg.H), cfg.operand_dtype)
    lengths_B = jnp.zeros(batch_size, jnp.int32)
    return {'layers': ({'k': empty, 'v': empty},) * cfg.num_layers, 'length_B': lengths_B, 'prompt_B': lengths_B}

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    # Padding after a prompt fills slots that no query attends to before `decode` overwrites them.
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD, cache = self.cached(tokens_BT, positions_BT, cache | {'length_B': lengths_B, 'prompt_B': lengths_B})
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return self.output(last_B1D).logits()[:, 0], cache

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    x_B1D, cache = self.cached(tokens_B[:, None], cache['length_B'][:, None], cache)
    return self.output(x_B1D).logits()[:, 0], cache | {'length_B': cache['length_B'] + 1}

  def cached(self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """The residual stream after all blocks [B, T, D], and the cache with the keys and values of the tokens."""
    layers = self.layers or unstack(self.blocks, self.cfg.operand_dtype)
    slots_S = jnp.arange(cache['layers'][0]['k'].shape[2])
    prefix_BS = slots_S[None] < cache['prompt_B'][:, None] if self.cfg.prefix_attention else None
    x_BTD, caches = apply_layers(
        self.block, layers, self.embedded(tokens_BT, positions_BT), positions_BT, AttentionMask(prefix_BS=prefix_BS),
        layers=self.cfg.layers, cache=cache['layers'])
    return x_BTD, cache | {'layers': caches}
