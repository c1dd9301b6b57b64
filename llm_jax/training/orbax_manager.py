"""Orbax's manager of a folder of checkpoints, with this package's settings.

checkpoint.py imports this module when it first reads or writes a checkpoint, as importing Orbax takes half a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from llm_jax.config import CheckpointConfig

# Orbax warns about things that are intended here, such as a save without metrics.
logging.getLogger('absl').addFilter(lambda record: record.levelno >= logging.ERROR or 'orbax' not in record.pathname)


class Manager(ocp.CheckpointManager):

  def reached_preemption(self, step: int) -> bool:
    """Always False: StopSignal handles preemption, and asking JAX here would disturb its count of steps."""
    return False


def keeping_manager(directory: Path, config: CheckpointConfig, *, read_only: bool) -> Manager:
  """A manager that keeps what the config says."""
  kept = [policies.LatestN(config.keep_last),
          policies.BestN(get_metric_fn=_score, reverse=True, n=config.keep_best,
                         keep_checkpoints_without_metrics=False)]
  if config.keep_every:
    kept.append(policies.EveryNSteps(config.keep_every))
  # Orbax splits each array over the devices that hold copies of it, with one program per shape and device; compiling
  # them blocks training during the first save. That is worth it only for large slices.
  ocp.type_handlers.register_type_handler(
      jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 26), override=True)
  # Compression makes weights only 8% smaller and doubles the work of a save, for which training on a CPU waits.
  return _manager(
      directory, partial(ocp.PyTreeCheckpointHandler, use_compression=False),
      best_fn=_score, best_mode='min',  # else Orbax drops the metrics
      preservation_policy=policies.AnyPreservationPolicy(kept), read_only=read_only, create=not read_only,
      cleanup_tmp_directories=not read_only)


def reading_manager(directory: Path) -> Manager:
  """A manager without Orbax's barriers: if only one process fails, they would match its next attempt with this one of
  others."""
  process = jax.process_index()
  options = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
  return _manager(directory, ocp.StandardCheckpointHandler, read_only=True, create=False,
                  multiprocessing_options=options)


def _manager(directory: Path, of_arrays: Callable[[], Any], **options: Any) -> Manager:
  return Manager(
      directory.absolute(), item_names=('params', 'opt_state', 'meta'),
      item_handlers={'params': of_arrays(), 'opt_state': of_arrays(), 'meta': ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(**options))


def _score(metrics: dict[str, float]) -> Any:
  """The sort key of checkpoints: the best one has the lowest."""
  score = metrics['score']
  return -metrics.get('since', 0), score
