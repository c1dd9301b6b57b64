"""Parts that models share: the norm, matrices, heads and feed-forward layer named in a config, and the readout.

Dims: B batch, T length, D embed, V vocab.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from llm_jax.base.builder import known_names
from llm_jax.base.devices import has_fast_bf16, platform
from llm_jax.base.registry import Registry
from llm_jax.base.sharding import constrain
from llm_jax.layers.attention import MultiHead
from llm_jax.layers.embed import Embed
from llm_jax.layers.kernels import ATTENTION
from llm_jax.layers.linear import EINSUMS, copy_of, weight
from llm_jax.layers.mlp import MLPS
from llm_jax.layers.norm import NORMS, RMSNorm
from llm_jax.layers.product import mixed_einsum
from llm_jax.layers.stack import REMAT
from llm_jax.losses.readout import Readout

PADDED = -1e30  # the logits of the padding of a vocabulary
# Fields of a model's config that name a registry entry; the entry's settings are in the section with its name.
PARTS: dict[str, Registry] = {'mlp': MLPS, 'norm': NORMS, 'einsum': EINSUMS}


def check_parts(cfg: Any) -> None:
  """Raises ValueError for a field with a name that is not registered."""
  for field, table in (*PARTS.items(), ('remat', REMAT), ('attention', ('auto', *ATTENTION))):
    name = getattr(cfg, field, None)
    if name is not None and name not in table:
      raise ValueError(f'{field} {name!r} is unknown; {known_names(name, table, extensible=field != "remat")}')


def _make(cfg: Any, field: str, default: str) -> Callable[..., Any]:
  """The registry entry that a config field names, with its settings."""
  name, registry = getattr(cfg, field, default), PARTS[field]
  settings = getattr(cfg, 'sections', {}).get(name)
  return registry[name](registry.settings(name)() if settings is None else settings)


def make_norm(cfg: Any) -> Callable[..., nn.Module]:
  """The norm layer that cfg.norm names; called with name=."""
  norm = _make(cfg, 'norm', 'layer_norm')
  use_bias = cfg.use_bias if cfg.norm_bias is None else cfg.norm_bias
  return partial(norm, use_bias=use_bias) if 'use_bias' in inspect.signature(norm).parameters else norm


def make_qk_norm(cfg: Any) -> Callable[..., nn.Module]:
  """The RMSNorm of queries and keys, with the settings of config.model.rms_norm if that is the model's norm."""
  return partial(RMSNorm, **vars(cfg.sections['rms_norm'])) if 'rms_norm' in cfg.sections else RMSNorm


def make_einsum(cfg: Any) -> Callable[..., Any]:
  """The kind of matrix that cfg.einsum names, with the config's initial scale and dtypes."""
  init = nn.initializers.normal(cfg.init_std)
  return partial(_make(cfg, 'einsum', 'full'), initializer=init, dtype=cfg.operand_dtype,
                 out_dtype=activation_dtype(cfg, 'product_dtype'), grad_dtype=activation_dtype(cfg, 'gradient_dtype'))


def make_mlp(cfg: Any, out_init: Initializer, name: str | None = None) -> Any:
  """The feed-forward layer that cfg.mlp names."""
  use_bias = cfg.use_bias if cfg.mlp_bias is None else cfg.mlp_bias
  return _make(cfg, 'mlp', 'gelu')(cfg.embed_dim, cfg.F, make_einsum(cfg), out_init, use_bias=use_bias, name=name)


def make_heads(cfg: Any, kind: type[MultiHead], out_init: Initializer, name: str) -> Any:
  """An attention layer `kind` with the config's shape."""
  return kind(cfg.embed_dim, cfg.num_heads, cfg.K, cfg.H, make_einsum(cfg), out_init, cfg.operand_dtype,
              implementation=cfg.attention, name=name, **cfg.head_options)


def operand_dtype(name: str) -> jnp.dtype:
  """The dtype with this name; for 'auto' bfloat16 if this device computes it fast, else float32."""
  return jnp.dtype(('bfloat16' if has_fast_bf16() else 'float32') if name == 'auto' else name)


