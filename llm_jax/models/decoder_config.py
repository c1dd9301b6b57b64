"""The shape and parts of a decoder, and those that other models share with it.

Dims: D embed, N heads, K kv heads, H head_dim, F mlp, V vocab.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from llm_jax.base.builder import Sections, check_names, keep_named, sections
from llm_jax.layers.attention import Layer
from llm_jax.layers.kernels import OPTIONS, describe_attention
from llm_jax.layers.mlp import MLPS
from llm_jax.layers.rope import Rope
from llm_jax.layers.rope_scaling import ROPE_SCALINGS, unscaled
from llm_jax.models.blocks import PARTS, check_parts, make_qk_norm, operand_dtype
from llm_jax.models.protocol import ModelConfig


@dataclasses.dataclass(frozen=True)
class StackConfig(ModelConfig):
  """Shape and parts that models with a stack of layers share. The defaults are those of GPT-2, without biases."""

  num_layers: int = 12  # at least 1
  embed_dim: int = 768  # width of the residual stream; a multiple of num_heads, unless head_dim is set
  num_heads: int = 12  # attention heads of a layer
  mlp_dim: int | None = None  # None: 4 * embed_dim
  mlp: str = 'gelu_tanh'  # one of MLPS
  norm: str = 'layer_norm'  # one of layers.norm.NORMS
  rope_base: float = 10000.0  # base of the rotary wavelengths, for positions rope
  vocab_multiple: int = 1  # tables have rows up to a multiple of it, so that meshes can split them; never predicted
  use_bias: bool = False  # on matrices and LayerNorms
  attention: str = 'auto'  # auto, the fastest that supports the case, or one of layers.kernels.ATTENTION
  norm_bias: bool | None = None  # of LayerNorms; None: use_bias
  mlp_bias: bool | None = None  # of matrices of the feed-forward layer; None: use_bias
  logit_scale: float = 1.0  # factor of logits, before their soft cap
  logit_soft_cap: float = 0.0  # cap * tanh(logits / cap); 0: off
  dropout: float = 0.0  # on the embedding and on each layer's output, before it is added to the residual stream
  init_std: float = 0.02  # of matrices; those that write to the residual stream get init_std / sqrt(2 L)
  # Of matrix operands; weights, norms, softmax, losses are float32. auto: bfloat16 if this device multiplies it faster.
  dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'
  # Of what products return. auto: dtype on GPUs and TPUs, which halves the traffic of memory, and float32 on CPUs.
  product_dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'
  # Of gradients while devices sum them; they are accumulated in float32. auto: dtype on GPUs and TPUs, float32 on CPUs.
  gradient_dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'
  scan_unroll: int = 1  # layers per iteration of the scan; more compile longer and may run faster
  remat: str = 'none'  # what a layer saves for its backward pass, from all to nothing: one of layers.stack.REMAT
  sections: Sections = sections(*PARTS.values(), ROPE_SCALINGS)

  def __post_init__(self) -> None:
    require(self, 'at least 1', lambda x: x >= 1, 'vocab_size', 'max_len', 'num_layers', 'embed_dim', 'num_heads',
            'mlp_dim', 'scan_unroll', 'vocab_multiple')
    require(self, '0 (no cap), or up to 1e6', lambda x: 0 <= x <= 1e6, 'logit_soft_cap')
    require(self, 'positive and at most 1000', lambda x: 0 < x <= 1000, 'init_std')
    require(self, 'positive and at most 1e12', lambda x: 0 < x <= 1e12, 'rope_base')
    require(self, 'at most 10000', lambda x: x <= 10_000, 'num_layers')
    require(self, 'at most 2^31 - 1', lambda x: x < 2**31, 'vocab_size', 'max_len', 'embed_dim', 'mlp_dim')
    require(self, 'in [0, 1)', lambda x: 0 <= x < 1, 'dropout')
    require(self, 'positive and at most 1e6', lambda x: 0 < x <= 1e6, 'logit_scale')
    check_parts(self)
    parts = {name: getattr(self, name) for name in (*PARTS, 'rope_scaling') if hasattr(self, name)}
    named = [entry for names in parts.values() for entry in ((names,) if isinstance(names, str) else names)]
    keep_named(self, named, f'none of {", ".join(parts)} names it')

  @property
  def K(self) -> int:
    return self.num_heads

  @property
  def H(self) -> int:
    return self.embed_dim // self.num_heads

  @property
  def operand_dtype(self) -> jnp.dtype:
    return operand_dtype(self.dtype)

  @property
  def is_random(self) -> bool:
    """Whether a training step uses random numbers."""
    return self.dropout > 0 or any(getattr(part, 'rounding', '') == 'stochastic' for part in self.sections.values())

  @property
  def V(self) -> int:
    """Rows of tables, padding included."""
    assert self.vocab_size is not None, 'resolve fills it in'
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def F(self) -> int:
    return self.mlp_dim or 4 * self.embed_dim

  @property
  def layers(self) -> tuple[Layer, ...]:
    """What differs between the layers: layer l is layers[l % len(layers)], and the length divides num_layers."""
    return (Layer(rope=Rope(self.rope_base, unscaled)),)

  @property
  def head_options(self) -> dict[str, Any]:
    """Fields of attention layers, see layers.attention.MultiHead, that not all models have."""
    return {'qkv_bias': self.use_bias, 'out_bias': self.use_bias}

  def describe(self, seq_len: int, segments: bool) -> list[str]:
    return [f'model: {self.name}, {self.num_layers} layers, {self.embed_dim} wide, vocabulary {self.vocab_size}, '
            f'{self.dtype}',
            'attention kernel: ' + describe_attention(self.attention, self.dtype, self.H, self.positions_of(seq_len),
                                               segments=segments, prefix=self.prefix_attention,
                                               scores=self.score_options)]

  @property
  def score_options(self) -> tuple[str, ...]:
    """The options of attention's scores that are used; see layers.kernels.OPTIONS."""
    return ()


