"""A fork server: each trial is a fork of one process that has imported JAX and llm_jax, so that it starts at once.

  python -m faults.server     reads one JSON request a line, answers each with one JSON line

Forking is safe here because the server has one thread and has started no JAX backend; it checks both before each fork.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

PRELOADED = ('jax', 'orbax.checkpoint', 'llm_jax.__main__', 'llm_jax.main', 'llm_jax.api', 'llm_jax.extras.table',
             'llm_jax.commands.evaluate', 'llm_jax.base.tensorboard')


def serve() -> Callable[[], None] | None:
  """Answers requests until stdin ends. In a forked child, returns what the child runs."""
  for line in sys.stdin:
    request = json.loads(line)
    if 'fork' in request:
      check_forkable()
      if (pid := os.fork()) == 0:
        return become(request)
      answer: Any = pid
    else:  # the exit code as subprocess has it, None while the child runs
      pid, status = os.waitpid(request['poll'], os.WNOHANG)
      answer = os.waitstatus_to_exitcode(status) if pid else None
    print(json.dumps(answer), flush=True)
  return None


def check_forkable() -> None:
  from jax._src import xla_bridge
  threads = os.listdir('/proc/self/task')
  assert len(threads) == 1, f'{len(threads)} threads: a fork could copy a held lock'
  assert not xla_bridge.backends_are_initialized(), 'a JAX backend cannot be forked'


def become(request: dict[str, Any]) -> Callable[[], None]:
  """Makes this forked child the program of a request: its arguments, folder, environment, output and signals."""
  os.setsid()
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives the server
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
  os.chdir(request['cwd'])
  os.environ.update(request['env'])
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  output = os.open(request['output'], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
  os.dup2(output, 1)
  os.dup2(output, 2)
  sys.argv = ['llm-jax', *request['fork']]
  sys.orig_argv = [sys.executable, '-m', 'llm_jax', *request['fork']]
  import jax
  jax.config.update('jax_num_cpu_devices', request['devices'])  # read from the environment when JAX was imported
  module, _, name = request['function'].partition(':')
  return getattr(importlib.import_module(module), name)


def main() -> None:
  from llm_jax.base import runtime
  runtime.prepare()
  for name in PRELOADED:
    importlib.import_module(name)
  print('ready', flush=True)
  program = serve()
  if program is not None:
    program()


if __name__ == '__main__':
  main()
