"""Finds how many rows of a batch fit in a device's memory at a time, by compiling instead of by running out of it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.multihost import gather, say
from llm_jax.base.process import gib
from llm_jax.base.target import current_target
from llm_jax.config import Config

SHARE = 0.9  # of a device's memory; the rest is for evaluation, samples and fragmentation


def needed(compiled: Any) -> int:
  """Bytes that one call of a compiled program needs on one device, including arguments and results."""
  stats = compiled.memory_analysis()
  return (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
          + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)


def most_rows(num_rows: int, bytes_needed: Callable[[int], int], limit: int, likely: int = 0) -> int:
  """The largest divisor of `num_rows` whose bytes_needed(divisor), an increasing function, is within `limit`.

  `likely` is returned if it fits; otherwise a binary search. Raises ConfigError if not even one row fits.
  """
  @functools.cache
  def fits(rows: int) -> bool:
    try:
      size = bytes_needed(rows)
    except jax.errors.JaxRuntimeError as e:  # some compilers fail if a program cannot fit
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      size = 2 * limit
    verdict = 'fits' if size <= limit else 'does not fit'
    say(f'tokens_per_device: {rows} row(s) at a time need {gib(size)} of {gib(limit)}: {verdict}')
    return size <= limit

  divisors = [n for n in range(1, num_rows + 1) if num_rows % n == 0]
  for candidate in dict.fromkeys((likely, num_rows)):  # most often one of these is the answer, after one trial
    if candidate in divisors and fits(candidate):
      return candidate
  low, high = 0, len(divisors) - 1  # divisors[low - 1] fits, divisors[high] does not
  while low < high:
    middle = (low + high) // 2
    low, high = (middle + 1, high) if fits(divisors[middle]) else (low, middle)
  if low == 0:
    raise ConfigError(f'config.tokens_per_device: not even one row fits in the {gib(limit)} of a device; set '
                      '--config.model.remat=full, use a shorter data.seq_len or a smaller model, or shard the model '
                      'over more devices (--config.mesh.fsdp)')
  return divisors[low - 1]


def tokens_before(workdir: Path) -> int:
  """The tokens_per_device that a run was trained with; 0 for a new one. Raises StorageError."""
  path = workdir / 'config.json'
  try:
    return int(json.loads(path.read_text())['tokens_per_device'] or 0) if path.exists() else 0
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise StorageError(f'{path}: damaged: {e}; delete it (training writes it again), or set '
                       'config.tokens_per_device') from None


def fit_memory(config: Config, num_shards: int, workdir: Path, compile_step: Callable[[int], Any]) -> Config:
  """Replaces tokens_per_device None by the largest number for which compile_step(num_microbatches) fits.

  A resumed run keeps its number if that fits. Raises ConfigError if nothing fits.
  """
  if config.tokens_per_device is not None:
    return config
  target = current_target()
  memory = target.memory
  if memory is None:
    raise ConfigError('config.tokens_per_device: None needs the size of the device memory, which '
                      f'{target.kind} does not report; set a number')
  limit, before = min(gather([int(SHARE * memory), tokens_before(workdir)]))  # one answer for all processes
  num_rows, _ = config.split_batch(num_shards)
  rows = most_rows(num_rows, lambda rows: needed(compile_step(num_rows // rows)), limit,
                   likely=before // config.row_part)
  return dataclasses.replace(config, tokens_per_device=rows * config.row_part)
