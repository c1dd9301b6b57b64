"""Encoder-decoder (arXiv 1706.03762; pre-norm like T5, 1910.10683): the decoder also attends to the encoder's output.

Dims: B batch, T length of decoder rows, S length of encoder rows, D embed, K kv heads, H head_dim, V vocab, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm_jax.base.batch import Batch, Cache
from llm_jax.base.registry import register
from llm_jax.layers.attention import Attention, AttentionMask, Layer, MultiHead
from llm_jax.layers.cache import KVCache
from llm_jax.layers.embed import Embed
from llm_jax.layers.kernels import attend_to_slots
from llm_jax.layers.stack import apply_layers, apply_stack, init_stack, unstack
from llm_jax.losses.readout import Readout
from llm_jax.models.blocks import (
  OutputMatrix,
  activation_dtype,
  add_to_stream,
  make_heads,
  make_mlp,
  make_norm,
  off_stream,
)
from llm_jax.models.decoder import Block, Decoder
from llm_jax.models.decoder_config import DecoderConfig, require
from llm_jax.models.registry import MODELS


@dataclasses.dataclass(frozen=True)
class EncDecConfig(DecoderConfig):
  """Shape and parts of the decoder, and fields for the encoder; it shares the decoder's fields otherwise."""

  name: str = 'encdec'
  num_encoder_layers: int | None = None  # None: num_layers
  encoder_len: int | None = None  # longest input of the encoder; None: data.encoder_len
  # Size of the encoder's own embedding table. None: from data.encoder_tokenizer; without one the decoder's is used.
  encoder_vocab_size: int | None = None
  start_id: int | None = None  # the decoder's first input token; None: the tokenizer's

  def __post_init__(self) -> None:
    super().__post_init__()
    require(self, 'at least 1', lambda x: x >= 1, 'num_encoder_layers', 'encoder_len', 'encoder_vocab_size')
    if self.prefix_attention:
      raise ValueError('prefix_attention is for models whose decoder reads the prompt; here the encoder reads it: set '
                       'prefix_attention=False')

  @property
  def encoder_layers(self) -> int:
    return self.num_encoder_layers or self.num_layers

  @property
  def S(self) -> int:
    assert self.encoder_len is not None, 'resolve fills it in'
    return self.encoder_len

  @property
  def longest_prompt(self) -> int:
    return self.S

  def flops_per_token(self, seq_len: int) -> float | None:
    """As in DecoderConfig, per decoder token: encoder, decoder, and cross attention over all of S."""
    decoder = super().flops_per_token(seq_len)
    if decoder is None:
      return None
    D, N, H, K = self.embed_dim, self.num_heads, self.H, self.K
    queries, keys = D * N * H * 2, D * K * H * 2  # multiply-adds per token: of q and o, and of k and v
    feed_forward = D * self.F * (3 if self.mlp in ('swiglu', 'geglu') else 2)
    per_read = (self.encoder_layers * (6 * (queries + keys + feed_forward) + 12 * self.S * N * H)
                + self.num_layers * 6 * keys)
    cross = self.num_layers * (6 * queries + 12 * self.S * N * H)
    return decoder + cross + per_read * self.S / seq_len


class Read(NamedTuple):
  """The context of the decoder's blocks: the mask of self-attention, and the encoder's output with its mask."""

  self_mask: AttentionMask
  mask_BTS: jax.Array  # bool
  encoded_BSD: jax.Array | None = None  # None: its keys and values are in the cache


class CrossAttention(MultiHead):
  """Attention to an encoder's output; a cache stores its keys and values."""

  @nn.compact
  def __call__(self, x_BTD: jax.Array, encoded_BSD: jax.Array | None, mask_BTS: jax.Array,
               cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
    """`mask_BTS` is True where a token attends. `encoded_BSD` None: keys and values come from the cache."""
    q_BTNH = self.project('q', x_BTD)
    if encoded_BSD is not None:
      k_BSKH, v_BSKH = (self.project(name, encoded_BSD) for name in 'kv')
      y_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None])
      cache = cache and {'k': jnp.swapaxes(k_BSKH, 1, 2), 'v': jnp.swapaxes(v_BSKH, 1, 2)}
    else:
      assert cache is not None
      y_BTNH = attend_to_slots(q_BTNH, cache['k'], cache['v'], mask_BTS)
    return self.output(checkpoint_name(y_BTNH, 'attention')), cache


