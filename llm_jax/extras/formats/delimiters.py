"""The delimiter and quoting of a table in text: given by the config, or found by the header and the first rows."""

from __future__ import annotations

import csv
import io
from typing import Any

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.notes import print_once
from llm_jax.data.sources.documents import File, SourceConfig, unescaped

DELIMITERS = {',': ',', ';': ';', '\t': 'tab', '|': '|'}  # with their names in messages
HEAD = 1 << 16  # characters that decide
ROWS = 50


def dialect(file: File, config: SourceConfig, head: str, usual: str) -> dict[str, Any]:
  """Options for csv.reader. `head`: the first HEAD characters; `usual`: the delimiter that the file's ending promises.

  Raises DataError if the head allows several delimiters, ConfigError for a setting that cannot be one.
  """
  quoting = config.quoting or ('none' if usual == '\t' else 'minimal')
  options = {'quoting': csv.QUOTE_NONE if quoting == 'none' else csv.QUOTE_MINIMAL, 'strict': True}
  if config.delimiter is not None:
    given = {'tab': '\t'}.get(config.delimiter, unescaped(config.delimiter))
    if len(given) != 1 or given in '"\r\n':
      raise ConfigError(f'config.data.delimiter: {config.delimiter!r} must be one character, or tab, and no quote or '
                        'new line')
    return options | {'delimiter': given}
  found = _find(file, head, usual, options)
  if found != usual:
    print_once(f'data: {file.path}: the delimiter is {DELIMITERS[found]}')
  return options | {'delimiter': found}


def _find(file: File, head: str, usual: str, options: dict[str, Any]) -> str:
  """The delimiter that divides the header and all first rows into the same number of fields, two or more.

  None of the others may divide each of these lines too.
  """
  widths = {delimiter: _widths(head, options | {'delimiter': delimiter}) for delimiter in DELIMITERS}
  even = [delimiter for delimiter, counts in widths.items() if counts and counts[0] > 1 and set(counts) == {counts[0]}]
  rivals = [delimiter for delimiter, counts in widths.items() if counts and min(counts) > 1]
  if len(even) == 1 and rivals == even:
    return even[0]
  header = widths[usual][0] if widths[usual] else 1
  inside = [delimiter for delimiter, counts in widths.items() if delimiter != usual and counts and counts[0] > 1]
  if not even and (header > 1 or not inside):  # uneven rows are reported one by one
    return usual
  names = ' and '.join(DELIMITERS[delimiter] for delimiter in (rivals if even else inside))
  why = (f'{names} each divide its header and its first rows' if even else
         f'its header holds {names}, and the rows have different numbers of fields')
  raise DataError(f'{file.path}: the delimiter is in doubt: {why}; set config.data.delimiter to one of '
                  f'{" ".join(DELIMITERS.values())}')


def _widths(head: str, options: dict[str, Any]) -> list[int]:
  """The number of fields in the header and in the first rows; a row that may go on after the head does not count."""
  counts = []
  try:
    for row in csv.reader(io.StringIO(head, newline=''), **options):
      if row:
        counts.append(len(row))
      if len(counts) > ROWS:
        break
  except csv.Error:  # a malformed row; its place is reported when it is read
    pass
  else:
    if len(head) >= HEAD and len(counts) <= ROWS:
      counts = counts[:-1] or counts
  return counts
