"""Prepares data on the workers of a Dask cluster: one task per shard, which the scheduler repeats if a worker dies.

All workers need this package, the paths of the config and its cache_dir, as on a shared file system.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llm_jax.base import plugins
from llm_jax.base.builder import build, to_dict
from llm_jax.base.errors import ConfigError, UserError
from llm_jax.base.progress import progress_bar
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.config import DataConfig, cache_dir
from llm_jax.data.loaders import LOADERS
from llm_jax.data.open import store_recipes
from llm_jax.extras.shards import prepare_shard

RETRIES = 3  # of a shard that failed
SHARDS_PER_WORKER = 4
TIMEOUT = 20  # seconds for the scheduler to answer


def prepare(config: DataConfig, address: str, num_shards: int | None, plugin_names: list[str]) -> None:
  """Prepares all shards; the next open_data merges them. Raises ConfigError without Dask, and a worker's UserError."""
  try:
    from distributed import Client, as_completed
  except ImportError:
    raise ConfigError("--dask: needs a further package: pip install 'llm_jax[dask]'") from None
  if num_shards is not None and num_shards < 1:
    raise ConfigError(f'--num_shards: must be at least 1; got {num_shards}')
  try:
    client = Client(address, timeout=TIMEOUT)
  except (OSError, ValueError) as e:
    raise ConfigError(f'--dask: no Dask scheduler answers at {address}: {e}') from None
  # Absolute, as the workers' folders are others; here, so that only one process fits a tokenizer.
  config = dataclasses.replace(config, cache_dir=str(cache_dir(config).absolute()))
  recipes = store_recipes(config)
  if all(recipe.folder.exists() for recipe in recipes.values()):
    return
  for recipe in recipes.values():
    recipe.corpus.shard(0, 1)  # refuses here what no worker can do
  with client:
    workers = len(client.scheduler_info(n_workers=-1)['workers'])
    count = num_shards or SHARDS_PER_WORKER * max(1, workers)
    if not workers:
      print(f'data: the scheduler at {address} has no workers yet; waiting for them', flush=True)
    paths = [str(Path(name).absolute()) if Path(name).exists() else name for name in plugin_names]
    shards = client.map(_task, [to_dict(config)] * count, range(count), [count] * count, [paths] * count, pure=False,
                        retries=RETRIES)
    with progress_bar(f'preparing {count} shards on {workers} worker(s)', count, 'shards') as bar:
      for done in as_completed(shards):
        if error := done.exception():
          raise error if isinstance(error, UserError) else UserError(f'a shard failed on a Dask worker: {error!r}')
        bar.update(1)


def _task(values: dict, index: int, count: int, plugin_names: list[str]) -> None:
  plugins.load_all(plugin_names)  # first, as a config may name what they register
  prepare_shard(build(DataConfig, values, 'config.data'), index, count)


register(LOADERS, 'dask', prepare, NoSettings)
