"""Turns records (mappings of fields) into documents: chooses the fields and checks their values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.chat.records import conversation_fields, to_conversation
from llm_jax.data.sources.documents import BadRecord, Content, Document, SourceConfig

# Names of fields for (text, answer); the first pair that a record has is used.
PAIRS = (('input', 'output'), ('prompt', 'completion'), ('question', 'answer'), ('source', 'target'),
         ('instruction', 'response'))


Fields = tuple[str, str | None, str | None]  # the keys of a record that hold text, answer and label


def choose_fields(record: Mapping[str, Any], config: SourceConfig, where: str) -> Fields | None:
  """The fields that the config names, else a known pair, else the only one with text, else the only one with ids.

  None: no field of this record fits; one of the next record may. Raises DataError when several fields fit.
  """
  if config.field is not None:
    return config.field, config.answer_field, config.label_field
  if config.answer_field is None:
    for text, answer in PAIRS:
      if text in record and answer in record and config.label_field not in (text, answer):
        return text, answer, config.label_field
  taken = (config.answer_field, config.label_field)
  for holds in (_is_text, _is_ids):
    names = [name for name, value in record.items() if name not in taken and holds(value)]
    if len(names) == 1:
      return names[0], config.answer_field, config.label_field
    if names:
      raise DataError(f'{where}: several fields could be the text; set config.data.field to one of {", ".join(names)}')
  return None


def to_documents(records: Iterable[tuple[str, str, Any]], config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document per (name, where, record). Fields are chosen at the first record that has any, and then kept.

  A record that is not a mapping is bad; a BadRecord passes through.
  """
  fields = None
  for name, where, record in records:
    if isinstance(record, BadRecord):
      yield record
      continue
    if not isinstance(record, Mapping):
      yield BadRecord(where, f'not an object with named fields but {_show(record)}')
      continue
    if turns := conversation_fields(record, config):
      yield to_conversation(record, turns, name, where, config.max_record_bytes)
      continue
    fields = fields or choose_fields(record, config, where)
    if fields is None:
      yield BadRecord(where, f'no field holds text or a list of token ids; the record has {_names(record)}')
    else:
      yield to_document(record, fields, name, where, config.max_record_bytes)


def to_document(record: Mapping[str, Any], fields: Fields, name: str, where: str,
                max_bytes: int) -> Document | BadRecord:
  """The document of a record, or a BadRecord with the reason."""
  text_key, answer_key, label_key = fields
  try:
    text = content(_get(record, text_key), f'field {text_key!r}', max_bytes)
    answer = content(_get(record, answer_key), f'field {answer_key!r}', max_bytes) if answer_key is not None else None
    label = _label(_get(record, label_key), f'field {label_key!r}') if label_key is not None else None
  except (ValueError, OverflowError) as e:
    return BadRecord(where, str(e))
  return Document(name, text, answer, label)


def content(value: Any, what: str, max_bytes: int) -> Content:
  """The value as text (bytes are decoded as UTF-8) or as ids, int64 [n]. Raises ValueError with the reason."""
  if isinstance(value, str | bytes):
    return _text(value, what, max_bytes)
  if isinstance(value, list | tuple) and all(type(x) is int for x in value):
    try:
      value = np.array(value, np.int64)
    except OverflowError:
      raise ValueError(f'{what} holds an id beyond 64 bits') from None
  if isinstance(value, np.ndarray) and value.dtype.kind in 'iu' and value.ndim == 1:
    if value.size and (value.min() < 0 or value.max() >= 2**63):
      raise ValueError(f'{what} holds the id {value.min() if value.min() < 0 else value.max()}; '
                       'ids must be 0 or more, and below 2**63')
    _check_size(value.nbytes, what, max_bytes)
    return value.astype(np.int64)
  raise ValueError(f'{what} holds {_show(value)}; it must hold text or a list of token ids')


def _text(value: str | bytes, what: str, max_bytes: int) -> str:
  if isinstance(value, bytes):
    _check_size(len(value), what, max_bytes)
    try:
      return value.decode()
    except UnicodeDecodeError as e:
      raise ValueError(f'{what} is not UTF-8 text at byte {e.start} ({value[e.start:e.start + 4].hex(" ")})') from None
  try:
    num_bytes = len(value) if value.isascii() else len(value.encode())
  except UnicodeEncodeError as e:
    raise ValueError(f'{what} holds U+{ord(value[e.start]):04X} at character {e.start}: {_lone(value[e.start])}'
                     ) from None
  _check_size(num_bytes, what, max_bytes)
  return value


def _check_size(num_bytes: int, what: str, max_bytes: int) -> None:
  """Raises ValueError."""
  if num_bytes > max_bytes:
    raise ValueError(f'{what} takes {num_bytes} bytes; config.data.max_record_bytes is {max_bytes}')


def _lone(char: str) -> str:
  """The cause of a surrogate: files are decoded with 'surrogateescape', which maps invalid bytes to U+DC80 and up."""
  code = ord(char)
  return f'the byte {code - 0xDC00:02x} is not UTF-8' if 0xDC80 <= code <= 0xDCFF else 'half of a surrogate pair'


def _label(value: Any, what: str) -> str | float | tuple[float, ...]:
  """Raises ValueError."""
  if isinstance(value, str | bytes):
    return _text(value, what, 1 << 16)
  if isinstance(value, np.ndarray):
    value = value.tolist()
  numbers = value if isinstance(value, list | tuple) else [value]
  if not numbers or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
    raise ValueError(f'{what} holds {_show(value)}; a label is text, a finite number or a list of them')
  return tuple(float(x) for x in numbers) if isinstance(value, list | tuple) else float(value)


def _get(record: Mapping[str, Any], key: str) -> Any:
  if key not in record:
    near = difflib.get_close_matches(key, map(str, record), 1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise ValueError(f'field {key!r} is missing; the record has {_names(record)}{hint}')
  return record[key]


def _is_text(value: Any) -> bool:
  return isinstance(value, str | bytes)


def _is_ids(value: Any) -> bool:
  if isinstance(value, np.ndarray):
    return value.ndim == 1 and value.dtype.kind in 'iu'
  return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


def _names(record: Mapping[str, Any]) -> str:
  names = [str(name) for name in record]
  return ', '.join(names[:12]) + (' ...' if len(names) > 12 else '') if names else 'no fields'


def _show(value: Any) -> str:
  """A short description of a value, for messages."""
  if value is None:
    return 'null'
  if isinstance(value, np.ndarray):
    return f'an array of {value.dtype} {list(value.shape)}'
  text = repr(value)
  return f'{type(value).__name__} {text if len(text) <= 60 else text[:57] + "..."}'
