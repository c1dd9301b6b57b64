"""What surrounds a program: exit codes, the other processes of a run, a device out of memory."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from llm_jax.base.cluster import Cluster, alone_in_a_job, find_cluster
from llm_jax.base.errors import ConfigError, Interrupted, LostError, UserError
from llm_jax.base.redaction import print_traceback, public_command, redact
from llm_jax.base.stopping import after_joining, expect_others

JOIN_SECONDS = 300  # in which all processes of a run must have come


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
                      f'{with_binary_units(str(e).splitlines()[0])}') from None


def gib(size: float) -> str:
  """Bytes as '1.50 GiB', or '24 MiB' below half a GiB."""
  return f'{size / 2**30:.2f} GiB' if size >= 2**29 else f'{size / 2**20:.3g} MiB'


def with_binary_units(message: str) -> str:
  """A message of XLA with its numbers of bytes as GiB or MiB."""
  return re.sub(r'(\d{6,}) ?(?:bytes|B)\b', lambda found: gib(int(found[1])), message)


def start_processes(mode: str = 'on', ambient: bool = True) -> None:
  """Connects to the other processes, and says which: 'on': of the cluster that started this one; 'auto': if it has
  started several; 'off': never. Raises ConfigError.

  `ambient`: whether 'auto' counts what any program on this host sees: a command in a shell of a pod would come between
  the processes of the run there.
  """
  import jax
  if mode == 'off' or jax.distributed.is_initialized():
    return
  cluster = find_cluster()
  if mode == 'auto' and (cluster is None or cluster.num_processes == 1):
    if ambient and (warning := alone_in_a_job()):
      print(warning, file=sys.stderr, flush=True)
    return
  if mode == 'auto' and cluster is not None and cluster.ambient and not ambient:
    print(f'distributed: alone, although there are {cluster}; --distributed joins them', file=sys.stderr, flush=True)
    return
  expect_others()
  print(f'distributed: {cluster or "by what JAX finds"}', file=sys.stderr, flush=True)  # stdout is for results
  # JAX aborts at once where the coordinator dies. The handler delays that by 6 seconds (the number of SIGABRT), in
  # which the watchdog says what has happened and ends this process; no handler in Python would run.
  libc = ctypes.CDLL(None)
  libc.signal(ctypes.c_int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
  seconds = int(os.environ.get('LLM_JAX_JOIN_SECONDS') or JOIN_SECONDS)
  # The watchdog ends a run earlier than these timeouts; they are for the time before it starts.
  limits: dict[str, Any] = {'heartbeat_timeout_seconds': 60, 'shutdown_timeout_seconds': 60,
                            'initialization_timeout': seconds + 60}
  timer = threading.Timer(seconds, _end_waiting, [cluster, seconds])  # before JAX aborts
  timer.daemon = True
  timer.start()
  try:
    if cluster is None or cluster.by_jax:
      jax.distributed.initialize(**limits)
    else:
      jax.distributed.initialize(cluster.coordinator, cluster.num_processes, cluster.process, cluster.devices,
                                 cluster_detection_method='deactivate', **limits)
  except ValueError as e:
    raise ConfigError(f'--distributed: no cluster is found ({e}); use srun, a JobSet, mpirun, a TPU slice or '
                      'launch/local.py, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID') from None
  finally:
    timer.cancel()
  after_joining()


def _end_waiting(cluster: Cluster | None, seconds: int) -> None:
  print(f'error: not all processes have come within {seconds} s (LLM_JAX_JOIN_SECONDS): {cluster}', file=sys.stderr,
        flush=True)
  os._exit(LostError.exit_code)


def join_processes(mode: str) -> None:
  """Connects a command to its other processes; from here on only process 0 prints on stdout, and waits visibly."""
  import jax
  start_processes(mode, ambient=False)
  if jax.distributed.is_initialized() and jax.process_index():
    sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), 'w')
    SILENT.append(True)


SILENT: list[bool] = []  # not empty: `waiting` prints nothing


def waiting(what: str) -> None:
  """Prints what a command is about to wait for; on stderr, as stdout is for its result."""
  if not SILENT:
    print(f'{what} ...', file=sys.stderr, flush=True)


def run_as_program(main: Callable[[list[str]], None]) -> None:
  """Runs main(argv); a UserError becomes one message and its exit code."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # file names may contain characters that stdout cannot encode
  sys.excepthook = print_traceback
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a program without a traceback; training handles it itself
  public_command(sys.argv)  # remembers the secrets, which messages then lack
  try:
    main(sys.argv[1:])
  except BrokenPipeError:  # the reader has closed the pipe: ... | head
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except UserError as e:
    end(e)
  except ModuleNotFoundError as e:
    name = (e.name or '').partition('.')[0]
    importer = [frame.filename for frame in traceback.extract_tb(e.__traceback__) if frame.filename[:1] != '<'][-1]
    if name == 'llm_jax' or Path(__file__).parents[1] not in Path(importer).parents:  # not ours
      raise
    end(ConfigError(f'the package {name} is not installed for {sys.executable}; {_environment()}'))
  except (RuntimeError, AssertionError) as e:
    if not traceback.extract_tb(e.__traceback__)[-1].filename.endswith('xla_bridge.py'):
      raise
    reason = f' ({str(e).splitlines()[0]})' if str(e) else ''
    end(ConfigError(f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")}: JAX cannot start this platform '
                    f'here{reason}; unset JAX_PLATFORMS to use what is there, or install its support: '
                    "pip install 'llm_jax[cuda13]' for NVIDIA GPUs, 'llm_jax[tpu]' for TPUs"))


def end(error: UserError) -> NoReturn:
  """Prints the message and exits with the error's code."""
  print(redact(str(error) if isinstance(error, Interrupted) else f'error: {error}'), file=sys.stderr, flush=True)
  sys.exit(error.exit_code)


def _environment() -> str:
  """How to run with all packages: from the checkout's .venv if there is one."""
  venv = Path(__file__).parents[2] / '.venv' / 'bin'
  if (venv / 'llm-jax').exists() and Path(sys.executable).parent != venv:
    path = os.path.relpath(venv)
    return f'the environment made by make has the packages: {path}/llm-jax ..., or activate it: source {path}/activate'
  return 'install it with: pip install llm_jax (in a checkout: make install)'
