"""Turns records (mappings of fields) into documents, and checks the values of the fields that are used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.data.chat.records import to_conversation, turn_fields
from llm_jax.data.formats.fields import (
  SYSTEM,
  Fields,
  choose_fields,
  is_texts,
  join_text,
  left_over,
  lookup,
  missing,
  no_text,
)
from llm_jax.data.sources.documents import BadRecord, Content, Document, SourceConfig, unescaped

# In place of the value of a key that a JSON object has twice.
TWICE = object()


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
    if turns := turn_fields(record, config):
      yield to_conversation(record, turns, name, where, config)
      continue
    fields = fields or choose_fields(record, config, where)
    if fields is None:
      yield BadRecord(where, no_text(record))
    else:
      document = to_document(record, fields, name, where, config)
      rest = left_over(record, fields)
      yield document if rest is None or isinstance(document, BadRecord) else BadRecord(where, rest)


def to_document(record: Mapping[str, Any], fields: Fields, name: str, where: str,
                config: SourceConfig) -> Document | BadRecord:
  """The document of a record, or a BadRecord with the reason."""
  try:
    parts = _parts(record, fields, config)
    text = next(iter(parts.values())) if len(parts) == 1 else _joined(parts, config)
    answer = None if fields.answer is None else _content_at(record, fields.answer, config)
    label = None if fields.label is None else _label(_get(record, fields.label), f'field {fields.label!r}')
  except (ValueError, OverflowError) as e:
    return BadRecord(where, str(e))
  asked = None
  if answer is not None and len(parts) > 1 and not parts.keys().isdisjoint(SYSTEM):
    asked = (_joined({path: part for path, part in parts.items() if path in SYSTEM}, config),
             _joined({path: part for path, part in parts.items() if path not in SYSTEM}, config))
  return Document(name, text, answer, label, asked=asked)


def _parts(record: Mapping[str, Any], fields: Fields, config: SourceConfig) -> dict[str, Content]:
  """What the text consists of, by field. Raises ValueError."""
  if len(fields.required) == 1 and fields.optional.isdisjoint(record):
    return {fields.required[0]: _content_at(record, fields.required[0], config)}
  return {path: _content_at(record, path, config) for path in fields.text
          if path not in fields.optional or record.get(path)}


def _joined(parts: Mapping[str, Content], config: SourceConfig) -> str:
  """Raises ValueError."""
  for path, part in parts.items():
    if not isinstance(part, str):
      raise ValueError(f'field {path!r} holds token ids, which cannot be joined with other fields')
  return join_text(config).join(part for part in parts.values() if part)  # type: ignore[misc]


def _content_at(record: Mapping[str, Any], path: str, config: SourceConfig) -> Content:
  """Raises ValueError."""
  value: Any = record.get(path)
  kind = type(value)  # most texts are returned at once
  if kind is str and value.isascii() and len(value) <= config.max_record_bytes:
    return value
  if kind is bytes and len(value) <= config.max_record_bytes:
    try:
      return value.decode()
    except UnicodeDecodeError:  # reported below
      pass
  what = f'field {path!r}'
  if value is None or value is TWICE:
    value = _get(record, path)
  if type(value) in (list, tuple) and is_texts(value):
    if config.join is None:
      raise ValueError(f"{what} holds a list of texts; set config.data.join to the text between them, such as '\\n'")
    value = unescaped(config.join).join(_text(item, what, config.max_record_bytes) for item in value)
  return content(value, what, config.max_record_bytes)


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


def _get(record: Mapping[str, Any], path: str) -> Any:
  """Raises ValueError."""
  try:
    value = lookup(record, path)
  except KeyError:
    raise ValueError(missing(record, path)) from None
  if value is TWICE:
    raise ValueError(f'key {path!r} is given twice')
  return value


def _show(value: Any) -> str:
  """A short description of a value, for messages."""
  if value is None:
    return 'null'
  if isinstance(value, float) and not math.isfinite(value):
    return json.dumps(value)  # 'NaN', as in the file
  if isinstance(value, np.ndarray):
    return f'an array of {value.dtype} {list(value.shape)}'
  text = repr(value)
  return f'{type(value).__name__} {text if len(text) <= 60 else text[:57] + "..."}'
