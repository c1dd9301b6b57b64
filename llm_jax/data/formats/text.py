"""Readers of plain text and of JSON lines. Both read compressed files as well, as a stream."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from llm_jax.data.formats.encoding import open_utf8
from llm_jax.data.formats.records import TWICE, to_documents
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig

CHUNK = 1 << 20
BOM = b'\xef\xbb\xbf'


def text(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """Text, unchanged but for a byte order mark at the start: one document, or several between separators.

  A file longer than config.max_record_bytes is read in pieces; a document between separators must not be longer.
  """
  return _separated_text(file, config, config.separator) if config.separator else _whole_text(file, config)


def _whole_text(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document in pieces, which end after a newline, or after any character if there is none."""
  limit = max(config.max_record_bytes, 8)  # room for two characters, the last of which may be cut
  with open_utf8(file.path, config.encoding) as stream:
    piece = _skip_bom(stream, limit)
    if len(piece) == limit and (bad := _first_bad_byte(file, config)) is not None:
      # Searched before the first piece is yielded: no part of a damaged document may be used.
      yield BadRecord(str(file.path), bad)
      return
    continues = False
    while piece:
      cut = len(piece) if len(piece) < limit else piece.rfind(b'\n') + 1 or _last_character(piece)
      try:
        yield Document(file.name, piece[:cut].decode(), continues=continues)
      except UnicodeDecodeError as e:
        yield BadRecord(str(file.path), not_utf8(e, 0))
        return
      piece, continues = piece[cut:], True
      piece += stream.read(limit - len(piece))


def _skip_bom(stream: BinaryIO, count: int) -> bytes:
  first = stream.read(count)
  return first.removeprefix(BOM) + stream.read(len(BOM)) if first.startswith(BOM) else first


def _last_character(piece: bytes) -> int:
  """Start of the last character, which may be incomplete; continuation bytes of UTF-8 are 10xxxxxx."""
  cut = len(piece) - 1
  while piece[cut] & 0xC0 == 0x80:
    cut -= 1
  return cut


def _separated_text(file: File, config: SourceConfig, separator: str) -> Iterator[Document | BadRecord]:
  for i, (begin, document) in enumerate(_split(file, separator.encode(), config), 1):
    where = f'{file.path} at byte {begin}'
    if document is None:
      yield BadRecord(where, _too_long('document', config))
    elif document:
      try:
        yield Document(f'{file.name}:{i}', document.decode())
      except UnicodeDecodeError as e:
        yield BadRecord(where, not_utf8(e, begin))


def _split(file: File, separator: bytes, config: SourceConfig) -> Iterator[tuple[int, bytes | None]]:
  """(offset, bytes) of each part between separators; None in place of parts longer than max_record_bytes."""
  limit = config.max_record_bytes
  with open_utf8(file.path, config.encoding) as stream:
    begin, rest, too_long = 0, b'', False
    while chunk := stream.read(CHUNK):
      if begin == 0 and not rest and chunk.startswith(BOM):
        chunk, begin = chunk[len(BOM):], len(BOM)
      *whole, rest = (rest + chunk).split(separator)
      for part in whole:
        yield begin, None if too_long or len(part) > limit else part
        begin, too_long = begin + len(part) + len(separator), False
      if len(rest) > limit + len(separator):
        # Too long: drop what was read, except bytes that may start a separator.
        dropped = len(rest) - len(separator)
        begin, rest, too_long = begin + dropped, rest[dropped:], True
    yield begin, None if too_long or len(rest) > limit else rest


def jsonl(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One JSON object a line (NDJSON); blank lines are skipped."""
  return to_documents(json_lines(file, config), config)


def json_lines(file: File, config: SourceConfig) -> Iterator[tuple[str, str, Any]]:
  for i, (_, line) in enumerate(_split(file, b'\n', config), 1):
    name, where = f'{file.name}:{i}', f'{file.path}, line {i}'
    if line is None:
      yield name, where, BadRecord(where, _too_long('line', config))
    elif line.strip():
      yield name, where, parse_json(line, where)


def parse_json(data: bytes, where: str) -> Any:
  """The value of one JSON text, or a BadRecord. What is odd in a field matters where the field is used."""
  try:
    return decode_json(json.JSONDecoder.decode, data.decode())
  except UnicodeDecodeError as e:
    return BadRecord(where, not_utf8(e, 0))
  except json.JSONDecodeError as e:
    return BadRecord(where, f'malformed JSON: {e.msg} at character {e.pos + 1}')
  except RecursionError as e:  # deep nesting
    return BadRecord(where, f'JSON cannot be read: {e}')


def decode_json(method: Callable[..., Any], *args: Any) -> Any:
  """`method` of a JSON decoder that reads NaN and Infinity as floats, and puts TWICE for keys that are given twice."""
  try:
    return method(_DECODER, *args)
  except json.JSONDecodeError:
    raise
  except ValueError:  # an integer of thousands of digits
    return method(_DECODER_OF_LONG_NUMBERS, *args)


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  record = dict(pairs)
  if len(record) < len(pairs):
    keys = [key for key, _ in pairs]
    record |= {key: TWICE for key in record if keys.count(key) > 1}
  return record


def _number(digits: str) -> int | float:
  return int(digits) if len(digits) < 1000 else float(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_marked)
_DECODER_OF_LONG_NUMBERS = json.JSONDecoder(object_pairs_hook=_marked, parse_int=_number)


def _first_bad_byte(file: File, config: SourceConfig) -> str | None:
  """The message for the first byte of the file that is not UTF-8; None: all are."""
  decode, begin = codecs.getincrementaldecoder('utf-8')().decode, 0
  with open_utf8(file.path, config.encoding) as stream:
    while True:
      chunk = stream.read(CHUNK)
      try:
        decode(chunk, final=not chunk)
      except UnicodeDecodeError as e:
        # The decoder prepends the bytes of an incomplete character from the chunk before.
        return not_utf8(e, begin - (len(e.object) - len(chunk)))
      if not chunk:
        return None
      begin += len(chunk)


def not_utf8(error: UnicodeDecodeError, offset: int) -> str:
  found = error.object[error.start:error.start + 4].hex(' ')
  return f'not UTF-8 text at byte {offset + error.start} ({found}); convert it to UTF-8'


def _too_long(what: str, config: SourceConfig) -> str:
  return f'the {what} is longer than config.data.max_record_bytes, which is {config.max_record_bytes}'
