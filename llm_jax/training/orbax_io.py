"""Reads and writes the arrays of a checkpoint by Orbax, with this package's settings.

checkpoint.py imports this module when it first reads or writes a checkpoint, as importing Orbax takes half a second.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llm_jax.base.errors import ConfigError
from llm_jax.base.trees import leaf_name

# checkpoint.py reports what fails; Orbax would add tracebacks, and warnings about things that are intended here.
logging.getLogger('absl').addFilter(lambda record: 'orbax' not in record.pathname)
logging.getLogger('asyncio').addFilter(lambda record: 'never retrieved' not in record.getMessage())


def _report_unraisable(report: Callable[[Any], Any], unraisable: Any) -> None:
  """A hook that leaves out what TensorStore's threads meet after a save has failed, when nobody waits for them."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    report(unraisable)


sys.unraisablehook = partial(_report_unraisable, sys.unraisablehook)


def make_writer() -> ocp.AsyncCheckpointer:
  # Orbax splits each array over the devices that hold copies of it, with one program per shape and device; compiling
  # them blocks training during the first save. That is worth it only for large slices.
  ocp.type_handlers.register_type_handler(
      jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 26), override=True)
  # Compression makes weights only 8% smaller and doubles the work of a save, for which training on a CPU waits.
  return ocp.AsyncCheckpointer(_handler(partial(ocp.PyTreeCheckpointHandler, use_compression=False)))


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
  metadata = ocp.PyTreeCheckpointHandler().metadata((folder / item).absolute())
  return arrays_of(getattr(metadata, 'tree', metadata))


def read_stored(folder: Path, item: str) -> Any:
  """The arrays of an item as they are stored, in the host's memory."""
  handler, path = ocp.PyTreeCheckpointHandler(), (folder / item).absolute()
  metadata = handler.metadata(path)
  arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), getattr(metadata, 'tree', metadata))
  return ocp.Checkpointer(handler).restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))


def arrays_of(tree: Any) -> dict[str, str]:
  return {leaf_name(path): f'{jax.numpy.dtype(leaf.dtype).name} {list(leaf.shape)}'
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _handler(of_arrays: Any) -> ocp.CompositeCheckpointHandler:
  return ocp.CompositeCheckpointHandler(params=of_arrays(), opt_state=of_arrays(), meta=ocp.JsonCheckpointHandler())


def _reader() -> ocp.Checkpointer:
  """A reader without Orbax's barriers: if only one process fails, they would match its next attempt with this one of
  others."""
  process = jax.process_index()
  return ocp.Checkpointer(_handler(ocp.StandardCheckpointHandler), multiprocessing_options=(
      ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})))
