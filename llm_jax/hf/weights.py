"""Weights of published models: sharded safetensors, read tensor by tensor to the mesh, and written."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from llm_jax.base.batch import Params
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import write_file
from llm_jax.base.multihost import on_host
from llm_jax.base.trees import by_name
from llm_jax.hf.rules import Rule, check_complete, tensor_names
from llm_jax.infer.tensor_file import Entry, write_tensors

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = {'float32': np.dtype(np.float32), 'float16': np.dtype(np.float16), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
_READABLE = {'F64', 'F32', 'F16', 'BF16'}
# Tensors that are computed and not learned, in files of older versions.
_COMPUTED = ('.attn.bias', '.attn.masked_bias', 'rotary_emb.inv_freq')


class Tensors:
  """The tensors in a folder, by name. Raises StorageError for what is missing or damaged."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.files = _files(folder)
    self._open = functools.lru_cache(maxsize=2)(lambda path: safe_open(path, 'numpy'))

  def read(self, name: str, shape: tuple[int, ...], is_bytes: bool = False) -> np.ndarray:
    """One tensor as float32, or as uint8."""
    path = self.files[name]
    try:
      f = self._open(path)
      piece = f.get_slice(name)
      readable = {'U8'} if is_bytes else _READABLE
      if piece.get_dtype() not in readable:
        raise ConfigError(f'{path}: {name} is {piece.get_dtype()}; only {", ".join(sorted(readable))} can be read'
                          + ('' if is_bytes else ': use the model in bfloat16'))
      if tuple(piece.get_shape()) != shape:
        raise StorageError(f'{path}: {name} is {tuple(piece.get_shape())}, but by config.json it must be {shape}')
      return f.get_tensor(name).astype(np.uint8 if is_bytes else np.float32)
    except (OSError, SafetensorError, KeyError, ValueError) as e:
      raise StorageError(f'{path}: damaged: {e}') from None


def _files(folder: Path) -> dict[str, Path]:
  """The file of each tensor."""
  try:
    if (folder / INDEX).is_file() and not (folder / WHOLE).is_file():
      names = json.loads((folder / INDEX).read_text())['weight_map']
      missing = sorted({str(file) for file in names.values() if not _inside(folder, file)})
      if missing:
        raise StorageError(f'{folder}: {INDEX} names {", ".join(missing[:5])}, which are missing; copy the model again')
      return {name: folder / file for name, file in names.items()}
    paths = [folder / WHOLE] if (folder / WHOLE).is_file() else sorted(folder.glob('*.safetensors'))
    found = dict[str, Path]()
    for path in paths:
      with safe_open(path, 'numpy') as f:
        found |= dict.fromkeys(f.keys(), path)
  except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
    raise StorageError(f'{folder}: the weights are damaged: {e}') from None
  if not found:
    pickled = sorted(path.name for path in folder.glob('*') if path.suffix in ('.bin', '.pt', '.pth', '.ckpt'))
    if pickled:
      raise StorageError(f'{folder}: the weights are pickles ({", ".join(pickled[:3])}), which can run code when they '
                         'are opened and are not read; take a revision with *.safetensors, or convert them where you '
                         "trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)")
    raise StorageError(f'{folder}: has no *.safetensors')
  return found


def _inside(folder: Path, file: Any) -> bool:
  return isinstance(file, str) and Path(file).name == file and (folder / file).is_file()


def check_tensors(tensors: Tensors, rules: Sequence[Rule], num_layers: int, prefix: str) -> dict[str, str]:
  """{name of a rule's tensor: name in the files}. Raises StorageError for missing and unknown tensors."""
  wanted = [name for name, _, _ in tensor_names(rules, num_layers)]
  bare = not any(name.startswith(prefix) for name in tensors.files)  # saved from a model without a head
  found = {name: name.removeprefix(prefix) if bare else name for name in wanted}
  missing = sorted(set(found.values()) - tensors.files.keys())
  computed = {name for name in tensors.files if name.endswith(_COMPUTED)}
  unknown = sorted(tensors.files.keys() - set(found.values()) - computed - {'lm_head.weight'})
  for what, names in (('lacks', missing), ('also has', unknown)):
    if names:
      raise StorageError(f'{tensors.folder}: by config.json the model {what} {len(names)} tensor(s): '
                         f'{", ".join(names[:5])}{", ..." if len(names) > 5 else ""}')
  return found


