"""Programs of a campaign: forks of the server, with exit codes, signals and output files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 240.0  # seconds: no program of a campaign takes as long
# As tests/conftest.py: compiles in 35% of the time; later versions abort on an unknown flag.
FLAGS = ('--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
         if version('jax').startswith(('0.9.', '0.10.')) else '')


def environment(cache: Path) -> dict[str, str]:
  """That of the server and of programs started without it: CPUs, and a shared cache of data and compiled programs."""
  kept = {name: value for name, value in os.environ.items()
          if name not in ('JAX_NUM_CPU_DEVICES', 'JAX_COMPILATION_CACHE_MAX_SIZE')}
  return kept | {
      'JAX_PLATFORMS': 'cpu', 'LLM_JAX_CACHE': str(cache), 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}',
      'JAX_COMPILATION_CACHE_DIR': str(cache / 'programs'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',  # with tiny models, compiling takes more time than running
      'XLA_FLAGS': FLAGS, 'OPENBLAS_NUM_THREADS': '1'}  # the server must have one thread


class Server:
  """The client of a fork server. Thread-safe; a context manager."""

  def __init__(self, cache: Path):
    self._lock = threading.Lock()
    self._process = subprocess.Popen([sys.executable, '-m', 'faults.server'], env=environment(cache), text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert self._process.stdout is not None
    if (line := self._process.stdout.readline()) != 'ready\n':
      raise RuntimeError(f'the fork server did not start: {line}')

  def ask(self, **request: Any) -> Any:
    with self._lock:
      assert self._process.stdin is not None and self._process.stdout is not None
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
      return json.loads(self._process.stdout.readline())

  def __enter__(self) -> Server:
    return self

  def __exit__(self, *exc: object) -> None:
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


class Program:
  """One process: a fork of the server."""

  def __init__(self, server: Server, argv: list[str], *, cwd: Path, output: Path, env: dict[str, str], devices: int = 1,
               function: str = 'faults.child:llm_jax'):
    self.output, self.code, self._server = output, None, server
    self.started = time.monotonic()
    self.pid = server.ask(fork=argv, cwd=str(cwd), output=str(output), env=env, devices=devices, function=function)

  def poll(self) -> int | None:
    """The exit code, negative for a signal; None while it runs."""
    if self.code is None:
      self.code = self._server.ask(poll=self.pid)
    return self.code

  def wait(self, seconds: float = LIMIT) -> int | None:
    """The exit code; None if it still runs after that time."""
    end = time.monotonic() + seconds
    while self.poll() is None and time.monotonic() < end:
      time.sleep(0.01)
    return self.code

  def signal(self, number: int) -> None:
    """Has no effect on a process that has ended; its id is not used again before it was polled."""
    if self.poll() is None:
      os.kill(self.pid, number)

  def end(self) -> None:
    """Kills it, also if it is stopped, and waits."""
    self.signal(signal.SIGKILL)
    self.wait()

  def text(self) -> str:
    with contextlib.suppress(OSError):
      return self.output.read_text(errors='replace')
    return ''


def free_address() -> str:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


def rank_environment(rank: int, num_ranks: int, address: str) -> dict[str, str]:
  """The variables that launch/local.py sets for a process of several."""
  return {'JAX_NUM_PROCESSES': str(num_ranks), 'JAX_PROCESS_ID': str(rank), 'JAX_COORDINATOR_ADDRESS': address,
          'JAX_COORDINATOR_BIND_ADDRESS': address}
