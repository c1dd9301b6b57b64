"""The feed-forward layer. Dims: B batch, T length, D embed, F mlp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from flax.typing import Initializer

from llm_jax.base.registry import NoSettings, Registry, factory_of, register
from llm_jax.base.sharding import constrain
from llm_jax.layers.linear import Einsum


class MLP(nn.Module):
  """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

  embed_dim: int
  mlp_dim: int
  einsum: Callable[..., Einsum]  # the model's Einsum, with dtype and init filled in
  out_init: Initializer
  activation: Callable[[jax.Array], jax.Array]
  gated: bool = False
  use_bias: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    matrix = partial(self.einsum, bias_dims=int(self.use_bias))
    into = partial(matrix, shape=(self.embed_dim, self.mlp_dim), axes=('embed', 'mlp'))
    h_BTF = into(name='up')('BTD,DF->BTF', x_BTD)
    if self.gated:
      h_BTF *= self.activation(into(name='gate')('BTD,DF->BTF', x_BTD))
    else:
      h_BTF = self.activation(h_BTF)
    h_BTF = constrain(h_BTF, 'act_batch', 'act_length', 'act_mlp')
    out = matrix(shape=(self.mlp_dim, self.embed_dim), axes=('mlp', 'embed'), initializer=self.out_init, name='down')
    return out('BTF,FD->BTD', h_BTF)


def gelu(x: jax.Array) -> jax.Array:
  """x * Phi(x) (arXiv 1606.08415). Uses erf, as jax.nn.gelu's erfc takes twice as long on CPUs."""
  return x * (0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5))


gelu_tanh = partial(jax.nn.gelu, approximate=True)
relu_squared = lambda x: jax.nn.relu(x) ** 2  # noqa: E731 (arXiv 2109.08668)

# Feed-forward layers [B, T, D] -> [B, T, D]: Flax modules with fields embed_dim, mlp_dim, einsum, out_init, use_bias.
# MLPS[name](settings) is called like MLP.
MLPS = Registry('mlp', factory_of('use_bias'))
register(MLPS, 'gelu', lambda settings: partial(MLP, activation=gelu), NoSettings)
register(MLPS, 'gelu_tanh', lambda settings: partial(MLP, activation=gelu_tanh), NoSettings)
register(MLPS, 'relu', lambda settings: partial(MLP, activation=jax.nn.relu), NoSettings)
register(MLPS, 'relu_squared', lambda settings: partial(MLP, activation=relu_squared), NoSettings)
register(MLPS, 'swiglu', lambda settings: partial(MLP, activation=jax.nn.silu, gated=True), NoSettings)
register(MLPS, 'geglu', lambda settings: partial(MLP, activation=gelu_tanh, gated=True), NoSettings)
