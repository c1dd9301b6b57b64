"""Reports devices and packages, and whether a config runs: llm-jax check [--config=FILE]

With a config it trains the first logged step in a temporary folder, which checks data, model, optimizer and the
compiled step, and reports the memory of the state. The exit code is 0, or that of the first error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path

from llm_jax import __version__
from llm_jax.base import flags, runtime
from llm_jax.base.builder import parse_overrides
from llm_jax.base.errors import ConfigError, UserError
from llm_jax.base.process import out_of_memory_as_config_error, run_as_program

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
    'pynvml': ('utilisation of NVIDIA GPUs (nvidia-ml-py)', None),
}


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(prog='llm-jax check', allow_abbrev=False, description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--config', help='a config file, or the config.json of a run')
  parser.add_argument('--full_size', action='store_true', help="without an accelerator, ignore the config's on_cpu")
  flags.add(parser, trust=False)
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(rest, '--config.', '--config, --full_size, --tuning, --config.FIELD')
  lines, missing = packages()
  print('\n'.join(lines), flush=True)
  if missing:
    raise ConfigError(f'{", ".join(missing)}: required but not installed; run pip install llm_jax')
  was_set = flags.apply(args)
  for line in [*machine(), f'runtime      {was_set}']:
    print(line)
  if args.config is None:
    return
  from llm_jax import api
  from llm_jax.training import loop
  from llm_jax.training.custom import Custom
  config = api.load_config(args.config, full_size=args.full_size, **overrides)
  print(f'config       {args.config}: fields and values are valid')
  try:
    with (out_of_memory_as_config_error(config.tokens_per_device), tempfile.TemporaryDirectory() as folder,
          contextlib.closing(loop.train(config, Path(folder), Custom())) as events):
      first = next(events, None)
  except UserError:
    print(f'config       {args.config}: does NOT run', flush=True)
    raise
  if first is None:
    print('config       nothing to train: it starts from a run that has already reached num_steps')
    return
  kept, free = config.checkpoint.keep_last + config.checkpoint.keep_best, shutil.disk_usage('.').free / 2**30
  size = first.status()['state_bytes'] / 2**30
  print(f'memory       weights and optimizer state take {size:.2f} GiB, over all devices')
  print(f'checkpoints  {kept} of {size:.2f} GiB are kept; {free:.1f} GiB are free here')
  print(f'config       runs: the loss of step {first.step} is {first.metrics["train/loss"]:.3f}')


def machine() -> list[str]:
  """Lines on devices, memory, kernels and disk."""
  import jax
  import psutil

  from llm_jax.base.devices import device_memory, has_fast_bf16, peak_flops
  from llm_jax.layers.kernels import AUTO
  devices = jax.devices()
  kind, memory = devices[0].platform, device_memory(jax.local_devices()[0])
  peak, cache = peak_flops(devices), runtime.user_cache()
  here = next(path for path in (cache, *cache.parents) if path.exists())
  peak_each = 'unknown, so no MFU' if peak is None else f'{peak / len(devices) / 1e12:.0f} TFLOP/s each'
  return [
      f'llm_jax      {__version__}, Python {platform.python_version()}, {platform.platform()}',
      f'devices      {len(devices)} x {devices[0].device_kind} ({kind}), {jax.process_count()} process(es)',
      f'peak         {peak_each}',
      f'dtype auto   {"bfloat16" if has_fast_bf16() else "float32"}',
      f'attention    {", ".join(AUTO.get(kind, ("blocked",)))}: the first one that supports the shapes',
      f'memory       host {psutil.virtual_memory().available / 2**30:.1f} of '
      f'{psutil.virtual_memory().total / 2**30:.1f} GiB free'
      + ('' if memory is None else f', device {memory / 2**30:.1f} GiB'),
      f'cores        {os.cpu_count()}',
      f'disk         {shutil.disk_usage(here).free / 2**30:.1f} GiB free for the cache {cache}, '
      f'{shutil.disk_usage(".").free / 2**30:.1f} GiB here',
  ]


def packages() -> tuple[list[str], list[str]]:
  """(lines on required versions and missing optional packages, names of missing required packages)."""
  versions, missing = [], []
  for name in CORE:
    try:
      versions.append(f'{name} {importlib.metadata.version(name)}')
    except importlib.metadata.PackageNotFoundError:
      versions.append(f'{name} MISSING')
      missing.append(name)
  lines = [f'packages     {", ".join(versions)}']
  for name, (use, extra) in OPTIONAL.items():
    if importlib.util.find_spec(name) is None:
      how = f"pip install 'llm_jax[{extra}]'" if extra else 'pip install nvidia-ml-py'
      lines.append(f'missing      {name}, for {use}: {how}')
  return lines, missing


if __name__ == '__main__':
  run_as_program(main)
