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
from llm_jax.data.formats.fields import choose_fields, left_over, names_of, of_lists
from llm_jax.data.formats.records import to_documents
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
      batches = table.iter_batches(_BATCH_ROWS, columns=['.'.join(steps) for steps in columns], use_threads=False)
      yield from to_documents(_rows(batches, columns, table.schema_arrow, file, config, pa), config)


def arrow(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document per row of an Arrow IPC file or stream, or a Feather file (version 2), mapped into memory."""
  pa = _pyarrow()
  with _errors(file.path, 'Arrow', pa):
    with _open_arrow(file.path, pa) as (schema, batches):
      columns = _columns(schema, config, file.path)
      yield from to_documents(_rows(batches, columns, schema, file, config, pa), config)


def huggingface(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """The train split of a folder made by `save_to_disk`, or of 'hf:NAME' or 'hf:NAME/CONFIG' on the Hugging Face hub.

  A folder is read by pyarrow alone; the hub is streamed by the package `datasets`.
  """
  rows = _hub_rows(file.name, config.label_field) if file.name.startswith('hf:') else _saved_rows(file, config)
  return to_documents(rows, config)


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
      for _, where, row in _rows(batches, columns, schema, File(file.name, path), config, pa):
        number += 1
        yield f'{file.name}:{number}', where, row


def _hub_rows(name: str, label_field: str | None) -> Iterator[tuple[str, str, Any]]:
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
    classes = getattr((rows.features or {}).get(label_field), 'names', None)  # of a ClassLabel
    for i, row in enumerate(rows, 1):
      named = {} if classes is None else {label_field: class_name(row[label_field], classes)}
      yield f'{name}:{i}', f'{name}, row {i}', row | named
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


Steps = tuple[str, ...]  # a column, and names of fields in its structs


def _columns(schema: Any, config: SourceConfig, path: Path) -> list[Steps]:
  """The columns that make up a document. Raises DataError when they are missing or ambiguous."""
  if len(set(schema.names)) < len(schema.names):
    raise DataError(f'{path}: two columns have the same name: {", ".join(schema.names)}')
  stand_ins = {field.name: _stand_in(field.type) for field in schema}
  if turns := conversation_fields(stand_ins, config):
    return [(name,) for name in turns]
  fields = choose_fields(stand_ins, config, str(path))
  if fields is None:
    raise DataError(f'{path}: no column holds text or lists of token ids; its schema is '
                    f'{", ".join(f"{field.name}: {field.type}" for field in schema)}{of_lists(stand_ins)}')
  if (rest := left_over(stand_ins, fields)) is not None:
    raise DataError(f'{path}: {rest}')
  found = {name: _steps(schema, name) for name in fields.names}
  lacking = next((name for name, steps in found.items() if steps is None and name not in fields.optional), None)
  if lacking is not None:
    raise DataError(f'{path}: has no column {lacking!r}, but {names_of(stand_ins)}')
  return [steps for steps in found.values() if steps is not None]


def _steps(fields: Any, path: str) -> Steps | None:
  """The column, or the struct's field, at a dotted path."""
  names = [field.name for field in fields]
  if path in names:
    return (path,)
  for at, char in enumerate(path):
    if char == '.' and path[:at] in names:
      kind = fields.field(path[:at]).type
      if hasattr(kind, 'fields') and (rest := _steps(_Struct(kind), path[at + 1:])):
        return path[:at], *rest
  return None


class _Struct:
  """The fields of a struct type, as a schema gives them."""

  def __init__(self, kind: Any):
    self.fields = {kind.field(i).name: kind.field(i) for i in range(kind.num_fields)}

  def __iter__(self) -> Iterator[Any]:
    return iter(self.fields.values())

  def field(self, name: str) -> Any:
    return self.fields[name]


def _stand_in(kind: Any) -> Any:
  """An example of a value in a column of this type."""
  import pyarrow.types as types

  kind = kind.value_type if types.is_dictionary(kind) else kind
  if _is_text(kind):
    return 'text'
  if types.is_struct(kind):
    return {field.name: _stand_in(field.type) for field in _Struct(kind)}
  if not _is_list(kind):
    return None
  item = 0 if types.is_integer(kind.value_type) else _stand_in(kind.value_type)
  return None if item is None else [item]


def _is_text(kind: Any) -> bool:
  import pyarrow.types as types

  return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
                                     types.is_large_binary, types.is_binary_view))


def _is_list(kind: Any) -> bool:
  import pyarrow.types as types

  return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _rows(batches: Iterable[Any], columns: list[Steps], schema: Any, file: File, config: SourceConfig,
          pa: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
  names, number = ['.'.join(steps) for steps in columns], 0
  label, classes = config.label_field or '', _class_names(schema, config.label_field)
  for batch in batches:
    arrays = [_readable(_column(batch, steps), pa) for steps in columns]
    for begin in range(0, batch.num_rows, _BATCH_ROWS):
      values = [_values(column.slice(begin, _BATCH_ROWS)) for column in arrays]
      for row in zip(*values, strict=True):
        number += 1
        record = dict(zip(names, row, strict=True))
        if classes is not None:
          record[label] = class_name(record[label], classes)
        yield f'{file.name}:{number}', f'{file.path}, row {number}', record


def _column(batch: Any, steps: Steps) -> Any:
  column = batch.column(steps[0])
  if len(steps) == 1:
    return column
  import pyarrow.compute
  return pyarrow.compute.struct_field(column, list(steps[1:]))


def _class_names(schema: Any, label: str | None) -> list[str] | None:
  """The names that the package `datasets` stores for the numbers of a ClassLabel."""
  try:
    features = json.loads(schema.metadata[b'huggingface'])['info']['features']
    return list(map(str, features[label]['names'])) if features[label]['_type'] == 'ClassLabel' else None
  except (KeyError, TypeError, ValueError):
    return None


def class_name(value: Any, names: list[str]) -> Any:
  """The name of a class; None for -1, which stands for no label, and other numbers without a name."""
  return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _readable(column: Any, pa: Any) -> Any:
  """The column, with its offsets validated; text as bytes, so that of rows that are not UTF-8 each is a BadRecord."""
  if pa.types.is_dictionary(column.type):
    column.validate(full=True)
    column = column.dictionary_decode()
  as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
  if column.type in as_bytes:
    column = column.view(as_bytes[column.type])  # reads no data, so it is safe before validation
  elif _is_list(column.type) and column.type.value_type in as_bytes:
    column.validate()
    column = column.cast(pa.large_list(as_bytes[column.type.value_type]))
  column.validate(full=True)
  return column


def _values(column: Any) -> list[Any]:
  """Python values; lists of integers as arrays."""
  import pyarrow.types as types

  if _is_list(column.type) and types.is_integer(column.type.value_type):
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
