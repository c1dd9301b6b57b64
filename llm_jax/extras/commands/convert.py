"""Converts a pickle of plain data to Parquet without running its code.

  llm-jax data convert old.pkl new.parquet
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError, DataError, StorageError
from llm_jax.base.process import run_as_program

if TYPE_CHECKING:
  import numpy as np

_SHAPES = 'a list of texts, pairs, dicts or integer arrays, or a dict of lists of one length'


def columns_of(value: Any) -> dict[str, list]:
  """Columns of a table: texts become `text`, pairs `input` and `output`, lists of integers `tokens`, dicts their keys.

  Raises DataError when `value` is none of these.
  """
  import numpy as np
  if isinstance(value, np.ndarray):
    value = list(value) if value.ndim == 2 else [value]
  if isinstance(value, dict) and value and all(isinstance(column, list | np.ndarray) for column in value.values()):
    columns = {name: list(column) for name, column in value.items()}
  elif not isinstance(value, list) or not value:
    raise DataError(f'holds {_name(value)}; it must be {_SHAPES}')
  elif all(isinstance(row, dict) for row in value):
    names = dict.fromkeys(name for row in value for name in row)
    columns = {name: [row.get(name) for row in value] for name in names}
  elif all(isinstance(row, str) for row in value):
    columns = {'text': value}
  elif all(_is_ids(row) for row in value):
    columns = {'tokens': [_int64(row) for row in value]}
  elif all(isinstance(row, list | tuple) and len(row) == 2 for row in value):
    columns = {'input': [row[0] for row in value], 'output': [row[1] for row in value]}
  else:
    raise DataError(f'holds a list of {_name(value[0])}; it must be {_SHAPES}, with all items of one kind')
  if not all(isinstance(name, str) for name in columns) or len({len(column) for column in columns.values()}) != 1:
    raise DataError(f'holds columns whose names are not text or whose lengths differ; it must be {_SHAPES}')
  return columns


def write_parquet(columns: dict[str, list], path: Path) -> int:
  """Writes the table atomically and returns its number of rows. Raises DataError, StorageError."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise ConfigError("Parquet needs the package pyarrow: pip install 'llm_jax[data]'") from None
  arrays = {name: _arrow_array(name, column, pyarrow) for name, column in columns.items()}
  table = pyarrow.table(arrays)
  aside = path.with_name(f'{path.name}.{os.getpid()}.partial')
  try:
    pyarrow.parquet.write_table(table, aside)
    os.replace(aside, path)
  except OSError as e:
    raise StorageError(f'{path}: cannot be written: {e.strerror or e}') from None
  finally:
    aside.unlink(missing_ok=True)
  return table.num_rows


def _arrow_array(name: str, column: list, pyarrow: Any) -> Any:
  try:
    return pyarrow.array(column)
  except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as e:
    raise DataError(f'column {name!r}: its values do not fit into one type: {" ".join(str(e).split())[:200]}') from None


def _is_ids(row: Any) -> bool:
  import numpy as np
  if isinstance(row, np.ndarray):
    return row.ndim == 1 and row.dtype.kind in 'iu'
  return isinstance(row, list) and all(type(x) is int for x in row)


def _int64(row: np.ndarray | list[int]) -> np.ndarray:
  import numpy as np
  ids = np.asarray(row)
  if ids.size and (ids.dtype.kind not in 'iu' or ids.max() > np.iinfo(np.int64).max):
    raise DataError('holds integers beyond 64 bits')
  return ids.astype(np.int64)


def _name(value: Any) -> str:
  import numpy as np
  return f'{value.dtype} {list(value.shape)}' if isinstance(value, np.ndarray) else type(value).__name__


def parser() -> flags.Parser:
  parser = flags.Parser('data convert', __doc__)
  parser.add_argument('input', type=Path, help='a pickle of plain data; its code is not executed')
  parser.add_argument('output', type=Path, help='the Parquet file to write')
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  from llm_jax.extras.formats.pickles import load_plain
  if args.output.exists():
    raise ConfigError(f'{args.output}: exists; delete it, or give another file')
  value = load_plain(args.input)
  try:
    num_rows = write_parquet(columns_of(value), args.output)
  except DataError as e:
    raise DataError(f'{args.input}: {e}') from None
  print(f'{args.output}: {num_rows} rows')


if __name__ == '__main__':
  run_as_program(main)
