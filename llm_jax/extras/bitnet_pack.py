"""Exports BitNet models with matrices packed at two bits a weight.

Matrices of a stack of L layers (and E experts) are stored as NAME/packed uint8 [L, E, inputs / 4, outputs] and
NAME/scale float32 [L, E]; other arrays are not changed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.base.batch import Params
from llm_jax.base.builder import Sections
from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, register
from llm_jax.base.trees import by_name, path_of
from llm_jax.extras.bitnet import BitNet, pack, unpack, weight_codes
from llm_jax.infer.export import EXPORTERS, Exported
from llm_jax.optim.masks import Dims, matrix_dims
from llm_jax.optim.matrices import as_matrices, from_matrices, stack_shape


def packed_model(cfg: Any, weight_bits: str) -> Any:
  """The config of the model with packed matrices; without sub_norm if `cfg` has full precision."""
  bitnet = cfg.sections['bitnet'] if cfg.einsum == 'bitnet' else BitNet(weight_bits=weight_bits)  # type: ignore
  kept = {name: settings for name, settings in cfg.sections.items() if name != 'bitnet'}
  return dataclasses.replace(cfg, einsum='packed', sections=Sections(kept | {'packed': bitnet}))


def pack_params(params: Params, info: Params, weight_bits: str) -> dict[str, jax.Array]:
  """Packs trained parameters: {'blocks/attn/q/packed': ..., 'embed/w': ...}."""
  paths = jax.tree_util.tree_leaves_with_path(matrix_dims(info), is_leaf=lambda x: isinstance(x, Dims))
  dims = {path_of(path): d for path, d in paths}

  def packed(m_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes_IO, scale = weight_codes(m_IO, weight_bits)
    return pack(codes_IO), scale

  arrays = {}
  for name, leaf in by_name(params).items():
    if name not in dims:
      arrays[name] = leaf
      continue
    stack = stack_shape(leaf, dims[name])
    for part, x in zip(('packed', 'scale'), jax.jit(jax.vmap(packed))(as_matrices(leaf, dims[name])), strict=True):
      arrays[f'{name.removesuffix("w")}{part}'] = x.reshape(*stack, *x.shape[1:])
  return arrays


def unpacked(params: Params, like: Params, info: Params, trained_on: bool) -> dict[str, Any]:
  """Unpacks an exported model's parameters, in the shapes of `like`: {'blocks/attn/q/w': ...}.

  If the model is `trained_on` with BitNet, each matrix gets the mean of |w| that it was packed with, so that it
  quantizes to the same codes and scale; otherwise it gets the values that the packed matrix computes with.
  """
  arrays, leaves = by_name(params), by_name(like)
  for path, dims in jax.tree_util.tree_leaves_with_path(matrix_dims(info), is_leaf=lambda x: isinstance(x, Dims)):
    stem = path_of(path).removesuffix('w')
    if f'{stem}packed' not in arrays:
      continue
    packed, scale, leaf = arrays.pop(f'{stem}packed'), arrays.pop(f'{stem}scale'), leaves[f'{stem}w']
    num_inputs = math.prod(leaf.shape[i] for i in dims.reduction_axis)
    codes_SIO = unpack(packed.reshape(-1, *packed.shape[-2:]), num_inputs)
    if trained_on:
      share = jnp.mean(jnp.abs(codes_SIO), axis=(1, 2)).reshape(scale.shape)
      scale = scale / jnp.where(share > 0, share, 1)  # a matrix of zeros stays one
    arrays[f'{stem}w'] = from_matrices(codes_SIO * scale.reshape(-1, 1, 1), leaf, dims)
  return arrays


class Packed:
  """The exporter `packed`: see the module's docstring."""

  @staticmethod
  def export(config: Any, params: Params, info: Params, weight_bits: str | None) -> Exported:
    """Raises ConfigError for a model whose matrices cannot be packed, or that was trained with other weight_bits."""
    if getattr(config.model, 'einsum', 'packed') == 'packed':
      raise ConfigError(f'--workdir: matrices of a {config.model.name} that is packed, or not a decoder or encdec, '
                        'cannot be packed; set --weight_bits=32 to export them unchanged')
    trained = config.model.sections['bitnet'].weight_bits if config.model.einsum == 'bitnet' else None
    if weight_bits and trained not in (None, weight_bits):
      raise ConfigError(f'--weight_bits: {weight_bits}, but the run was trained with {trained}; leave it out')
    model = packed_model(config.model, weight_bits or trained or '1.58')
    return Exported(model, pack_params(params, info, model.sections['packed'].weight_bits))

  @staticmethod
  def restore(config: Any, params: Params, like: Params, info: Params) -> dict[str, Any]:
    """The matrices of an exported model, in the shapes of `like`."""
    return unpacked(params, like, info, getattr(config.model, 'einsum', '') == 'bitnet')


register(EXPORTERS, 'packed', Packed, NoSettings)
