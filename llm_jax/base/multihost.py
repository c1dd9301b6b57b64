"""Communication between processes: gather values, wait for each other, print once."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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


def say(text: str) -> None:
  """Prints on process 0."""
  if jax.process_index() == 0:
    print(text, flush=True)
