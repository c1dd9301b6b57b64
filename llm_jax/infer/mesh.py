"""The mesh on which a run is read back to evaluate, generate or export: of any devices and any number of hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import Mesh

from llm_jax.base.errors import ConfigError
from llm_jax.base.multihost import gather
from llm_jax.base.sharding import MESH_AXES, MeshConfig, describe_mesh, make_mesh, use_mesh
from llm_jax.base.target import current_target
from llm_jax.data.pipeline import example_batch
from llm_jax.infer.load import Loaded, Opened, model_of, open_run, read_run
from llm_jax.training.shardings import abstract_params, boxed_params, shard_bytes

SHARE = 0.5  # of a device's memory that weights may take: generation holds them twice, and activations need room


@contextlib.contextmanager
def on_mesh(run: Opened, text: str = '', module: Any = None) -> Iterator[Mesh]:
  """The mesh of --mesh, or of `choose_mesh`, in use with the run's rules; several devices are named on stderr.

  Raises ConfigError if it does not fit the devices.
  """
  config, why = (parse_mesh(text), '--mesh') if text else choose_mesh(run, module)
  try:
    mesh = make_mesh(config)
    if mesh.size > 1 and jax.process_index() == 0:
      print(f'mesh: {describe_mesh(mesh)} ({why})', file=sys.stderr)
    with use_mesh(mesh, run.config.mesh):
      yield mesh
  except ConfigError as e:
    if not text:
      raise
    raise ConfigError(re.sub(r'config\.mesh(\.\w+)?:', f'--mesh={text}:', str(e))) from None


@contextlib.contextmanager
def loaded_on_mesh(workdir: Path, checkpoint: str, text: str = '', *, trust: bool = False,
                   module: Any = None) -> Iterator[Loaded]:
  """The run in `workdir` with its weights in shards, under their mesh. Raises UserErrors."""
  run = open_run(workdir, trust=trust)
  with on_mesh(run, text, module) as mesh:
    yield read_run(run, workdir, mesh, checkpoint, module=module)


def parse_mesh(text: str) -> MeshConfig:
  """'fsdp=4,tensor=2' as a MeshConfig; `data` takes the devices that are left. Raises ConfigError."""
  return parse_mesh_sizes(text, data=1 if '=-1' in text else -1)


def parse_mesh_sizes(text: str, data: int) -> MeshConfig:
  """'fsdp=4,tensor=2' as a MeshConfig, with this size of `data` if it is not named. Raises ConfigError."""
  sizes = {'data': data}
  for part in text.split(','):
    name, _, size = (word.strip() for word in part.partition('='))
    if name not in MESH_AXES or not size.removeprefix('-').isdecimal():
      raise ConfigError(f'--mesh: must be like fsdp=4,tensor=2, with axes of {", ".join(MESH_AXES)}; got {text!r}')
    sizes[name] = int(size)
  try:
    return MeshConfig(**cast(Any, sizes))
  except ValueError as e:
    raise ConfigError(f'--mesh: {e}') from None


def choose_mesh(run: Opened, module: Any = None) -> tuple[MeshConfig, str]:
  """(the mesh, why): the first of these that covers the devices and on which the weights fit.

  1. The run's own. 2. data=-1: whole weights on every device. 3. fsdp=-1: weights split over all devices.
  """
  own, whole = run.config.mesh, MeshConfig()
  if len(current_target().devices) == 1:
    return whole, 'one device'
  boxed, memory = boxed_params(example_batch(run.config.data), model=model_of(run, module)), least_memory()

  def fits(config: MeshConfig) -> bool:
    try:
      with use_mesh(mesh := make_mesh(config), run.config.mesh):
        size = shard_bytes(abstract_params(boxed, mesh))
    except ConfigError:
      return False
    return memory is None or size <= SHARE * memory

  for config, why in ((dataclasses.replace(own, rules=()), "the run's; --mesh sets another"),
                      (whole, 'whole weights on each device; --mesh sets another')):
    if fits(config):
      return config, why
  return MeshConfig(data=1, fsdp=-1), 'to make the weights fit; --mesh sets another'


def least_memory() -> int | None:
  """Bytes of the device with the least memory, of all processes; None: unknown."""
  memory = current_target().memory
  known = [memory] if jax.process_count() == 1 else gather(memory)
  return None if None in known else min(known)