class CrossBlock(nn.Module):
  """Pre-norm self-attention, cross attention and feed-forward, each added to the residual stream."""

  cfg: EncDecConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, read: Read, cache, layer: Layer, train: bool):
    cfg = self.cfg
    norm = make_norm(cfg)
    out_init = nn.initializers.normal(cfg.init_std / (3 * cfg.num_layers) ** 0.5)
    dropout = nn.Dropout(cfg.dropout, deterministic=not train)
    own, crossed = (None, None) if cache is None else (cache['self'], cache['cross'])
    attend = make_heads(cfg, Attention, out_init, name='attn')
    h_BTD, own = attend(off_stream(norm(name='attn_norm')(x_BTD)), positions_BT, read.self_mask, own, layer)
    x_BTD = add_to_stream(x_BTD, dropout(h_BTD))
    look_up = make_heads(cfg, CrossAttention, out_init, name='cross')
    h_BTD, crossed = look_up(off_stream(norm(name='cross_norm')(x_BTD)), read.encoded_BSD, read.mask_BTS, crossed)
    x_BTD = add_to_stream(x_BTD, dropout(h_BTD))
    mlp = make_mlp(cfg, out_init, name='mlp')
    x_BTD = add_to_stream(x_BTD, dropout(mlp(off_stream(norm(name='mlp_norm')(x_BTD)))))
    return x_BTD, cache and {'self': own, 'cross': crossed}


