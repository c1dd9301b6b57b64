"""Readers of tables in Arrow's memory layout: Parquet, Arrow, Feather, Hugging Face's folders and hub."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.chat.records import conversation_fields
from llm_jax.data.formats.records import choose_fields, to_documents
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.loaders import SOURCES
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig

_BATCH_ROWS = 256
_STREAM_END = b'\xff\xff\xff\xff\0\0\0\0'  # end marker of an Arrow IPC stream


def parquet(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document per row, read in batches; the columns are the fields."""
  pa = _pyarrow()
  import pyarrow.parquet

  with _errors(file.path, 'Parquet', pa):
    with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
      columns = _columns(table.schema_arrow, config, file.path)
      batches = (batch.select(columns) for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False))
      yield from to_documents(_rows(batches, file, pa), config)


def arrow(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document per row of an Arrow IPC file or stream, or a Feather file (version 2), mapped into memory."""
  pa = _pyarrow()
  with _errors(file.path, 'Arrow', pa):
    with _open_arrow(file.path, pa) as (schema, batches):
      columns = _columns(schema, config, file.path)
      yield from to_documents(_rows((batch.select(columns) for batch in batches), file, pa), config)


def huggingface(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """The train split of a folder made by `save_to_disk`, or of 'hf:NAME' or 'hf:NAME/CONFIG' on the Hugging Face hub.

  A folder is read by pyarrow alone; the hub is streamed by the package `datasets`.
  """
  return to_documents(_hub_rows(file.name) if file.name.startswith('hf:') else _saved_rows(file, config), config)


def hub(config: SourceConfig, cache_dir: Path) -> list[File]:
  """The source `hf`: a data set on the Hugging Face hub."""
  return [File(config.path, Path(config.path), 'huggingface')]


def _saved_rows(file: File, config: SourceConfig) -> Iterator[tuple[str, str, Any]]:
  """Rows of all shards in order, numbered across shards."""
  folder = file.path
  if (folder / 'dataset_dict.json').exists():
    splits = _read_json(folder / 'dataset_dict.json').get('splits', [])
    if 'train' not in splits:
      raise DataError(f'{folder}: has no split train, but {", ".join(splits)}; set config.data.path to {folder}/SPLIT')
    folder = folder / 'train'
  state = _read_json(folder / 'state.json')
  if state.get('_indices_files'):
    raise DataError(f'{folder}: saved with a table of indices by an old version of datasets; load it and save it again')
  try:  # only files in this folder, whatever paths the JSON has
    paths = [folder / Path(entry['filename']).name for entry in state['_data_files']]
  except (KeyError, TypeError):
    raise DataError(f'{folder / "state.json"}: names no data files; save the data set again') from None
  pa, number = _pyarrow(), 0
  for path in paths:
    with _errors(path, 'Arrow', pa), _open_arrow(path, pa) as (schema, batches):
      columns = _columns(schema, config, path)
      for _, where, row in _rows((batch.select(columns) for batch in batches), File(file.name, path), pa):
        number += 1
        yield f'{file.name}:{number}', where, row


def _hub_rows(name: str) -> Iterator[tuple[str, str, Any]]:
  elsewhere = ('without a network, save it elsewhere with save_to_disk of the package datasets, copy the folder, and '
               'set config.data.path to it')
  try:
    _reach_hub()
  except OSError as e:
    raise DataError(f'{name}: the Hugging Face hub cannot be reached ({e.strerror or e}); {elsewhere}') from None
  try:
    import datasets
  except ImportError:
    raise ConfigError("hf: needs the package datasets: pip install 'llm_jax[data]'") from None
  parts = name.removeprefix('hf:').split('/')
  try:
    rows = datasets.load_dataset('/'.join(parts[:2]), '/'.join(parts[2:]) or None, split='train', streaming=True)
    for i, row in enumerate(rows, 1):
      yield f'{name}:{i}', f'{name}, row {i}', row
  except Exception as e:  # errors of a dozen other packages come through
    raise DataError(f'{name}: cannot be loaded from the Hugging Face hub ({type(e).__name__}: {_first_line(e)}); '
                    f'{elsewhere}') from None


def _reach_hub() -> None:
  """Raises OSError in seconds, where `datasets` would retry for half a minute. Skipped behind a proxy."""
  hub = urlsplit(os.environ.get('HF_ENDPOINT', 'https://huggingface.co'))
  if 'HF_HUB_OFFLINE' not in os.environ and not urllib.request.getproxies():
    socket.create_connection((hub.hostname, hub.port or 443), timeout=5).close()


@contextlib.contextmanager
def _open_arrow(path: Path, pa: Any) -> Iterator[tuple[Any, Iterable[Any]]]:
  """(schema, batches) of an IPC file or stream."""
  with pa.memory_map(str(path)) as source:
    if source.read(6) == b'ARROW1':
      reader = pa.ipc.open_file(source)
      yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
      return
    # pyarrow accepts a stream that was cut between two batches.
    source.seek(max(0, source.size() - len(_STREAM_END)))
    if source.read() != _STREAM_END:
      raise DataError(f'{path}: truncated, or not an Arrow file: its end marker is missing; get it again')
    source.seek(0)
    reader = pa.ipc.open_stream(source)
    yield reader.schema, reader


def _columns(schema: Any, config: SourceConfig, path: Path) -> list[str]:
  """The columns that make up a document. Raises DataError when they are missing or ambiguous."""
  if len(set(schema.names)) < len(schema.names):
    raise DataError(f'{path}: two columns have the same name: {", ".join(schema.names)}')
  examples = {field.name: _stand_in(field.type) for field in schema}
  if turns := conversation_fields(examples, config):
    return list(turns)
  fields = choose_fields(examples, config, str(path))
  if fields is None:
    raise DataError(f'{path}: no column holds text or lists of token ids; its schema is '
                    f'{", ".join(f"{field.name}: {field.type}" for field in schema)}')
  wanted = [name for name in fields if name is not None]
  missing = next((name for name in wanted if name not in schema.names), None)
  if missing is not None:
    raise DataError(f'{path}: has no column {missing!r}, but {", ".join(schema.names)}')
  return list(dict.fromkeys(wanted))


def _stand_in(kind: Any) -> Any:
  """An example of a value in a column of this type."""
  import pyarrow.types as types

  kind = kind.value_type if types.is_dictionary(kind) else kind
  if _is_text(kind):
    return ''
  if _is_list(kind) and types.is_struct(kind.value_type):
    return [{}]
  return [0] if _is_list(kind) and types.is_integer(kind.value_type) else None


def _is_text(kind: Any) -> bool:
  import pyarrow.types as types

  return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
                                     types.is_large_binary, types.is_binary_view))


def _is_list(kind: Any) -> bool:
  import pyarrow.types as types

  return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _rows(batches: Iterable[Any], file: File, pa: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
  number = 0
  for batch in batches:
    columns = [_readable(column, pa) for column in batch.columns]
    for begin in range(0, batch.num_rows, _BATCH_ROWS):
      values = [_values(column.slice(begin, _BATCH_ROWS)) for column in columns]
      for row in zip(*values, strict=True):
        number += 1
        yield f'{file.name}:{number}', f'{file.path}, row {number}', dict(zip(batch.schema.names, row, strict=True))


def _readable(column: Any, pa: Any) -> Any:
  """The column, with its offsets validated; text as bytes, so that of rows that are not UTF-8 each is a BadRecord."""
  if pa.types.is_dictionary(column.type):
    column.validate(full=True)
    column = column.dictionary_decode()
  as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
  if column.type in as_bytes:
    column = column.view(as_bytes[column.type])  # reads no data, so it is safe before validation
  column.validate(full=True)
  return column


def _values(column: Any) -> list[Any]:
  """Python values; lists of integers as arrays."""
  if _is_list(column.type) and _stand_in(column.type) == [0]:
    return [None if row.values is None else row.values.to_numpy(zero_copy_only=False) for row in column]
  return column.to_pylist()


@contextlib.contextmanager
def _errors(path: Path, kind: str, pa: Any) -> Iterator[None]:
  """Errors of pyarrow become a DataError with the path."""
  try:
    yield
  except FileNotFoundError:
    raise DataError(f'{path}: no such file') from None
  except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as e:
    raise DataError(f'{path}: damaged or truncated, or not {kind}: {_first_line(e)}') from None


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_bytes())
  except (OSError, ValueError) as e:
    raise DataError(f'{path}: cannot be read ({_first_line(e)}); expected a folder made by save_to_disk') from None
  if not isinstance(value, dict):
    raise DataError(f'{path}: is not a JSON object; expected a folder made by save_to_disk')
  return value


def _pyarrow() -> Any:
  """The optional package. Raises ConfigError where it is not installed."""
  try:
    import pyarrow
  except ImportError:
    raise ConfigError("this format needs the package pyarrow: pip install 'llm_jax[data]'") from None
  return pyarrow


register(FORMATS, 'parquet', parquet, NoSettings)
register(FORMATS, 'arrow', arrow, NoSettings)
register(FORMATS, 'huggingface', huggingface, NoSettings)
register(SOURCES, 'hf', hub)
