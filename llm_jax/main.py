"""Trains a model: python -m llm_jax.main --config=configs/gpt_small.py [--workdir=...] [--config.FIELD=VALUE ...]"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llm_jax.base import flags
from llm_jax.base.builder import parse_overrides
from llm_jax.base.errors import ConfigError, Interrupted, UserError


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
      prog='llm-jax train', allow_abbrev=False, description=__doc__,
      epilog='Any field can be set: --config.model.num_layers=4. llm_jax/config.py defines all fields; config.json in '
             'the workdir of a run has the values that it used.')
  parser.add_argument('--config', required=True, help='a config file, or the config.json of a run')
  parser.add_argument('--workdir', help='folder of the run; if it contains a run, that is resumed '
                      '(default: runs/<name of the config>)')
  parser.add_argument('--full_size', action='store_true', help="without an accelerator, ignore the config's on_cpu")
  parser.add_argument('--distributed', action='store_true', help='run as one of several processes; the coordinator is '
                      'found in the environment (SLURM, TPU pod, Open MPI, or launch/local.py)')
  flags.add(parser, trust=False)
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(
      rest, '--config.', '--config, --workdir, --full_size, --distributed, --tuning, --plugin, --config.FIELD')
  was_set = flags.apply(args)

  from llm_jax import config as config_lib
  source = config_lib.load(args.config)
  problems = []
  for cpu_only in (False, True):  # reports a config that is invalid on any machine before starting JAX
    try:
      source.resolve(overrides, cpu_only=cpu_only)
    except ConfigError as e:
      problems.append(e)
  if len(problems) == 2:
    raise problems[-1]
  if args.workdir and '://' in str(args.workdir):
    raise ConfigError(f'--workdir: {args.workdir} is a URL; mount the storage and set the folder')
  import jax

  from llm_jax import api
  from llm_jax.base.devices import only_cpus
  if args.distributed:
    start_processes()
  if jax.process_index() == 0:
    print(f'runtime: {was_set}', flush=True)
  cpu_only = only_cpus() and not args.full_size
  config = source.resolve(overrides, cpu_only=cpu_only)
  if cpu_only and source.on_cpu is not None and jax.process_index() == 0:
    print(f'no accelerator: on_cpu of {args.config} is applied (--full_size: do not apply it)')
    for name, (old, new) in config_lib.differences(source.full, source.on_cpu).items():
      if name not in overrides:
        print(f'  config.{name}: {json.dumps(old)} -> {json.dumps(new)}')
    sys.stdout.flush()
  name = source.path.stem if source.path.suffix == '.py' else f'{source.path.absolute().parent.name}_again'
  workdir = Path(args.workdir or Path('runs') / name)
  with out_of_memory_as_config_error(config.tokens_per_device):
    for _ in api.train(config, workdir):
      pass


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


if __name__ == '__main__':
  run_as_program(main)