def activation_dtype(cfg: Any, field: str) -> jnp.dtype:
  """The dtype that a field of the config names; for 'auto' that of operands on accelerators and float32 on CPUs.

  On CPUs it would save nothing: their units compute in float32, and conversions take longer than the memory they save.
  """
  name = getattr(cfg, field)
  return jnp.dtype(name) if name != 'auto' else cfg.operand_dtype if platform() != 'cpu' else jnp.dtype(jnp.float32)


def on_stream(x_BTD: jax.Array) -> jax.Array:
  """Shards values of the residual stream, whose length is sharded over the devices that share a layer's products."""
  return constrain(x_BTD, 'act_batch', 'act_stream', 'act_embed')


def onto_stream(h_BTD: jax.Array) -> jax.Array:
  """A layer's output h, a sum over devices, on the stream.

  Its gradient comes off the stream once, for both products that need it: with axes for context and tensor the compiler
  would gather it again, over whole rows, for the gradient of the matrix.
  """
  return on_stream(_with_whole_gradient(h_BTD))


def off_stream(x_BTD: jax.Array) -> jax.Array:
  """Gathers the length of the residual stream, for the products and attention of a layer."""
  # Sharded first, so that a norm's result is gathered in its dtype and not before it is converted.
  return constrain(on_stream(x_BTD), 'act_batch', 'act_length', 'act_embed')


@jax.custom_vjp
def _with_whole_gradient(h_BTD: jax.Array) -> jax.Array:
  return h_BTD


_with_whole_gradient.defvjp(lambda h_BTD: (h_BTD, None), lambda _, dh_BTD: (off_stream(dh_BTD),))


def add_to_stream(x_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
  """The residual stream x with a layer's output h, in the dtype of x."""
  return on_stream((x_BTD + on_stream(h_BTD)).astype(x_BTD.dtype))


class OutputMatrix(nn.Module):
  """The readout matrix w [D, V], where it is not tied to the embedding."""

  cfg: Any
  init_std: float
  axes: tuple[str, str] = ('embed', 'vocab')

  def setup(self) -> None:
    init = nn.initializers.normal(self.init_std)
    self.w = weight(self, 'w', init, (self.cfg.embed_dim, self.cfg.V), self.axes, ('in', 'out'))

  @property
  def matrix(self) -> jax.Array:
    """w, or its copy in a lower precision."""
    return copy_of(self, self.w)


def make_readout(cfg: Any, x_BTD: jax.Array, table: Embed | OutputMatrix) -> Readout:
  """The Readout of hidden states by the embedding's table w [V, D] or a matrix w [D, V]."""
  eqn = 'BTD,VD->BTV' if isinstance(table, Embed) else 'BTD,DV->BTV'
  dtypes = cfg.operand_dtype, activation_dtype(cfg, 'gradient_dtype')
  logits = partial(project, eqn, dtypes[0], cfg.logit_scale, cfg.logit_soft_cap, cfg.vocab_size, grad_dtype=dtypes[1])
  return Readout(off_stream(x_BTD), table.matrix, logits, *dtypes, table.axes)


def project(eqn: str, dtype: jnp.dtype, scale: float, soft_cap: float, vocab_size: int, w: jax.Array,
            x_BTD: jax.Array, grad_dtype: Any = jnp.float32) -> jax.Array:
  """Logits, float32 [B, T, V]; those of the padding of the vocabulary are far below all others, but finite."""
  logits_BTV = scale * mixed_einsum(eqn, dtype, x_BTD, w, grad_dtype=grad_dtype)
  if soft_cap:
    logits_BTV = soft_cap * jnp.tanh(logits_BTV / soft_cap)
  if logits_BTV.shape[-1] == vocab_size:
    return logits_BTV
  return jnp.where(jnp.arange(logits_BTV.shape[-1])[None, None] < vocab_size, logits_BTV, PADDED)
