"""A decoder whose config covers GPT-2 (OpenAI 2019), Llama (arXiv 2302.13971) and Qwen3 (arXiv 2505.09388).

Dims: B batch, T length, S cache length, D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from llm_jax.base.batch import Batch, Cache
from llm_jax.base.builder import Sections, keep_named, sections
from llm_jax.base.sharding import constrain
from llm_jax.layers.attention import Attention, AttentionMask, describe_attention
from llm_jax.layers.linear import Embed
from llm_jax.layers.mlp import MLPS
from llm_jax.layers.stack import apply_stack, init_stack
from llm_jax.losses.readout import Readout
from llm_jax.models.blocks import (
    PARTS,
    OutputMatrix,
    check_parts,
    make_heads,
    make_mlp,
    make_norm,
    make_readout,
    operand_dtype,
)
from llm_jax.models.protocol import ModelConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
  """Shape and parts of a decoder. The defaults are those of GPT-2, without biases."""

  name: str = 'decoder'
  vocab_size: int | None = None  # None: the tokenizer's
  max_len: int | None = None  # longest row; None: data.seq_len. A hard limit only with learned positions
  num_layers: int = 12
  embed_dim: int = 768
  num_heads: int = 12
  num_kv_heads: int | None = None  # None: num_heads
  head_dim: int | None = None  # None: embed_dim / num_heads
  mlp_dim: int | None = None  # None: 4 * embed_dim
  mlp: str = 'gelu_tanh'  # one of MLPS
  norm: str = 'layer_norm'  # one of NORMS
  positions: Literal['learned', 'rope'] = 'learned'
  rope_base: float = 10000.0
  use_bias: bool = False  # on matrices and LayerNorms
  einsum: str = 'full'  # one of EINSUMS: the kind of matrices between hidden states
  qk_norm: bool = False
  attention: str = 'auto'  # one of ATTENTION; auto: the fastest that supports the device, dtype and shapes
  tie_embeddings: bool = True
  windows: tuple[int, ...] = (0,)  # layer l attends to windows[l % len(windows)] tokens; 0: all
  prefix_attention: bool = False  # bidirectional attention within prompts and where the data's prefix_mask is 1
  logit_soft_cap: float = 0.0  # cap * tanh(logits / cap); 0: off
  dropout: float = 0.0  # on the embedding and on each layer's output, before it is added to the residual stream
  init_std: float = 0.02  # of matrices; those that write to the residual stream get init_std / sqrt(2 L)
  embed_init_std: float | None = None  # of token and position embeddings; None: init_std
  readout_init_std: float | None = None  # of an untied readout; None: init_std
  # Of matrix operands; everything else is float32. auto: bfloat16 where the device multiplies it faster than float32.
  dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'
  scan_unroll: int = 1
  remat: str = 'none'  # one of REMAT: what a layer saves for its backward pass; see layers/stack.py
  sections: Sections = sections(*PARTS.values())

  def __post_init__(self) -> None:
    positive = {f: getattr(self, f) for f in ('vocab_size', 'max_len', 'num_layers', 'embed_dim', 'num_heads',
                                              'num_kv_heads', 'head_dim', 'mlp_dim', 'scan_unroll')}
    for field, value in positive.items():
      if value is not None and value < 1:
        raise ValueError(f'{field} must be at least 1; got {value}')
    if self.head_dim is None and self.embed_dim % self.num_heads:
      legal = [n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0]
      near = sorted(sorted(legal, key=lambda n: abs(n - self.num_heads))[:3])
      raise ValueError(f'num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}; '
                       f'nearest that do: {", ".join(map(str, near))} (or set head_dim)')
    if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
      raise ValueError(f'num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}')
    if self.positions == 'rope' and self.H % 2:
      raise ValueError(f'positions rope rotates pairs of features: head_dim must be even; got {self.H}')
    if not self.windows or min(self.windows) < 0:
      raise ValueError(f'windows must have at least one size, each 0 (all tokens) or more; got {self.windows}')
    if self.num_layers % len(self.windows):
      raise ValueError(f'the pattern windows={self.windows} does not divide num_layers {self.num_layers}')
    for field in ('init_std', 'embed_init_std', 'readout_init_std', 'rope_base'):
      value = getattr(self, field)
      if value is not None and value <= 0:
        raise ValueError(f'{field} must be positive; got {value}')
    if self.tie_embeddings and self.readout_init_std is not None:
      raise ValueError('readout_init_std is set, but with tie_embeddings the readout is the embedding: set '
                       'embed_init_std, or tie_embeddings=False')
    if self.logit_soft_cap < 0:
      raise ValueError(f'logit_soft_cap must be positive, or 0 for none; got {self.logit_soft_cap}')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout must be in [0, 1); got {self.dropout}')
    check_parts(self)
    keep_named(self, (self.mlp, self.norm, self.einsum), 'none of mlp, norm and einsum names it')

  @property
  def K(self) -> int:
    return self.num_kv_heads or self.num_heads

  @property
  def H(self) -> int:
    return self.head_dim or self.embed_dim // self.num_heads

  @property
  def operand_dtype(self) -> jnp.dtype:
    return operand_dtype(self.dtype)

  @property
  def V(self) -> int:
    assert self.vocab_size is not None, 'resolve fills it in'
    return self.vocab_size

  @property
  def F(self) -> int:
    return self.mlp_dim or 4 * self.embed_dim

  def describe(self, seq_len: int, segments: bool) -> list[str]:
    return [f'model: {self.name}, {self.num_layers} layers, {self.embed_dim} wide, vocabulary {self.vocab_size}, '
            f'{self.dtype}',
            'attention: ' + describe_attention(self.attention, self.dtype, self.H, self.positions_of(seq_len),
                                               segments=segments, prefix=self.prefix_attention)]

  @property
  def embed_std(self) -> float:
    return self.init_std if self.embed_init_std is None else self.embed_init_std

  @property
  def readout_std(self) -> float:
    return self.init_std if self.readout_init_std is None else self.readout_init_std

  def flops_per_token(self, seq_len: int) -> float | None:
    """FLOPs of a training step per token in rows of seq_len, as MFU counts them; None with a plug-in's MLP.

    Each multiply-add counts 2, once for the forward pass and twice for the backward pass. Counted are the products of
    q, k, v, o, the feed-forward layer and the readout, and attention's two products over the keys that a token attends
    to: on average half of the row without a window. Not counted are lookups, norms, softmax, activations, the
    optimizer, and recomputation by remat.
    """
    if not MLPS.origin(self.mlp).startswith('llm_jax.'):
      return None
    D, N, H, K, F = self.embed_dim, self.num_heads, self.H, self.K, self.F
    gated = self.mlp in ('swiglu', 'geglu')
    matrices = self.num_layers * (D * N * H * 2 + D * K * H * 2 + D * F * (3 if gated else 2)) + D * self.V
    seen = [min(w or seq_len, seq_len) for w in self.windows]
    attended = self.num_layers / len(seen) * sum(s * (1 - s / (2 * seq_len)) for s in seen)  # mean keys per token
    return 6 * matrices + 12 * attended * N * H


class Block(nn.Module):
  """Pre-norm attention, then a pre-norm feed-forward layer, each added to the residual stream."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x_BTD, positions_BT, mask: AttentionMask, cache, window: int, train: bool):
    cfg = self.cfg
    norm = make_norm(cfg)
    out_init = nn.initializers.normal(cfg.init_std / (2 * cfg.num_layers) ** 0.5)
    dropout = nn.Dropout(cfg.dropout, deterministic=not train)
    attend = self.make_attention(out_init)
    h_BTD, cache = attend(norm(name='attn_norm')(x_BTD), positions_BT, mask, cache, window)
    x_BTD = x_BTD + dropout(h_BTD)
    mlp = make_mlp(cfg, out_init, name='mlp')
    x_BTD = x_BTD + dropout(mlp(norm(name='mlp_norm')(x_BTD)))
    return constrain(x_BTD, 'act_batch', 'act_length', 'act_embed'), cache

  def make_attention(self, out_init: Initializer) -> nn.Module:
    """The attention layer, for subclasses to replace."""
    return make_heads(self.cfg, Attention, out_init, name='attn')


