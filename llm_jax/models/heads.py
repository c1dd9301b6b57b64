"""A language model with additional heads, for losses on whole texts or on hidden states.

Dims: D embed, C outputs of a head.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from llm_jax.base.batch import Batch, Cache, Params
from llm_jax.layers.linear import weight
from llm_jax.losses.readout import Readout


class Head(nn.Module):
  """The weights of an affine map of hidden states: w [D, C], b [C]."""

  embed_dim: int
  num_outputs: int

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    init = nn.initializers.normal(self.embed_dim ** -0.5)
    shape, axes = (self.embed_dim, self.num_outputs), ('embed', 'norm')
    return {'w': weight(self, 'w', init, shape, axes, ('in', 'out')),
            'b': weight(self, 'b', nn.initializers.zeros, (self.num_outputs,), ('norm',))}


class WithHeads(nn.Module):
  """A LanguageModel (see models/protocol.py): `trunk`, whose parameters keep their paths, with added heads_NAME."""

  trunk: Any
  heads: tuple[tuple[str, int], ...]  # (name, outputs)
  num_weights: int = 0  # learned weights of losses

  def setup(self) -> None:
    nn.share_scope(self, self.trunk)
    self.head_modules = {name: Head(self.trunk.cfg.embed_dim, outputs, name=f'heads_{name}')
                         for name, outputs in self.heads}
    if self.num_weights:
      self.loss_weights = weight(self, 'loss_weights', nn.initializers.zeros, (self.num_weights,), ('norm',))

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    for name, _ in self.heads:
      self.head_weights(name)
    return self.trunk(batch, train=train)

  def head_weights(self, name: str) -> dict[str, jax.Array]:
    return self.head_modules[name]()

  @property
  def cfg(self) -> Any:
    return self.trunk.cfg

  @property
  def reads(self) -> frozenset[str]:
    return self.trunk.reads

  @property
  def needs(self) -> frozenset[str]:
    return self.trunk.needs

  @property
  def prompt_in_row(self) -> bool:
    return self.trunk.prompt_in_row

  def readout(self, batch: Batch, *, train: bool = False) -> Readout:
    return self.trunk.readout(batch, train=train)

  @property
  def cache_grows(self) -> bool:
    return getattr(self.trunk, 'cache_grows', False)

  def decode_variables(self, params: Params) -> dict[str, Any]:
    own = getattr(self.trunk, 'decode_variables', None)
    return {'params': params} if own is None else own(params)

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    return self.trunk.init_cache(batch_size, max_len)

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return self.trunk.prefill(tokens_BT, lengths_B, cache)

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    return self.trunk.decode(tokens_B, cache)
