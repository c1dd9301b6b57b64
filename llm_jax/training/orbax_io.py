"""Reads and writes the arrays of a checkpoint by Orbax, with this package's settings.

checkpoint.py imports this module when it first reads or writes a checkpoint, as importing Orbax takes half a second.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llm_jax.base.errors import ConfigError
from llm_jax.base.trees import leaf_name

ITEMS = 'params', 'opt_state'  # of arrays
ARRAY = '.zarray'  # beside the parts of an array that is stored in files of its own

# checkpoint.py reports what fails; Orbax would add tracebacks, and warnings about things that are intended here.
logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
logging.getLogger('asyncio').addFilter(lambda record: 'never retrieved' not in record.getMessage())


def _report_unraisable(report: Callable[[Any], Any], unraisable: Any) -> None:
  """A hook that leaves out what TensorStore's threads meet after a save has failed, when nobody waits for them."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    report(unraisable)


sys.unraisablehook = partial(_report_unraisable, sys.unraisablehook)


def make_writer(in_parts: bool = False) -> ocp.AsyncCheckpointer:
  """A writer of checkpoints. `in_parts`: each process writes its shards to a folder of its own, as single files, so
  that all folders together are a checkpoint; the processes do not wait for each other."""
  process = jax.process_index()
  options = _alone() if in_parts else ocp.options.MultiprocessingOptions()
  # Orbax splits each array over the devices that hold copies of it, with one program per shape and device; compiling
  # them blocks training during the first save. That is worth it only for large slices.
  ocp.type_handlers.register_type_handler(jax.Array, ocp.type_handlers.ArrayHandler(
      primary_host=process if in_parts else 0, min_slice_bytes_for_replica_parallel=1 << 26), override=True)
  # Compression makes weights only 8% smaller and doubles the work of a save, for which training on a CPU waits.
  handler = _handler(partial(ocp.PyTreeCheckpointHandler, use_ocdbt=not in_parts, use_compression=False), options)
  return ocp.AsyncCheckpointer(handler, multiprocessing_options=options, async_options=_folders_first(options))


def write(writer: ocp.AsyncCheckpointer, folder: Path, params: Any, opt_state: Any, meta: dict) -> None:
  """Starts to write a folder, in place of what is there, and returns once the arrays are copied."""
  writer.save(folder.absolute(), force=True, args=ocp.args.Composite(
      params=ocp.args.PyTreeSave(params), opt_state=ocp.args.PyTreeSave(opt_state), meta=ocp.args.JsonSave(meta)))


def read_meta(folder: Path) -> dict[str, Any]:
  return _reader().restore(folder.absolute(), args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def read_arrays(folder: Path, trees: dict[str, Any]) -> dict[str, Any]:
  """The trees by item, 'params' and 'opt_state', from trees of ShapeDtypeStruct with shardings.

  Nothing is cast, left out or added: raises ConfigError with the paths of the arrays that differ from `trees`.
  """
  check_arrays(folder, trees)
  restored = _reader().restore(folder.absolute(), args=ocp.args.Composite(
      **{item: ocp.args.StandardRestore(tree) for item, tree in trees.items()}))
  return {item: restored[item] for item in trees}


def check_arrays(folder: Path, trees: dict[str, Any]) -> None:
  """Raises ConfigError if the arrays of a checkpoint have other paths, shapes or dtypes than those of `trees`."""
  problems = []
  for item, tree in trees.items():
    stored, wanted = stored_arrays(folder, item), arrays_of(tree)
    names = {name: f'{item}/{name}' for name in [*stored, *wanted]}
    problems += [f'{names[name]}: stored {stored[name]}, wanted {wanted[name]}' for name in stored
                 if name in wanted and stored[name] != wanted[name]]
    problems += [f'{names[name]}: missing; wanted {wanted[name]}' for name in wanted if name not in stored]
    problems += [f'{names[name]}: stored {stored[name]}, but there is no such array now' for name in stored
                 if name not in wanted]
  if problems:
    more = f'\n  and {len(problems) - 20} more' if len(problems) > 20 else ''
    raise ConfigError(f'{folder}: the checkpoint has other arrays than the config makes; set the model and optimizer '
                      'that it was saved with:\n  ' + '\n  '.join(problems[:20]) + more)


def stored_arrays(folder: Path, item: str) -> dict[str, str]:
  """{'blocks/attn/q/w': 'float32 [16, 8]'} of an item of a checkpoint."""
  return arrays_of(_metadata(folder / item))


def _metadata(folder: Path) -> Any:
  """The tree of an item with the metadata of its arrays."""
  found = ocp.PyTreeCheckpointHandler().metadata(folder.absolute())
  return getattr(found, 'tree', found)


def is_shard(name: str, names: Collection[str]) -> bool:
  """Whether a file of a checkpoint, one of `names`, has a part of an array that is stored in files of its own."""
  folder, _, last = name.rpartition('/')
  return last != ARRAY and f'{folder}/{ARRAY}' in names


def shards_here(folder: Path, trees: dict[str, Any]) -> set[str]:
  """The names that files have with what this process's devices have of the trees, where each shard has its own.

  Reads the metadata in the folder. Raises ConfigError as `read_arrays`.
  """
  check_arrays(folder, trees)
  found = set()
  for item, tree in trees.items():
    stored = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(_metadata(folder / item))}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      info = stored[leaf_name(path)]
      sizes = info.storage.chunk_shape if info.storage else leaf.shape
      for slices in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        bounds = [s.indices(dim) for s, dim in zip(slices, leaf.shape, strict=True)]
        numbers = (range(begin // size, -(-end // size)) for (begin, end, _), size in zip(bounds, sizes, strict=True))
        found |= {f'{item}/{info.name}/{".".join(map(str, each)) or 0}' for each in itertools.product(*numbers)}
  return found


def read_stored(folder: Path, item: str) -> Any:
  """The arrays of an item as they are stored, in the host's memory."""
  arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(folder / item))
  return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
      (folder / item).absolute(), args=ocp.args.PyTreeRestore(restore_args=arguments))


def arrays_of(tree: Any) -> dict[str, str]:
  return {leaf_name(path): f'{jax.numpy.dtype(leaf.dtype).name} {list(leaf.shape)}'
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _handler(of_arrays: Any, options: ocp.options.MultiprocessingOptions) -> ocp.CompositeCheckpointHandler:
  return ocp.CompositeCheckpointHandler(
      params=of_arrays(multiprocessing_options=options), opt_state=of_arrays(multiprocessing_options=options),
      meta=ocp.JsonCheckpointHandler(multiprocessing_options=options),
      composite_options=ocp.CompositeOptions(multiprocessing_options=options, async_options=_folders_first(options)))


def _folders_first(options: ocp.options.MultiprocessingOptions) -> ocp.AsyncOptions:
  """A process alone makes folders before it writes, as it would take the signal of another one that they are there."""
  return ocp.AsyncOptions(create_directories_asynchronously=options.active_processes is None)


def _alone() -> ocp.options.MultiprocessingOptions:
  """Of a process that does not wait for the others."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process},
                                            barrier_sync_key_prefix=f'process_{process}')


def _reader() -> ocp.Checkpointer:
  """A reader without Orbax's barriers: if only one process fails, they would match its next attempt with this one of
  others."""
  return ocp.Checkpointer(_handler(ocp.StandardCheckpointHandler, _alone()), multiprocessing_options=_alone())
