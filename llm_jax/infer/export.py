"""Exported models: a folder with config.json, the tokenizer and model.safetensors, matrices packed at two bits.

The matrices of a stack of L layers (and E experts) are NAME/packed uint8 [L, E, inputs / 4, outputs] and NAME/scale
float32 [L, E]; all else is as it was trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_jax.base.batch import Params
from llm_jax.base.errors import StorageError
from llm_jax.layers.bitnet import BitNet, pack, unpack, weight_codes
from llm_jax.optim.masks import Dims, as_matrices, from_matrices, matrix_dims, path_of, stack_shape

FILE = 'model.safetensors'


def packed_model(cfg: Any, weight_bits: str) -> Any:
  """The config of the model that computes from packed matrices. A full-precision one has had no norms before them."""
  bitnet = cfg.bitnet if cfg.einsum == 'bitnet' else BitNet(weight_bits=weight_bits)  # type: ignore
  return dataclasses.replace(cfg, einsum='packed', bitnet=bitnet)


def by_name(params: Params) -> dict[str, Any]:
  """{'blocks/attn/q/w': ...}."""
  return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def pack_params(params: Params, info: Params, weight_bits: str) -> dict[str, np.ndarray]:
  """{'blocks/attn/q/packed': ..., 'embed/w': ...} of trained parameters."""
  paths = jax.tree_util.tree_leaves_with_path(matrix_dims(info), is_leaf=lambda x: isinstance(x, Dims))
  dims = {path_of(path): d for path, d in paths}

  def packed(m_IO: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes_IO, scale = weight_codes(m_IO, weight_bits)
    return pack(codes_IO), scale

  arrays = {}
  for name, leaf in by_name(params).items():
    if name not in dims:
      arrays[name] = np.asarray(leaf)
      continue
    stack = stack_shape(leaf, dims[name])
    for part, x in zip(('packed', 'scale'), jax.jit(jax.vmap(packed))(as_matrices(leaf, dims[name])), strict=True):
      arrays[f'{name.removesuffix("w")}{part}'] = np.asarray(x.reshape(*stack, *x.shape[1:]))
  return arrays


def unpacked(params: Params, like: Params, info: Params, trained_on: bool) -> dict[str, Any]:
  """{'blocks/attn/q/w': ...} of an exported model's parameters, as those of `like` lie; others are as they were.

  `trained_on` as BitNet a matrix has the mean of |w| that it was packed with, else the values that it computes with.
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


def write_params(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
  """Raises StorageError."""
  try:
    save_file(arrays, path, metadata={'meta': json.dumps(meta)})
  except (OSError, SafetensorError) as e:
    raise StorageError(f'--out: {path} cannot be written: {e}') from None


def read_params(path: Path, abstract: Params) -> tuple[Params, dict]:
  """(parameters that lie as those of `abstract` say, meta). Raises StorageError for a file that does not have them."""
  try:
    with safe_open(path, 'numpy') as f:
      def read(place: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = f.get_tensor(path_of(place))
        if (x.shape, x.dtype) != (leaf.shape, leaf.dtype):
          raise StorageError(f'{path}: {place} is {x.dtype} {x.shape}, and the config asks for {leaf.shape}')
        return jax.device_put(x, leaf.sharding)

      return jax.tree_util.tree_map_with_path(read, abstract), json.loads((f.metadata() or {})['meta'])
  except (OSError, SafetensorError, KeyError, ValueError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
