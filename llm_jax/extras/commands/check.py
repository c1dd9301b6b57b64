"""Reports devices and packages, and whether a config is valid, or whether it runs; or verifies a run's checkpoints.

With --step the config's first logged step is trained in a temporary folder, which checks data, model, optimizer and the
compiled step, and reports the memory of the state. With --workdir all files of a run's checkpoints are read and
compared with their hashes; --adopt writes the hashes of checkpoints that have none. The exit code is 0, or that of the
first error.

  llm-jax check
  llm-jax check --config=gpt_small --step
  llm-jax check --config=gpt_small --format=json --config.num_steps=50
  llm-jax check --workdir=runs/gpt_small
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax import __version__
from llm_jax.base import flags, runtime
from llm_jax.base.errors import ConfigError, UserError
from llm_jax.base.process import gib, out_of_memory_as_config_error, run_as_program, waiting
from llm_jax.base.storage import is_remote
from llm_jax.base.terminal import columns, wrap

CORE = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml-collections', 'numpy', 'tensorboard',
        'tokenizers', 'tiktoken', 'safetensors', 'psutil', 'rich')
OPTIONAL = {  # module: what it is used for, the extra that installs it
    'matplotlib': ('figures: plot, schedules, inspect, evaluate, sweep', 'plot'),
    'wandb': ('logs to Weights & Biases: config.log.loggers', 'wandb'),
    'xprof': ('profiles in TensorBoard', 'profile'),
    'pyarrow': ('Parquet and Arrow files', 'data'),
    'h5py': ('HDF5 files', 'data'),
    'zstandard': ('.zst files', 'data'),
    'datasets': ('folders of Hugging Face datasets', 'data'),
    'sentencepiece': ('SentencePiece tokenizers', 'data'),
    'fsspec': ('URLs of object stores', 'data'),
    'tree_sitter_wgsl_bevy': ('the WGSL validator', 'wgsl'),
    'qwix': ('8-bit matrices: config.model.einsum=int8, fp8', 'quant'),
    'starlette': ('llm-jax serve', 'serve'),
    'uvicorn': ('llm-jax serve', 'serve'),
    'lm_eval': ('tasks of EleutherAI\'s harness: evaluate --tasks', 'lm-eval'),
    'pynvml': ('utilisation of NVIDIA GPUs (nvidia-ml-py)', None),
}
Fact = tuple[str, str, dict[str, Any]]  # name, text, values by name


def parser() -> flags.Parser:
  parser = flags.Parser('check', __doc__, fields='llm_jax.config:Config')
  flags.add_config(parser)
  parser.add_argument('--step', action='store_true', help="train the config's first logged step")
  parser.add_argument('--workdir', metavar='FOLDER', help='verify the checkpoints of this run instead')
  parser.add_argument('--adopt', action='store_true', help='with --workdir: read checkpoints without a manifest.json, '
                      'as of an earlier version, and write it')
  parser.add_argument('--format', choices=('text', 'json'), default='text', help='of the output')
  flags.add(parser, trust=False)
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  if args.step and args.config is None:
    raise ConfigError('--step: needs a --config')
  if args.adopt and args.workdir is None:
    raise ConfigError('--adopt: needs a --workdir')
  if args.workdir is not None:
    if args.config is not None:
      raise ConfigError('--workdir: verifies a run, and --config checks a config; give one of them')
    if is_remote(args.workdir):
      raise ConfigError(f'--workdir: must be a folder here, got {args.workdir}; copy the run here to verify all of it. '
                        'A checkpoint in storage is verified whenever it is read')
    flags.apply(args)
    from llm_jax.extras.commands.check_workdir import verify
    verify(Path(args.workdir), args.adopt, args.format == 'json')
    return
  report: dict[str, dict[str, Any]] = {}
  try:
    for name, text, values in facts(args):
      report.setdefault(name, {}).update(values)
      if args.format == 'text':
        print(wrap(f'{name:12} {text}', 13, columns()), flush=True)
  except UserError as e:
    report['error'] = {'message': str(e), 'exit_code': e.exit_code}
    raise
  finally:
    if args.format == 'json':
      print(json.dumps(report, indent=2), flush=True)


def facts(args: argparse.Namespace) -> Iterator[Fact]:
  """The facts, each as soon as it is known. Raises UserErrors."""
  yield from packages()
  if missing := [name for name in CORE if version(name) is None]:
    raise ConfigError(f'{", ".join(missing)}: required but not installed; run pip install llm_jax')
  waiting('starting JAX')
  was_set = flags.apply(args)
  yield from machine()
  yield 'runtime', was_set, {'set': was_set}
  if args.config is None:
    return
  from llm_jax import config_file
  from llm_jax.base.devices import only_cpus
  source, cpu_only = config_file.open_config(args.config), only_cpus() and not args.full_size
  config = source.resolve(args.overrides, cpu_only=cpu_only)
  for note in source.cpu_note(args.config, args.overrides) if cpu_only else ():
    yield 'on_cpu', note, {'applied': True}
  yield ('config', f'{args.config}: fields and values are valid{"" if args.step else "; --step checks data and model"}',
         {'name': args.config, 'valid': True, 'num_steps': config.num_steps, 'batch_tokens': config.batch_tokens})
  yield from memory_of_step(config)
  if args.step:
    waiting('reading data, compiling and training a step')
    yield from one_step(args, config)


def memory_of_step(config: Any) -> Iterator[Fact]:
  """The estimated memory of a step on one of these devices, where the data need not be read for it."""
  from llm_jax.base.devices import platform
  from llm_jax.base.target import current_target
  from llm_jax.extras.plan.building import build, stands_in
  from llm_jax.training.estimate import check_fits, estimate
  if not stands_in(config) or config.start.run:
    return
  target = current_target()
  built = build(config, target, read_data=False)
  _, number = built.config.split_batch(built.num_shards)
  if config.tokens_per_device is None:  # which finds what fits: a row at a time needs least
    number = built.config.rows_per_batch // built.num_shards
  found = estimate(built.config, built.abstract, built.mesh, number, platform())
  warning = check_fits(found, target)
  text = f'a step takes about {gib(found.total)} of a device, by estimate: {gib(found.state)} of them are the state'
  yield ('memory', f'WARNING: {warning}' if warning else text,
         {'step_bytes': found.total, 'state_bytes_each': found.state, 'fits': not warning})


def one_step(args: argparse.Namespace, config: Any) -> Iterator[Fact]:
  """Trains the first logged step in a temporary folder. Raises UserErrors."""
  from llm_jax.training import loop
  from llm_jax.training.custom import Custom
  console = contextlib.redirect_stdout(sys.stderr) if args.format == 'json' else contextlib.nullcontext()
  try:
    with (console, out_of_memory_as_config_error(config.tokens_per_device), tempfile.TemporaryDirectory() as folder,
          contextlib.closing(loop.train(config, Path(folder), Custom())) as events):
      first = next(events, None)
  except UserError:
    yield 'config', f'{args.config}: does NOT run', {'runs': False}
    raise
  if first is None:
    yield ('config', 'nothing to train: it starts from a run that has already reached num_steps', {'runs': True})
    return
  kept, free = config.checkpoint.keep_last + config.checkpoint.keep_best, shutil.disk_usage('.').free
  size, loss = first.status()['state_bytes'], first.metrics['train/loss']
  yield ('memory', f'weights and optimizer state take {gib(size)}, over all devices', {'state_bytes': size})
  yield ('checkpoints', f'{kept} of {gib(size)} are kept; {gib(free)} are free here',
         {'kept': kept, 'bytes_each': size, 'free_bytes': free})
  yield 'config', f'runs: the loss of step {first.step} is {loss:.3f}', {'runs': True, 'step': first.step, 'loss': loss}


def machine() -> Iterator[Fact]:
  """Devices, memory, kernels and disk."""
  import jax
  import psutil

  from llm_jax.base.devices import has_fast_bf16, peak_flops
  from llm_jax.base.target import current_target
  from llm_jax.layers.kernels import AUTO
  devices, host = jax.devices(), psutil.virtual_memory()
  kind, memory, count = devices[0].platform, current_target().memory, jax.process_count()
  peak, cache, dtype = peak_flops(devices), runtime.user_cache(), 'bfloat16' if has_fast_bf16() else 'float32'
  kernels = AUTO.get(kind, ('blocked',))
  in_cache, here = (shutil.disk_usage(path).free for path in (
      next(path for path in (cache, *cache.parents) if path.exists()), Path()))
  python = platform.python_version()
  yield ('llm_jax', f'{__version__}, Python {python}, {platform.platform()}',
         {'version': __version__, 'python': python, 'platform': platform.platform()})
  yield ('devices', f'{len(devices)} x {devices[0].device_kind} ({kind}), {count} process(es)',
         {'count': len(devices), 'kind': devices[0].device_kind, 'platform': kind, 'processes': count})
  yield ('peak', 'unknown, so no MFU' if peak is None else f'{peak / len(devices) / 1e12:.0f} TFLOP/s each',
         {'flops': peak})
  yield 'dtype auto', dtype, {'dtype': dtype}
  yield 'attention', f'{", ".join(kernels)}: the first one that supports the shapes', {'kernels': list(kernels)}
  yield ('memory', f'host {gib(host.available)} of {gib(host.total)} free'
         + ('' if memory is None else f', device {gib(memory)}'),
         {'host_free_bytes': host.available, 'host_bytes': host.total, 'device_bytes': memory})
  yield 'cores', str(os.cpu_count()), {'count': os.cpu_count()}
  yield ('disk', f'{gib(in_cache)} free for the cache {cache}, {gib(here)} here',
         {'cache': str(cache), 'cache_free_bytes': in_cache, 'here_free_bytes': here})


def packages() -> Iterator[Fact]:
  """Versions of required packages, and optional packages that are missing."""
  versions = {name: version(name) for name in CORE}
  yield 'packages', ', '.join(f'{name} {found or "MISSING"}' for name, found in versions.items()), versions
  for name, (use, extra) in OPTIONAL.items():
    if importlib.util.find_spec(name) is None:
      how = f"pip install 'llm_jax[{extra}]'" if extra else 'pip install nvidia-ml-py'
      yield 'missing', f'{name}, for {use}: {how}', {name: {'use': use, 'install': how}}


def version(name: str) -> str | None:
  """The installed version of a package; None if it is not installed."""
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


if __name__ == '__main__':
  run_as_program(main)