def require(config: Any, words: str, fits: Callable[[Any], bool], *fields: str) -> None:
  """Raises ValueError for a field that is set to a value that does not fit."""
  for field in fields:
    value = getattr(config, field)
    if value is not None and not fits(value):
      raise ValueError(f'{field} must be {words}; got {value}')


@dataclasses.dataclass(frozen=True)
class DecoderConfig(StackConfig):
  """Shape and parts of a decoder. With learned positions, rows longer than max_len are not possible."""

  name: str = 'decoder'  # one of models.registry.MODELS
  num_kv_heads: int | None = None  # None: num_heads
  head_dim: int | None = None  # None: embed_dim / num_heads
  positions: Literal['learned', 'rope'] = 'learned'  # a table of max_len positions, or rotary
  einsum: str = 'full'  # one of layers.linear.EINSUMS: the kind of matrices between hidden states
  rope_bases: tuple[float, ...] = ()  # of layers in turn; 0: no positions in that layer; (): rope_base in all
  rope_scaling: tuple[str, ...] = ('none',)  # of layers in turn: each one of layers.rope_scaling.ROPE_SCALINGS
  rope_dim: int | None = None  # features of a head that are rotated, the first ones; None: all
  qk_norm: bool = False  # normalize queries and keys, by an RMSNorm
  qk_norm_heads: Literal['each', 'all'] = 'each'  # whether each head is normalized, or all heads as one vector
  qkv_bias: bool | None = None  # of the matrices to queries, keys and values; None: use_bias
  out_bias: bool | None = None  # of the matrix from heads to the residual stream; None: use_bias
  query_scale: float | None = None  # factor of attention's scores; None: head_dim ** -0.5
  attention_soft_cap: float = 0.0  # cap * tanh(scores / cap); 0: off
  attention_sinks: bool = False  # a learned score for each head that takes part in the softmax and adds nothing
  norm_position: Literal['pre', 'post', 'both'] = 'pre'  # of norms: before, after or around attention and MLP
  parallel_residual: bool = False  # the MLP has the same input as attention
  residual_scale: float = 1.0  # factor of what layers add to the residual stream
  embed_scale: float = 1.0  # factor of token embeddings, not of the readout that is tied to them
  # Of the residual stream. auto: dtype on GPUs and TPUs, float32 on CPUs.
  stream_dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'
  tie_embeddings: bool = True  # use the embedding as the readout matrix
  windows: tuple[int, ...] = (0,)  # layer l attends to windows[l % len(windows)] tokens; 0: all
  prefix_attention: bool = False  # bidirectional attention within prompts and where the data's prefix_mask is 1
  embed_init_std: float | None = None  # of token and position embeddings; None: init_std
  readout_init_std: float | None = None  # of an untied readout; None: init_std

  def __post_init__(self) -> None:
    super().__post_init__()
    require(self, 'at least 1', lambda x: x >= 1, 'num_kv_heads', 'head_dim', 'rope_dim')
    require(self, 'positive', lambda x: x > 0, 'embed_init_std', 'readout_init_std')
    require(self, 'positive and at most 1e6', lambda x: 0 < x <= 1e6, 'query_scale', 'residual_scale', 'embed_scale')
    require(self, '0 (no cap), or up to 1e6', lambda x: 0 <= x <= 1e6, 'attention_soft_cap')
    self._check_rope()
    if self.head_dim is None and self.embed_dim % self.num_heads:
      legal = [n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0]
      near = sorted(sorted(legal, key=lambda n: abs(n - self.num_heads))[:3])
      raise ValueError(f'num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}; '
                       f'nearest that do: {", ".join(map(str, near))} (or set head_dim)')
    if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
      raise ValueError(f'num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}')
    if not self.windows or min(self.windows) < 0:
      raise ValueError(f'windows must have at least one size, each 0 (all tokens) or more; got {self.windows}')
    if self.tie_embeddings and self.readout_init_std is not None:
      raise ValueError('readout_init_std is set, but with tie_embeddings the readout is the embedding: set '
                       'embed_init_std, or tie_embeddings=False')

  def _check_rope(self) -> None:
    check_names('rope_scaling', self.rope_scaling, ROPE_SCALINGS)
    if not self.rope_scaling:
      raise ValueError("rope_scaling must have at least one name, such as none; got ()")
    if not all(base == 0 or 1 < base <= 1e12 for base in self.rope_bases):
      raise ValueError(f'rope_bases must hold numbers above 1 and up to 1e12, or 0; got {self.rope_bases}')
    rotary = {'rope_bases': (), 'rope_scaling': ('none',), 'rope_dim': None}
    if self.positions == 'learned' and (found := [name for name, off in rotary.items() if getattr(self, name) != off]):
      raise ValueError(f'{", ".join(found)} would have no effect, as positions is learned: set positions=rope')
    rotated = self.rope_dim or self.H
    if self.positions == 'rope' and (rotated % 2 or rotated > self.H):
      field = 'head_dim' if self.rope_dim is None else 'rope_dim'
      raise ValueError(f'positions rope rotates pairs of features: {field} must be even, and at most head_dim '
                       f'{self.H}; got {rotated}')
    if 'rope_dynamic' in self.rope_scaling and rotated < 4:
      raise ValueError(f'rope_scaling rope_dynamic needs at least 4 rotated features of a head; got {rotated}')

  @property
  def layers(self) -> tuple[Layer, ...]:
    bases = self.rope_bases or (self.rope_base,)
    scalings = [ROPE_SCALINGS[name](ROPE_SCALINGS.section(name, self.sections)) for name in self.rope_scaling]

    def layer(i: int) -> Layer:
      base = bases[i % len(bases)] if self.positions == 'rope' else 0
      rope = Rope(base, scalings[i % len(scalings)], self.rope_dim) if base else None
      return Layer(self.windows[i % len(self.windows)], rope)

    layers = tuple(layer(i) for i in range(self.num_layers))
    return next(layers[:n] for n in range(1, len(layers) + 1)
                if len(layers) % n == 0 and layers == layers[:n] * (len(layers) // n))

  @property
  def head_options(self) -> dict[str, Any]:
    return {'qkv_bias': self.use_bias if self.qkv_bias is None else self.qkv_bias,
            'out_bias': self.use_bias if self.out_bias is None else self.out_bias,
            'qk_norm': make_qk_norm(self) if self.qk_norm else None, 'norm_heads': self.qk_norm_heads == 'all',
            'query_scale': self.query_scale, 'soft_cap': self.attention_soft_cap, 'sinks': self.attention_sinks}

  @property
  def score_options(self) -> tuple[str, ...]:
    return tuple(option for option, field in OPTIONS.items() if getattr(self, field))

  @property
  def K(self) -> int:
    return self.num_kv_heads or self.num_heads

  @property
  def H(self) -> int:
    return self.head_dim or super().H

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
    gated = self.mlp in ('swiglu', 'geglu', 'relu2glu')
    matrices = self.num_layers * (D * N * H * 2 + D * K * H * 2 + D * F * (3 if gated else 2)) + D * self.V
    seen = [min(layer.window or seq_len, seq_len) for layer in self.layers]
    attended = self.num_layers / len(seen) * sum(s * (1 - s / (2 * seq_len)) for s in seen)  # mean keys per token
    return 6 * matrices + 12 * attended * N * H
