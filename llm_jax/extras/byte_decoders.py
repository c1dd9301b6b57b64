"""Decoders inside a patch: they predict its bytes, one after the other, from a context.

A decoder is called on all patches at once, with a table of byte embeddings, or started from a context and stepped byte
by byte. Dims: B batch, M patches, P bytes in a patch, D embed, N heads, H head_dim, V vocab and a row for "no byte".
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.layers.attention import AttentionMask
from llm_jax.layers.stack import apply_layers, apply_stack, init_stack, unstack
from llm_jax.models.blocks import make_einsum
from llm_jax.models.decoder import Block
from llm_jax.models.decoder_config import DecoderConfig


class GRU(nn.Module):
  """A gated recurrent unit (Cho et al., arXiv 1406.1078) whose initial state is computed from the context."""

  cfg: Any

  def setup(self):
    D = self.cfg.embed_dim
    matrix = partial(make_einsum(self.cfg), initializer=nn.initializers.normal(D ** -0.5))
    self.first = matrix(shape=(D, D), axes=('embed', 'gate'), bias_dims=1)
    gates = partial(matrix, shape=(D, 3, D), axes=('embed', 'gates', 'gate'), bias_dims=2)
    self.read, self.carry = gates(), gates()

  def __call__(self, contexts_BMD: jax.Array, table_VD: jax.Array, ids_BMP: jax.Array, train: bool) -> jax.Array:
    del train
    h_BMD, hs = self.begin(contexts_BMD), []
    # The vocabulary is far smaller than the number of positions, so the product is computed once per byte value.
    read_BMPGD = jnp.take(self.read('BTD,DGE->BTGE', table_VD[None])[0], ids_BMP, axis=0, mode='clip')
    for j in range(ids_BMP.shape[2]):
      h_BMD = self._cell(h_BMD, read_BMPGD[:, :, j])
      hs.append(h_BMD)
    return jnp.stack(hs, axis=2)

  def begin(self, contexts_BMD: jax.Array) -> jax.Array:
    """The state before the first byte."""
    return jnp.tanh(self.first('BTD,DE->BTE', contexts_BMD))

  def step(self, state_BMD: jax.Array, contexts_BMD: jax.Array, bytes_BMD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(hidden states for predicting the next byte, state)."""
    del contexts_BMD
    h_BMD = self._cell(state_BMD, self.read('BTD,DGE->BTGE', bytes_BMD))
    return h_BMD, h_BMD

  def _cell(self, h_BMD, read_BMGD):
    carried_BMGD = self.carry('BTD,DGE->BTGE', h_BMD)
    update, reset = (jax.nn.sigmoid(read_BMGD[:, :, g] + carried_BMGD[:, :, g]) for g in (0, 1))
    candidate_BMD = jnp.tanh(read_BMGD[:, :, 2] + reset * carried_BMGD[:, :, 2])
    return update * h_BMD + (1 - update) * candidate_BMD

  @staticmethod
  def init_state(cfg: Any, batch_size: int) -> jax.Array:
    return jnp.zeros((batch_size, 1, cfg.embed_dim))

  @staticmethod
  def flops_per_byte(cfg: Any) -> float:
    return 6 * (3 + 1 / cfg.patch_size) * cfg.embed_dim**2


class Transformer(nn.Module):
  """Decoder blocks over the bytes of one patch, with the context added to each byte."""

  cfg: Any

  def setup(self):
    inner = self._inner(self.cfg)
    self.into = make_einsum(self.cfg)(shape=(inner.embed_dim,) * 2, axes=('embed', 'gate'),
                                      initializer=nn.initializers.normal(inner.embed_dim ** -0.5))
    self.block = Block(inner, parent=None)
    self.blocks = self.param('blocks', init_stack(self.block, inner.num_layers, inner.embed_dim))

  @staticmethod
  def _inner(cfg: Any) -> DecoderConfig:
    return DecoderConfig(
        num_layers=cfg.decoder_layers, embed_dim=cfg.embed_dim, num_heads=cfg.num_heads, mlp=cfg.mlp, mlp_dim=cfg.F,
        norm=cfg.norm, use_bias=cfg.use_bias, positions='rope', attention=cfg.attention, init_std=cfg.init_std,
        dropout=cfg.dropout, dtype=cfg.operand_dtype.name, product_dtype=cfg.product_dtype,
        gradient_dtype=cfg.gradient_dtype)

  def __call__(self, contexts_BMD: jax.Array, table_VD: jax.Array, ids_BMP: jax.Array, train: bool) -> jax.Array:
    (B, M, P), D = ids_BMP.shape, table_VD.shape[1]
    x_BMPD = jnp.take(table_VD, ids_BMP, axis=0, mode='clip') + self.into('BTD,DE->BTE', contexts_BMD)[:, :, None]
    positions = jnp.broadcast_to(jnp.arange(P), (B * M, P))
    dropout_key = self.make_rng('dropout') if train and self.cfg.dropout else None
    x, _ = apply_stack(
        self.block, self.blocks, x_BMPD.reshape(B * M, P, D), positions, AttentionMask(),
        layers=self.block.cfg.layers, train=train, dropout_key=dropout_key, dtype=self.cfg.operand_dtype,
        unroll=self.cfg.scan_unroll, remat=self.cfg.remat)
    return x.reshape(B, M, P, D)

  def begin(self, contexts_BMD: jax.Array) -> dict:
    return self.init_state(self.cfg, contexts_BMD.shape[0])

  def step(self, state: dict, contexts_BMD: jax.Array, bytes_BMD: jax.Array) -> tuple[jax.Array, dict]:
    x_BMD = bytes_BMD + self.into('BTD,DE->BTE', contexts_BMD)
    h_BMD, layers = apply_layers(
        self.block, unstack(self.blocks, self.cfg.operand_dtype), x_BMD, state['place_B'][:, None], AttentionMask(),
        layers=self.block.cfg.layers, cache=state['layers'])
    return h_BMD, {'layers': layers, 'place_B': state['place_B'] + 1}

  @classmethod
  def init_state(cls, cfg: Any, batch_size: int) -> dict:
    inner = cls._inner(cfg)
    empty = jnp.zeros((batch_size, inner.K, cfg.patch_size, inner.H), cfg.operand_dtype)
    return {'layers': ({'k': empty, 'v': empty},) * inner.num_layers, 'place_B': jnp.zeros(batch_size, jnp.int32)}

  @classmethod
  def flops_per_byte(cls, cfg: Any) -> float:
    inner = dataclasses.replace(cls._inner(cfg), vocab_size=1)
    return (inner.flops_per_token(cfg.patch_size) or 0.0) - 6 * cfg.embed_dim + 6 * cfg.embed_dim**2 / cfg.patch_size


LOCAL: dict[str, Any] = {'gru': GRU, 'transformer': Transformer}
