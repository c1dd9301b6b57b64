"""Readers, one function per format: (File, SourceConfig) -> documents; and how a file's format is found."""

from __future__ import annotations

import os
from collections.abc import Callable

from llm_jax.base.builder import known_names
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, Registry, register
from llm_jax.data.formats import text
from llm_jax.data.formats.compression import COMPRESSED
from llm_jax.data.sources.documents import File, SourceConfig
from llm_jax.data.stores import token_files

# Readers: functions (File, SourceConfig) -> iterator of Document and BadRecord.
FORMATS = Registry('format')
for _name, _reader in (
    ('text', text.text), ('jsonl', text.jsonl), ('bin', token_files.bin_file), ('idx', token_files.megatron_index),
    ('bytes', token_files.raw_bytes)):
  register(FORMATS, _name, _reader, NoSettings)
ENDINGS = {
    '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'json', '.csv': 'csv', '.tsv': 'tsv', '.toml': 'toml',
    '.sqlite': 'sqlite', '.sqlite3': 'sqlite', '.db': 'sqlite', '.parquet': 'parquet', '.pq': 'parquet',
    '.arrow': 'arrow', '.feather': 'arrow', '.ipc': 'arrow', '.h5': 'hdf5', '.hdf5': 'hdf5', '.npy': 'npy',
    '.npz': 'npz', '.array_record': 'arrayrecord', '.arrayrecord': 'arrayrecord', '.tfrecord': 'tfrecord',
    '.tfrecords': 'tfrecord', '.bin': 'bin', '.idx': 'idx', '.pkl': 'pickle', '.pickle': 'pickle',
    '.txt': 'text', '.md': 'text'}
FIRST_BYTES = {
    b'PAR1': 'parquet', b'ARROW1': 'arrow', b'\x89HDF\r\n\x1a\n': 'hdf5', b'\x93NUMPY': 'npy',
    b'SQLite format 3\0': 'sqlite', b'\x80\x02': 'pickle', b'\x80\x03': 'pickle', b'\x80\x04': 'pickle',
    b'\x80\x05': 'pickle'}


def check_format(name: str, path: str = 'config.data') -> None:
  """Raises ConfigError for a format that is unknown."""
  if name != 'auto' and name not in FORMATS:
    raise ConfigError(f'{path}.format: {name!r} is unknown; {known_names(name, ["auto", *FORMATS], extensible=True)}')


def format_of(file: File, config: SourceConfig, head_of: Callable[[], bytes]) -> str:
  """The configured format, or the one by the file's ending or first bytes (`head_of`). Raises ConfigError."""
  if config.format != 'auto':
    check_format(config.format)
    return config.format
  if file.format is not None:
    return file.format
  name = file.name.lower()
  for ending in COMPRESSED:
    name = name.removesuffix(ending)
  if (ending := os.path.splitext(name)[1]) in ENDINGS:
    return ENDINGS[ending]
  try:
    head = head_of()
  except DataError:
    return 'text'  # the reader of text reports the error
  for first, fmt in FIRST_BYTES.items():
    if head.startswith(first):
      return fmt
  return 'jsonl' if not ending and head.lstrip()[:1] == b'{' else 'text'