class EncDec(nn.Module):
  """A LanguageModel (see models/protocol.py) whose encoder reads the prompts."""

  cfg: EncDecConfig
  reads = frozenset({'tokens', 'targets', 'loss_mask', 'positions', 'segment_ids', 'encoder_tokens',
                     'encoder_segment_ids'})  # of a Batch
  needs = frozenset({'encoder_tokens'})
  prompt_in_row = False
  cache_grows = True

  def setup(self) -> None:
    cfg = self.cfg
    init, dtype = nn.initializers.normal(cfg.embed_std), activation_dtype(cfg, 'stream_dtype')
    self.embed = Embed(cfg.V, cfg.embed_dim, init, dtype=dtype)
    if cfg.encoder_vocab_size:
      self.encoder_embed = Embed(cfg.encoder_vocab_size, cfg.embed_dim, init, dtype=dtype)
    if cfg.positions == 'learned':
      axes = ('positions', 'embed')
      self.positions = Embed(cfg.max_len or 0, cfg.embed_dim, init, axes, dtype)
      self.encoder_positions = Embed(cfg.S, cfg.embed_dim, init, axes, dtype)
    self.dropout = nn.Dropout(cfg.dropout)
    self.encoder_block = Block(dataclasses.replace(cfg, num_layers=cfg.encoder_layers, windows=(0,)), parent=None)
    self.encoder = self.param('encoder', init_stack(self.encoder_block, cfg.encoder_layers, cfg.embed_dim))
    self.encoder_norm = make_norm(cfg)()
    self.block = CrossBlock(cfg, parent=None)
    read = Read(AttentionMask(), jnp.ones((1, 1, 1), bool), jnp.zeros((1, 1, cfg.embed_dim)))
    self.layers: Any = self.get_variable('layers', 'blocks')  # unstacked blocks, while text is generated
    self.blocks: Any = None if self.layers else self.param(
        'blocks', init_stack(self.block, cfg.num_layers, cfg.embed_dim, read))
    self.final_norm = make_norm(cfg)()
    if not cfg.tie_embeddings:
      self.head = OutputMatrix(cfg, cfg.readout_std)

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    return self.readout(batch, train=train).logits()

  def readout(self, batch: Batch, *, train: bool = False) -> Readout:
    assert batch.encoder_tokens is not None, 'check_features rejects tasks without encoder_tokens'
    segments_BT, segments_BS = batch.segment_ids, batch.encoder_segment_ids
    segments_BT = jnp.ones_like(batch.tokens) if segments_BT is None else segments_BT
    segments_BS = jnp.ones_like(batch.encoder_tokens) if segments_BS is None else segments_BS
    positions_BT = batch.positions
    if positions_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    encoded_BSD = self.encode(batch.encoder_tokens, segments_BS, train=train)
    read = Read(AttentionMask(segments_BT), segments_BT[:, :, None] == segments_BS[:, None, :], encoded_BSD)
    return self.output(self.hidden(batch.tokens, positions_BT, read, train=train))

  def encode(self, tokens_BS: jax.Array, segments_BS: jax.Array, train: bool = False) -> jax.Array:
    """The encoder's output [B, S, D]; each token attends to its whole segment."""
    cfg = self.cfg
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    x_BSD = (self.encoder_embed if cfg.encoder_vocab_size else self.embed).encode(tokens_BS)
    if cfg.positions == 'learned':
      x_BSD += self.encoder_positions.encode(positions_BS)
    both_ways = AttentionMask(segments_BS, jnp.ones_like(tokens_BS, bool))
    x_BSD = self._run(self.encoder_block, self.encoder, x_BSD, positions_BS, both_ways, self.encoder_block.cfg.layers,
                      train)
    return off_stream(self.encoder_norm(x_BSD))

  def hidden(self, tokens_BT, positions_BT, read: Read, train: bool = False):
    """The decoder's residual stream after all blocks [B, T, D]."""
    x_BTD = self.embedded(tokens_BT, positions_BT)
    return self._run(self.block, self.blocks, x_BTD, positions_BT, read, self.cfg.layers, train)

  def _run(self, block, params, x_BTD, positions_BT, context: Any, layers, train):
    cfg = self.cfg
    dropout_key = self.make_rng('dropout') if train else None
    if dropout_key is not None:
      key = jax.random.fold_in(dropout_key, jax.tree.leaves(params)[0].shape[0])
      x_BTD = self.dropout(x_BTD, deterministic=False, rng=key)
    x_BTD, sown = apply_stack(
        block, params, x_BTD, positions_BT, context, layers=layers, dropout_key=dropout_key, train=train,
        dtype=cfg.operand_dtype, unroll=cfg.scan_unroll, remat=cfg.remat)
    for collection, values in sown.items():
      self.sow(collection, 'encoder' if block is self.encoder_block else 'blocks', values)
    return x_BTD

  # The decoding half is built like a Decoder, from modules of the same names.
  embedded: ClassVar[Any] = Decoder.embedded
  output: ClassVar[Any] = Decoder.output
  decode_variables: ClassVar[Any] = Decoder.decode_variables

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    cfg = self.cfg
    own, read = (jnp.zeros((batch_size, cfg.K, length, cfg.H), cfg.operand_dtype) for length in (max_len, cfg.S))
    return {'layers': ({'self': {'k': own, 'v': own}, 'cross': {'k': read, 'v': read}},) * cfg.num_layers,
            'length_B': jnp.zeros(batch_size, jnp.int32), 'read_BS': jnp.zeros((batch_size, cfg.S), bool)}

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    width, missing = tokens_BT.shape[1], self.cfg.S - tokens_BT.shape[1]
    real_BS = jnp.arange(width)[None] < lengths_B[:, None]
    encoded_BSD = self.encode(tokens_BT, real_BS.astype(jnp.int32))
    encoded_BSD = jnp.pad(encoded_BSD, ((0, 0), (0, missing), (0, 0)))
    cache = cache | {'read_BS': jnp.pad(real_BS, ((0, 0), (0, missing)))}
    assert self.cfg.start_id is not None, 'resolve fills it in'
    start_B = jnp.full(tokens_BT.shape[0], self.cfg.start_id, jnp.int32)
    return self._decode(start_B, cache, encoded_BSD)

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return self._decode(tokens_B, cache, None)

  def _decode(self, tokens_B, cache, encoded_BSD):
    read = Read(AttentionMask(), cache['read_BS'][:, None], encoded_BSD)
    positions_B1 = cache['length_B'][:, None]
    layers = self.layers or unstack(self.blocks, self.cfg.operand_dtype)
    x_B1D, layers = apply_layers(self.block, layers, self.embedded(tokens_B[:, None], positions_B1), positions_B1, read,
                                 layers=self.cfg.layers, cache=cache['layers'])
    cache = cache | {'layers': layers, 'length_B': cache['length_B'] + 1}
    return self.output(x_B1D).logits()[:, 0], cache


register(MODELS, 'encdec', EncDec, EncDecConfig)
