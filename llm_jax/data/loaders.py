"""Where data comes from, and ways to load it that most runs do not need: streams, archives."""

from __future__ import annotations

from llm_jax.base.registry import Registry

# Functions (SourceConfig, cache folder) -> list of File. config.data.path names one: 'stdlib', or 'synthetic:1000:5',
# where the function reads what follows the colon. 'url' locates SCHEME://...
SOURCES = Registry('source')

# Classes with problems(config) -> messages, open(config) -> Data and batches(config, data, num_rows, rows, seed, begin,
# states, process, num_processes) -> Batches; see open_data and pipeline.open_batches. 'shards' has
# prepare(config, 'INDEX/COUNT') and merge(store folder, notes of the report). 'dask': a function (config, address,
# number of shards or None, plug-ins) that prepares all shards. 'remote': a function (URL, config) -> Prepared, or None
# if no store is there.
LOADERS = Registry('loader')
# 'archive': a function (path, cache folder) -> folder with its files. 'stream': a function (path of a compressed file,
# name of its compression, its bytes as a stream) -> stream of the decompressed bytes.
UNPACKERS = Registry('unpacker')
# 'quality': a function FilterConfig -> function (text or ids of a document) -> the rule that drops it, or None.
RULES = Registry('rules')
