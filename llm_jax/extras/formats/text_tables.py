"""Readers of records in text: JSON, CSV, TSV, TOML. Each reads compressed files as well, all but TOML as a stream."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Iterator
from typing import Any

from llm_jax.base.errors import DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.encoding import open_utf8
from llm_jax.data.formats.records import to_documents
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.formats.text import BOM, CHUNK, decode_json, json_lines, not_utf8, parse_json
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.extras.formats.delimiters import HEAD, dialect

_SPACE = ' \t\n\r'
_WHOLE_FILE_BYTES = 256 << 20  # limit for formats that cannot be read as a stream


def json_file(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """An array of objects or an object a line, read as a stream; or one object that holds one list of objects, or is
  itself the document.

  A single object is held in memory and may take 256 MB.
  """
  return to_documents(_json_records(file, config), config)


def _json_records(file: File, config: SourceConfig) -> Iterator[tuple[str, str, Any]]:
  with _open_text(file, config) as stream:
    head = stream.read(CHUNK)
    while not head.strip(_SPACE) and (more := stream.read(CHUNK)):
      head = more
    head = head.lstrip(_SPACE)
    if head.startswith('['):
      yield from _json_array(file, stream, head[1:], config.max_record_bytes)
      return
    if '\n' not in head:
      head += stream.readline(max(0, config.max_record_bytes - len(head)))
    head += stream.read(CHUNK)
    if _is_object_a_line(head):
      yield from json_lines(file, config)
      return
    whole = head + stream.read(_WHOLE_FILE_BYTES)
  if not whole:
    return
  if len(whole) > _WHOLE_FILE_BYTES:
    raise DataError(f'{file.path}: one JSON object of more than {_WHOLE_FILE_BYTES >> 20} MB; make it an array of '
                    'objects, or an object a line (.jsonl)')
  value = parse_json(whole.encode('utf-8', 'surrogateescape'), str(file.path))
  if isinstance(value, BadRecord):
    raise DataError(f'{file.path}: {value.why}; if there is an object on each line, set config.data.format to jsonl')
  is_record = not isinstance(value, dict) or config.field in value
  tables = None if is_record else _only_table(file, value)
  yield from [(file.name, str(file.path), value)] if tables is None else tables


def _is_object_a_line(head: str) -> bool:
  """Whether the first line is one object, and another one follows."""
  try:
    _, end = json.JSONDecoder().raw_decode(head)
  except (ValueError, RecursionError):
    return False
  return head[end:].lstrip(' \t\r').startswith('\n') and head[end:].lstrip(_SPACE)[:1] == '{'


def _json_array(file: File, stream: io.TextIOBase, buffer: str, limit: int) -> Iterator[tuple[str, str, Any]]:
  """Items of an array, after its '['. Raises DataError for a malformed item, as the start of the next is unknown."""
  position, behind, number = 0, 0, 1
  while True:
    position = _end_of_space(buffer, position)
    try:
      if buffer.startswith(']', position):
        break
      begin = position
      if number > 1:
        if not buffer.startswith(',', position):
          raise ValueError('expected a comma or ] after the record before')
        begin = _end_of_space(buffer, position + 1)
      value, end = decode_json(json.JSONDecoder.raw_decode, buffer, begin)
      why = None if end < len(buffer) else 'the file ends inside the array'
    except (ValueError, RecursionError) as e:
      why = getattr(e, 'msg', str(e))
    if why:  # perhaps the item is just incomplete: read more, twice as much each time, for linear total cost
      where = f'{file.path}, record {number} (at character {behind + position + 2})'
      held = len(buffer) - position
      if held > limit:
        raise DataError(f'{where}: malformed, or longer than config.data.max_record_bytes, which is {limit} ({why})')
      more = stream.read(max(CHUNK, held))
      if not more:
        raise DataError(f'{where}: malformed or truncated JSON: {why}')
      behind, buffer, position = behind + position, buffer[position:] + more, 0
      continue
    where = f'{file.path}, record {number}'
    yield f'{file.name}:{number}', where, value
    position, number = end, number + 1
  rest = buffer[position + 1:]
  while rest:
    if rest.strip(_SPACE):
      raise DataError(f'{file.path}: more follows the array of {number - 1} records: {rest.strip(_SPACE)[:20]!r}')
    rest = stream.read(CHUNK)


def _end_of_space(text: str, position: int) -> int:
  while position < len(text) and text[position] in _SPACE:
    position += 1
  return position


def toml(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """A list of tables, such as [[examples]] with an input and an output each. Held in memory, 256 MB at most."""
  with open_utf8(file.path, config.encoding) as stream:
    data = stream.read(_WHOLE_FILE_BYTES + 1)
  if len(data) > _WHOLE_FILE_BYTES:
    raise DataError(f'{file.path}: TOML of more than {_WHOLE_FILE_BYTES >> 20} MB; write it as .jsonl')
  try:
    value = tomllib.loads(data.removeprefix(BOM).decode())
  except UnicodeDecodeError as e:
    raise DataError(f'{file.path}: {not_utf8(e, 0)}') from None
  except (ValueError, RecursionError) as e:
    raise DataError(f'{file.path}: malformed TOML: {e}') from None
  tables = _only_table(file, value)
  if tables is None and value:
    raise DataError(f'{file.path}: no list of tables; write each example below a line [[examples]]')
  return to_documents(tables or [], config)


def _only_table(file: File, value: dict[str, Any]) -> list[tuple[str, str, Any]] | None:
  """The records of the one list of objects in `value`. Raises DataError when there are several."""
  lists = [key for key, item in value.items()
           if isinstance(item, list) and item and all(isinstance(x, dict) for x in item)]
  if len(lists) > 1:
    raise DataError(f'{file.path}: several lists of records: {", ".join(lists)}; keep only one per file')
  return [(f'{file.name}:{i}', f'{file.path}, {lists[0]} {i}', record)
          for i, record in enumerate(value[lists[0]], 1)] if lists else None


def csv_file(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """Comma-separated values (RFC 4180), or divided by ; tab or |; the first row names the fields. Labels are text."""
  return to_documents(_rows(file, config, ','), config)


def tsv(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """As csv_file, with tabs, and without quoting unless config.quoting says so. Each record is one line."""
  return to_documents(_rows(file, config, '\t'), config)


def _rows(file: File, config: SourceConfig, delimiter: str) -> Iterator[tuple[str, str, Any]]:
  """Rows as mappings. An unclosed quote would swallow all rows after it, so it raises DataError.

  `delimiter`: the usual one of the format.
  """
  limit = config.max_record_bytes
  # The csv module's limit is global and per field; `taken` limits each record.
  csv.field_size_limit(max(csv.field_size_limit(), limit))
  line, taken = 1, 0

  def lines(stream: io.TextIOBase) -> Iterator[str]:
    nonlocal taken
    while piece := stream.readline(limit + 1):
      taken += len(piece)
      if taken > limit:
        raise DataError(f'{file.path}: the record that begins in line {line} takes more than '
                        f'{limit} bytes: a quote is not closed, or config.data.max_record_bytes is too small')
      yield piece

  with _open_text(file, config) as stream:
    options = dialect(file, config, stream.read(HEAD), delimiter)
  header: list[str] = []
  with _open_text(file, config) as stream:
    rows = csv.reader(lines(stream), **options)
    while True:
      where, name = f'{file.path}, line {line}', f'{file.name}:{line}'
      try:
        row = next(rows, None)
      except csv.Error as e:
        if 'unexpected end of data' in str(e):
          raise DataError(f'{where}: a quote is opened in this record and not closed by the end of the file') from None
        yield name, where, BadRecord(where, f'malformed row: {e}')
        line, taken = rows.line_num + 1, 0
        continue
      if row is None:
        return
      if delimiter == '\t' and rows.line_num > line:
        raise DataError(f'{where}: a quoted record over {rows.line_num - line + 1} lines; a TSV has one record a line: '
                        'set config.data.quoting=none, or if it was written so, config.data.format=csv')
      line, taken = rows.line_num + 1, 0
      if row and not header:
        header = _header(row, where)
      elif row and len(row) != len(header):
        yield name, where, BadRecord(where, f'{len(row)} fields; the header names {len(header)}' + _hint(row, options))
      elif row:
        yield name, where, dict(zip(header, row, strict=True))


def _hint(row: list[str], options: dict[str, Any]) -> str:
  quoted = options['quoting'] == csv.QUOTE_NONE and any(field.count('"') % 2 for field in row)
  return '; if its fields are quoted, set config.data.quoting=minimal' if quoted else ''


def _header(row: list[str], where: str) -> list[str]:
  twice = next((name for name in row if row.count(name) > 1), None)
  if twice is not None:
    raise DataError(f'{where}: the header names the field {twice!r} twice; the first row must name the fields')
  return row


def _open_text(file: File, config: SourceConfig) -> io.TextIOWrapper:
  """The file as text, newlines unchanged; bytes that are not UTF-8 become surrogates, which `to_document` reports."""
  return io.TextIOWrapper(open_utf8(file.path, config.encoding), 'utf-8-sig', 'surrogateescape', newline='')


for _name, _reader in (('json', json_file), ('csv', csv_file), ('tsv', tsv), ('toml', toml)):
  register(FORMATS, _name, _reader, NoSettings)
