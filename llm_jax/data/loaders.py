"""Ways to load data that most runs do not need: streams (extras/streaming.py) and archives (extras/archives.py)."""

from __future__ import annotations

from llm_jax.base.registry import Registry

# Classes with open(config) -> Data and batches(config, data, num_rows, rows, seed, begin, states, process,
# num_processes) -> Batches; see open_data and pipeline.open_batches.
LOADERS = Registry('loader')
# Functions (path of an archive, cache folder) -> folder with its files.
UNPACKERS = Registry('unpacker')
