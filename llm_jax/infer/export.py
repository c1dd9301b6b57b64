"""Exported models: a folder with config.json, the tokenizer and model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm_jax.base.batch import Params
from llm_jax.base.builder import to_dict
from llm_jax.base.errors import StorageError
from llm_jax.base.files import write_file, writing
from llm_jax.base.redaction import public
from llm_jax.base.registry import NoSettings, Registry, register
from llm_jax.base.trees import by_name, path_of

FILE = 'model.safetensors'


class Exported(NamedTuple):
  model: Any  # the config section of a model with these arrays
  arrays: dict[str, np.ndarray]  # by path: 'blocks/attn/q/w'


class Plain:
  """The exporter `plain`: writes all parameters unchanged."""

  @staticmethod
  def export(config: Any, params: Params, info: Params, weight_bits: str | None) -> Exported:
    return Exported(config.model, {name: np.asarray(x) for name, x in by_name(params).items()})

  @staticmethod
  def restore(config: Any, params: Params, like: Params, info: Params) -> dict[str, Any]:
    return by_name(params)


# Classes with `export(config, params, info, weight_bits) -> Exported` and `restore(config, params, like, info)`, which
# returns the arrays by path for a model with the parameters `like`.
EXPORTERS = Registry('exporter')
register(EXPORTERS, 'plain', Plain, NoSettings)


# Folders that other programs read: classes with `write(run, args) -> lines to print`, for the flags `args` of the
# command export. They write args.out, whole or not at all.
FOLDER_FORMATS = Registry('export_format')


def write_config(folder: Path, config: Any, tokenizer: Any, encoder_tokenizer: Any,
                 flag: str = '--workdir') -> tuple[str, ...]:
  """Writes config.json and the tokenizers of a run or an exported model; returns their names. Raises StorageError."""
  files = {'config.json': json.dumps(public(to_dict(config)), indent=2)}
  for name, each in (('tokenizer', tokenizer), ('encoder_tokenizer', encoder_tokenizer)):
    if each is not None:
      files[f'{name}.json'] = each.to_json()
  files |= getattr(tokenizer, 'files', {})  # the chat template
  with writing(f'{flag}: {folder}'):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      write_file(folder / name, content)
  return tuple(files)


def write_params(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
  """Writes arrays and `meta` as safetensors. Raises StorageError."""
  umask = os.umask(0)
  os.umask(umask)
  try:
    save_file(arrays, path, metadata={'meta': json.dumps(meta)})
    path.chmod(0o666 & ~umask)  # as other files; save_file leaves it to its owner alone
  except (OSError, SafetensorError) as e:
    raise StorageError(f'--out: {path} cannot be written: {e}') from None


def read_params(path: Path, abstract: Params) -> tuple[Params, dict]:
  """(parameters with the shardings of `abstract`, meta). Raises StorageError if the file does not fit `abstract`."""
  try:
    with safe_open(path, 'numpy') as f:
      def read(place: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = f.get_tensor(path_of(place))
        if (x.shape, x.dtype) != (leaf.shape, leaf.dtype):
          raise StorageError(f'{path}: {path_of(place)} is {x.dtype} {x.shape}, but the config needs {leaf.dtype} '
                             f'{leaf.shape}')
        return jax.device_put(x, leaf.sharding)

      return jax.tree_util.tree_map_with_path(read, abstract), json.loads((f.metadata() or {})['meta'])
  except (OSError, SafetensorError, KeyError, ValueError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
