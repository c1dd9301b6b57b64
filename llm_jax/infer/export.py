"""Exported models: a folder with config.json, the tokenizer and model.safetensors."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from safetensors import SafetensorError, safe_open

from llm_jax.base.batch import Params
from llm_jax.base.builder import to_dict
from llm_jax.base.errors import StorageError
from llm_jax.base.files import check_no_link, write_file, writing
from llm_jax.base.multihost import on_host
from llm_jax.base.redaction import public
from llm_jax.base.registry import NoSettings, Registry, register
from llm_jax.base.trees import by_name, path_of
from llm_jax.infer.tensor_file import CODES, write_tensors

FILE = 'model.safetensors'


class Exported(NamedTuple):
  model: Any  # the config section of a model with these arrays
  arrays: dict[str, Any]  # by path: 'blocks/attn/q/w'; they may be sharded


class Plain:
  """The exporter `plain`: writes all parameters unchanged."""

  @staticmethod
  def export(config: Any, params: Params, info: Params, weight_bits: str | None) -> Exported:
    return Exported(config.model, by_name(params))

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


def write_params(path: Path, arrays: dict[str, Any], meta: dict) -> None:
  """Writes arrays, which process 0 gathers one by one, and `meta` as safetensors; all processes call it together.

  Raises StorageError.
  """
  entries = [(name, jax.ShapeDtypeStruct(x.shape, x.dtype), partial(on_host, x)) for name, x in arrays.items()]
  with writing('--out'), open(check_no_link(path), 'wb') if jax.process_index() == 0 else contextlib.nullcontext() as f:
    write_tensors(f, entries, {'meta': json.dumps(meta)})


def read_params(path: Path, abstract: Params) -> tuple[Params, dict]:
  """(parameters with the shardings of `abstract`, meta). Raises StorageError if the file does not fit `abstract`."""
  try:
    with safe_open(path, 'numpy') as f:
      def read(place: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tensor = f.get_slice(path_of(place))
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if (shape, dtype) != (leaf.shape, CODES[leaf.dtype]):
          raise StorageError(f'{path}: {path_of(place)} is {dtype} {shape}, but the config needs {CODES[leaf.dtype]} '
                             f'{leaf.shape}')
        return jax.make_array_from_callback(shape, leaf.sharding, lambda index: tensor[index])  # reads the shard alone

      return jax.tree_util.tree_map_with_path(read, abstract), json.loads((f.metadata() or {})['meta'])
  except (OSError, SafetensorError, KeyError, ValueError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
