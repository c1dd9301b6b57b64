"""What surrounds a program: exit codes, the other processes of a run, a device out of memory."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator

from llm_jax.base.errors import ConfigError, Interrupted, UserError


@contextlib.contextmanager
def out_of_memory_as_config_error(tokens_per_device: int | None) -> Iterator[None]:
  """Turns an out-of-memory error of a device into a ConfigError."""
  import jax
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    raise ConfigError(f'out of device memory: set a lower --config.tokens_per_device (now {tokens_per_device}), set '
                      f'--config.model.remat=full, or shard over more devices (--config.mesh.fsdp)\n'
                      f'{str(e).splitlines()[0]}') from None


def start_processes() -> None:
  """Connects to the other processes; values that launch/local.py does not set are detected by JAX."""
  import jax

  from llm_jax.base.stopping import interrupt_all
  signal.signal(signal.SIGINT, interrupt_all)
  num_processes, process_id = (os.environ.get(name) for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'))
  # If one process dies or exits alone, the others end after this many seconds, instead of JAX's 100 and 300.
  jax.distributed.initialize(num_processes=int(num_processes) if num_processes else None,
                             process_id=int(process_id) if process_id else None,
                             heartbeat_timeout_seconds=30, shutdown_timeout_seconds=60)


def run_as_program(main: Callable[[list[str]], None]) -> None:
  """Runs main(argv); a UserError becomes one message and its exit code."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # file names may contain characters that stdout cannot encode
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a program without a traceback; training handles it itself
  try:
    main(sys.argv[1:])
  except BrokenPipeError:  # the reader has closed the pipe: ... | head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except UserError as e:
    print(e if isinstance(e, Interrupted) else f'error: {e}', file=sys.stderr, flush=True)
    sys.exit(e.exit_code)