class Decoder(nn.Module):
  """A LanguageModel (see models/protocol.py)."""

  cfg: DecoderConfig
  reads = frozenset({'tokens', 'targets', 'loss_mask', 'positions', 'segment_ids', 'prefix_mask'})  # of a Batch
  needs: frozenset[str] = frozenset()  # features that not all tasks provide
  prompt_in_row = True
  block_type = Block  # for subclasses to replace

  def setup(self) -> None:
    cfg = self.cfg
    init = nn.initializers.normal(cfg.embed_std)
    self.embed = Embed(cfg.V, cfg.embed_dim, init)
    if cfg.positions == 'learned':
      self.positions = Embed(cfg.max_len or 0, cfg.embed_dim, init, axes=('positions', 'embed'))
    self.dropout = nn.Dropout(cfg.dropout)
    self.block = self.block_type(cfg, parent=None)
    self.blocks = self.param('blocks', init_stack(self.block, cfg.num_layers, cfg.embed_dim))
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
    x_BTD, _ = self.hidden(batch.tokens, positions_BT, AttentionMask(batch.segment_ids, prefix_BT), train=train)
    return self.output(x_BTD)

  def hidden(self, tokens_BT, positions_BT, mask: AttentionMask, cache=None, train: bool = False):
    """The residual stream after all blocks [B, T, D], and the cache."""
    cfg = self.cfg
    x_BTD = self.embed.encode(tokens_BT)
    if cfg.positions == 'learned':
      x_BTD += self.positions.encode(positions_BT)
    x_BTD = constrain(x_BTD, 'act_batch', 'act_length', 'act_embed')
    dropout_key = self.make_rng('dropout') if train else None
    if dropout_key is not None:
      key = jax.random.fold_in(dropout_key, cfg.num_layers)
      x_BTD = self.dropout(x_BTD, deterministic=False, rng=key)
    x_BTD, cache, sown = apply_stack(
        self.block, self.blocks, x_BTD, positions_BT, mask, windows=cfg.windows, cache=cache,
        dropout_key=dropout_key, train=train, dtype=cfg.operand_dtype, unroll=cfg.scan_unroll, remat=cfg.remat)
    for collection, values in sown.items():
      self.sow(collection, 'blocks', values)
    return x_BTD, cache

  def output(self, x_BTD: jax.Array) -> Readout:
    return make_readout(self.cfg, self.final_norm(x_BTD), self.embed if self.cfg.tie_embeddings else self.head)

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    cfg = self.cfg
    empty = jnp.zeros((cfg.num_layers, batch_size, max_len, cfg.K, cfg.H), cfg.operand_dtype)
    return {'layers': {'k': empty, 'v': empty}, 'length_B': jnp.zeros(batch_size, jnp.int32)}

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    # Padding after a prompt fills slots that no query attends to before `decode` overwrites them.
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    slots_S = jnp.arange(cache['layers']['k'].shape[2])
    prefix_BS = slots_S[None] < lengths_B[:, None] if self.cfg.prefix_attention else None
    x_BTD, layers = self.hidden(tokens_BT, positions_BT, AttentionMask(prefix_BS=prefix_BS), cache=cache['layers'])
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return self.output(last_B1D).logits()[:, 0], {'layers': layers, 'length_B': lengths_B}

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    x_B1D, layers = self.hidden(tokens_B[:, None], cache['length_B'][:, None], AttentionMask(), cache=cache['layers'])
    return self.output(x_B1D).logits()[:, 0], {'layers': layers, 'length_B': cache['length_B'] + 1}