def check_tied(tensors: Tensors, cfg: Any, names: dict[str, str]) -> None:
  """Raises StorageError for a readout that is stored beside the embedding it is said to equal, and differs."""
  if not cfg.tie_embeddings or 'lm_head.weight' not in tensors.files:
    return
  embed = next(name for rule, name in names.items() if rule.endswith(('embed_tokens.weight', 'wte.weight')))
  shape = (cfg.vocab_size, cfg.embed_dim)
  if not np.array_equal(tensors.read('lm_head.weight', shape), tensors.read(embed, shape)):
    raise StorageError(f'{tensors.folder}: lm_head.weight differs from {embed}, but config.json has '
                       'tie_word_embeddings; set that to false there')


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def read_weights(tensors: Tensors, rules: Sequence[Rule], names: dict[str, str], abstract: Params, num_layers: int,
                 vocab_size: int, progress: Callable[[], None] = lambda: None) -> dict[str, jax.Array]:
  """The parameters by path, with the shardings of `abstract`. The host holds one tensor at a time."""
  leaves = by_name(abstract)
  check_complete(rules, list(leaves))
  stacked = {path for rule in rules if rule.stacked for path in rule.paths}
  sizes = {path: leaf.shape[1:] if path in stacked else leaf.shape for path, leaf in leaves.items()}
  arrays: dict[str, jax.Array] = {path: jax.jit(lambda leaf=leaf: jnp.zeros(leaf.shape, leaf.dtype),
                                                out_shardings=leaf.sharding)()
                                  for path, leaf in leaves.items() if path in stacked}
  for name, rule, layer in tensor_names(rules, num_layers):
    tensor = tensors.read(names[name], rule.shape(sizes, vocab_size), rule.is_bytes)
    for path, x in rule.read(tensor, sizes, vocab_size):
      sharding = leaves[path].sharding
      if rule.stacked:
        own = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
        arrays[path] = _put(arrays[path], _placed(x, own), np.int32(layer))
      else:
        arrays[path] = _placed(x, sharding)
    progress()
  return arrays


def _placed(x: np.ndarray, sharding: Any) -> jax.Array:
  return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index], order='C'))


def tensors_of(params: dict[str, Any], rules: Sequence[Rule], num_layers: int, vocab_size: int,
               dtype: str) -> Iterator[Entry]:
  """All parameters; all processes must call the functions in turn. Bytes stay bytes in any `dtype`."""
  check_complete(rules, list(params))
  stacked = {path for rule in rules if rule.stacked for path in rule.paths}
  sizes = {path: x.shape[1:] if path in stacked else x.shape for path, x in params.items()}

  def kind(rule: Rule) -> np.dtype:
    return np.dtype(np.uint8) if rule.is_bytes else DTYPES[dtype]

  def tensor(rule: Rule, layer: int) -> np.ndarray:
    parts = [on_host(params[path] if layer < 0 else params[path][layer]) for path in rule.paths]
    return rule.write(parts, vocab_size).astype(kind(rule), order='C')  # a file has the memory of an array

  for name, rule, layer in tensor_names(rules, num_layers):
    spec = jax.ShapeDtypeStruct(rule.shape(sizes, vocab_size), kind(rule))
    yield name, spec, functools.partial(tensor, rule, layer)


def write_weights(folder: Path, tensors: Iterable[Entry], max_bytes: int, *, writes: bool = True) -> int:
  """Writes safetensors of at most `max_bytes`, if one tensor is not larger, and their index; returns all bytes.

  The host holds one tensor at a time. `writes` False only takes part in gathering them. Raises OSError.
  """
  size = total = 0
  shards: list[list[Any]] = [[]]
  for entry in tensors:
    own = math.prod(entry[1].shape) * entry[1].dtype.itemsize
    if size + own > max_bytes and shards[-1]:
      shards.append([])
      size = 0
    shards[-1].append(entry)
    size, total = size + own, total + own
  names = [WHOLE] if len(shards) == 1 else [
      f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  for name, shard in zip(names, shards, strict=True):
    with open(folder / name, 'xb') if writes else contextlib.nullcontext() as f:
      write_tensors(f, shard, {'format': 'pt'})
  if writes and len(names) > 1:
    where = {key: name for name, shard in zip(names, shards, strict=True) for key, _, _ in shard}
    write_file(folder / INDEX, json.dumps({'metadata': {'total_size': total}, 'weight_map': where}, indent=2) + '\n')
  return total
