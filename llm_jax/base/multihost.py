"""Communication between processes: gather values, wait for each other, print once."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llm_jax.base.errors import StorageError
from llm_jax.base.storage import own_parts

T = TypeVar('T')


def gather(value: Any) -> list:
  """The JSON values of all processes, in the order of their indices."""
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
  texts = multihost_utils.process_allgather(np.pad(text, (0, longest - len(text)), constant_values=ord(' ')))
  return [json.loads(bytes(row)) for row in texts.reshape(-1, longest)]


def barrier(name: str) -> None:
  """Waits for all processes, up to a day; uses the coordinator, as a collective may time out after 30 seconds."""
  if jax.process_count() == 1:
    return
  from orbax.checkpoint import multihost
  multihost.get_barrier_sync_fn()(key=name, timeout_ms=24 * 60 * 60 * 1000)


def is_first() -> bool:
  """Whether this is process 0, which writes files."""
  return jax.process_index() == 0


_TURNS = itertools.count()  # as each barrier needs a name of its own


def in_turn(make: Callable[[], T]) -> T:
  """make() on process 0, and then on the others, for which process 0 may have prepared files."""
  made = []
  try:
    if jax.process_index() == 0:
      made.append(make())
  finally:  # also after an error, so that the others meet the same error instead of waiting
    barrier(f'in_turn_{next(_TURNS)}')
  return made[0] if made else make()


def from_first(value: Any) -> Any:
  """The JSON value of process 0, on all processes."""
  return value if jax.process_count() == 1 else gather(value if jax.process_index() == 0 else None)[0]


def all_see(folder: Path) -> bool:
  """Whether all processes see the same folder, which process 0 creates. All call this together. Raises StorageError."""
  if jax.process_count() == 1:
    return True
  name, problem = f'.seen-{uuid.uuid4().hex}', ''
  if jax.process_index() == 0:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      (folder / name).touch()
    except OSError as e:
      problem = f'{folder} cannot be written: {e.strerror or e}'
  name, problem = from_first([name, problem])
  if problem:
    raise StorageError(problem)
  found = all(gather((folder / name).exists()))
  if jax.process_index() == 0:
    (folder / name).unlink(missing_ok=True)
  return found


def writes_files(folder: Path) -> bool:
  """Whether this process writes the files of a run's folder: process 0, or each one in a folder of its own."""
  return jax.process_index() == 0 or own_parts(folder) is not None


def on_host(x: Any) -> np.ndarray:
  """A whole array on each process; all processes call it together. A stack of matrices is gathered one by one."""
  if getattr(x, 'is_fully_addressable', True):
    return np.asarray(x)
  if not x.is_fully_replicated and x.ndim > 2:
    whole = np.empty(x.shape, x.dtype)
    for i in range(len(x)):
      whole[i] = on_host(x[i])
    return whole
  with jax.disable_jit(False):
    replicated = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
  return np.asarray(replicated.addressable_data(0))


def say(text: str) -> None:
  """Prints on process 0."""
  if jax.process_index() == 0:
    print(text, flush=True)
