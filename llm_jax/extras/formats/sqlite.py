"""Reader of SQLite databases, by the standard library's module; only reading is allowed."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.records import to_documents
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_TEXT_TYPES = ('CHAR', 'CLOB', 'TEXT')  # a declared type that contains one is text (SQLite's affinity)


def sqlite(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document per row of config.query, or of the only table with a text column; the columns are the fields.

  Raises ConfigError for a query that is invalid or does more than read.
  """
  return to_documents(_rows(file, config), config)


def _rows(file: File, config: SourceConfig) -> Iterator[tuple[str, str, Any]]:
  try:
    with contextlib.closing(_open(file)) as database:
      _check_size(file, database)
      query = config.query or _only_table(file, database)
      rows = _run(file, database, query)
      columns = [column[0] for column in rows.description]
      twice = next((name for name in columns if columns.count(name) > 1), None)
      if twice is not None:
        raise ConfigError(f'config.data.query: two columns are called {twice!r}; rename one of them with AS')
      for i, row in enumerate(rows, 1):
        yield f'{file.name}:{i}', f'{file.path}, row {i}', dict(zip(columns, row, strict=True))
  except sqlite3.Error as e:
    raise DataError(f'{file.path}: cannot be read as an SQLite database: {e}') from None


def _open(file: File) -> sqlite3.Connection:
  database = sqlite3.connect(f'file:{quote(str(file.path.absolute()))}?mode=ro', uri=True)
  # Bytes that are not UTF-8 become surrogates, which `to_document` reports with their row.
  database.text_factory = lambda data: data.decode('utf-8', 'surrogateescape')
  return database


def _check_size(file: File, database: sqlite3.Connection) -> None:
  """Raises DataError for an incomplete last page, which SQLite fills with zeros; it reports missing pages itself."""
  page_size = database.execute('PRAGMA page_size').fetchone()[0]
  size = file.path.stat().st_size
  if size % page_size:
    raise DataError(f'{file.path}: truncated: {size} bytes is not a multiple of its page size, {page_size}')


def _run(file: File, database: sqlite3.Connection, query: str) -> sqlite3.Cursor:
  """The query's rows, under an authorizer that allows nothing but reading."""
  database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
  try:
    rows = database.execute(query)
  except (sqlite3.OperationalError, sqlite3.DatabaseError, sqlite3.Warning) as e:
    # 1: invalid SQL; 23: not authorized. Other errors are caused by the file.
    if getattr(e, 'sqlite_errorcode', 1) & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_AUTH):
      raise ConfigError(f'config.data.query {query!r} on {file.path}: {e}; it must be one SELECT, which only '
                        'reads') from None
    raise
  if rows.description is None:
    raise ConfigError(f'config.data.query {query!r}: gives no rows; it must be one SELECT')
  return rows


def _only_table(file: File, database: sqlite3.Connection) -> str:
  """A query for the only table with a text column. Raises DataError."""
  names = [name for (name,) in database.execute(
      "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name")]
  with_text = [name for name in names if any(
      word in declared.upper()
      for (declared,) in database.execute('SELECT type FROM pragma_table_info(?)', (name,)) for word in _TEXT_TYPES)]
  if len(with_text) != 1:
    found = f'tables with text: {", ".join(with_text)}' if with_text else f'tables: {", ".join(names) or "none"}'
    raise DataError(f'{file.path}: expected one table with a text column, found {found}; set config.data.query to a '
                    'SELECT')
  quoted = with_text[0].replace('"', '""')
  return f'SELECT * FROM "{quoted}"'


register(FORMATS, 'sqlite', sqlite, NoSettings)
