"""Trains a model: python -m llm_jax.main --config=configs/gpt_small.py [--workdir=...] [--config.FIELD=VALUE ...]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llm_jax.base import flags
from llm_jax.base.builder import parse_overrides
from llm_jax.base.errors import ConfigError
from llm_jax.base.process import out_of_memory_as_config_error, run_as_program, start_processes


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
      prog='llm-jax train', allow_abbrev=False, description=__doc__,
      epilog='Any field can be set: --config.model.num_layers=4. `llm-jax config --config=NAME` lists all fields with '
             'their values; config.json in the workdir of a run has the values that it used.')
  parser.add_argument('--config', help='a config file, a preset (llm-jax configs lists them), or the folder of a run')
  parser.add_argument('--workdir', help='folder of the run; if it contains a run, that is resumed '
                      '(default: runs/<name of the config>)')
  parser.add_argument('--full_size', action='store_true', help="without an accelerator, ignore the config's on_cpu")
  parser.add_argument('--distributed', action='store_true', help='run as one of several processes; the coordinator is '
                      'found in the environment (SLURM, TPU pod, Open MPI, or launch/local.py)')
  flags.add(parser)
  args, rest = parser.parse_known_args(argv)
  was_set = flags.apply(args)

  from llm_jax import config as config_lib
  from llm_jax import config_file
  overrides = parse_overrides(
      rest, '--config.', '--config, --workdir, --full_size, --distributed, --tuning, --plugin, --trust, --config.FIELD',
      config_lib.Config)
  if args.config is None:
    raise ConfigError(f'--config is missing: set it to a file or to one of: {", ".join(config_file.presets())}')
  source = config_file.open_config(args.config, trust=args.trust)
  source.check(overrides)  # reports a config that is invalid on any machine before starting JAX
  if args.workdir and '://' in str(args.workdir):
    raise ConfigError(f'--workdir: {args.workdir} is a URL; mount the storage and set the folder')
  import jax

  from llm_jax import api
  from llm_jax.base.devices import only_cpus
  from llm_jax.training.ending import ending
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
  for line in ending(config, workdir, argv) if jax.process_index() == 0 else ():
    print(line)


if __name__ == '__main__':
  run_as_program(main)
