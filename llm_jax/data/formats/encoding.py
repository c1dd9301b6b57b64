"""Text in other encodings than UTF-8: what the bytes of a file are, and streams that turn them into UTF-8."""

from __future__ import annotations

import codecs
import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.formats.compression import open_stream, stream_of

HEAD = 1 << 12  # bytes by which the kind of a file is judged
_LEAST = 8  # bytes to judge by
_CHUNK = 1 << 20
_BOMS = ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'), (codecs.BOM_UTF16_LE, 'utf-16'),
         (codecs.BOM_UTF16_BE, 'utf-16'))
# First bytes of what is not text, though its first bytes may look like it.
_MAGIC = (b'%PDF-', b'\x89PNG', b'\xff\xd8\xff', b'GIF8', b'PK\3\4', b'\x7fELF', b'\x1f\x8b\x08', b'ID3', b'OggS',
          b'RIFF', b'wOFF', b'wOF2', b'\0asm', b'\xca\xfe\xba\xbe', b'\xd0\xcf\x11\xe0', b'{\\rtf')
_CONTROL = bytes(i for i in (*range(32), 127) if i not in b'\t\n\v\f\r\b\x1b')
_NOT_CONTROL = bytes(set(range(256)) - set(_CONTROL))


def check_encoding(encoding: str | None) -> None:
  """Raises ConfigError for an unknown encoding."""
  try:
    known = encoding is None or codecs.lookup(encoding)._is_text_encoding
  except (LookupError, ValueError):
    known = False
  if not known:
    raise ConfigError(f'config.data.encoding: {encoding!r} is unknown; set an encoding that Python knows, such as '
                      'utf-16-le, cp1252, latin-1, cp1251, shift_jis or gb18030')


def open_utf8(path: Path, encoding: str | None) -> BinaryIO:
  """The decompressed bytes of a text file, as UTF-8: a byte order mark decides, then whether it is UTF-8 already, then
  `encoding`. Raises DataError for UTF-16 without either."""
  stream = open_stream(path)
  found = _encoding_of(path, stream.peek(HEAD)[:HEAD], encoding)
  return stream if found is None else stream_of(_transcoded(path, found, stream), stream)


def _encoding_of(path: Path, head: bytes, encoding: str | None) -> str | None:
  """The encoding to decode a file by; None: it is UTF-8, or damaged UTF-8 on which its reader reports."""
  if (marked := _marked(head)) is not None:
    return marked
  wide = utf16_of(head)
  if wide is not None:
    if encoding is not None and codecs.lookup(encoding).name.startswith('utf-16'):
      return wide
    raise DataError(f'{path}: is {wide.upper()} text without a byte order mark, and config.data.encoding is {encoding}')
  return encoding if encoding is not None and scan(path).is_other else None


def _transcoded(path: Path, encoding: str, stream: BinaryIO) -> Iterator[bytes]:
  decoder, begin, chunk = codecs.getincrementaldecoder(encoding)(), 0, b'-'
  while chunk:
    chunk = stream.read(_CHUNK)
    try:
      yield decoder.decode(chunk, final=not chunk).encode('utf-8', 'surrogatepass')
    except UnicodeDecodeError as e:
      at = begin + e.start - (len(e.object) - len(chunk))
      raise DataError(f'{path}: not {encoding} text at byte {at} ({e.object[e.start:e.start + 4].hex(" ")}); set '
                      'config.data.encoding to the encoding of this file, or convert it to UTF-8') from None
    begin += len(chunk)


def head_of(path: Path) -> bytes:
  """The first HEAD bytes, decompressed. Raises DataError."""
  try:
    with open_stream(path) as stream:
      return stream.read(HEAD)
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror or e}') from None


def _marked(head: bytes) -> str | None:
  """The encoding that a byte order mark names, other than UTF-8's, which readers skip."""
  return next((name for bom, name in _BOMS if head.startswith(bom)), None)


def utf16_of(head: bytes) -> str | None:
  """'utf-16-le' or 'utf-16-be' if a file begins as such text without a byte order mark: it holds zero bytes, and what
  it decodes to can be printed. UTF-16 of some scripts is also UTF-8; then most high bytes must be the same two."""
  if b'\0' not in head or len(head) < _LEAST or (len(head) < HEAD and len(head) % 2):
    return None
  found = {}
  for name, high in (('utf-16-le', 1), ('utf-16-be', 0)):
    text = codecs.getincrementaldecoder(name)('replace').decode(head)
    plain = ''.join(text.replace('\x1b', '').split())
    common = Counter(head[high::2]).most_common(2)
    one_script = sum(count for _, count in common) > 0.9 * len(head) / 2 and _controls(head) > 0.2
    if '\ufffd' not in text and plain.isprintable() and (one_script or not is_utf8(head)):
      found[name] = sum(c.isspace() or c.isascii() for c in text)
  return max(found, key=found.__getitem__) if found else None


def _controls(head: bytes) -> float:
  """The share of control characters."""
  return len(head.translate(None, _NOT_CONTROL)) / len(head)


def is_utf8(head: bytes) -> bool:
  """Whether the beginning of a file is UTF-8; its last character may be cut."""
  try:
    codecs.getincrementaldecoder('utf-8')().decode(head, final=len(head) < HEAD)
  except UnicodeDecodeError:
    return False
  return True


def is_binary(head: bytes) -> bool:
  """Whether a file that begins so is no text in any encoding: by its first bytes, or by its control characters."""
  if head.startswith(_MAGIC):
    return True
  if (marked := _marked(head)) is not None:
    text = codecs.getincrementaldecoder(marked)('replace').decode(head)
    return sum(c == '\ufffd' or unicodedata.category(c) in ('Cn', 'Co') for c in text) > max(8, 0.05 * len(text))
  if len(head) < _LEAST or utf16_of(head) is not None:
    return False
  return _controls(head) > (0.1 if is_utf8(head) else 0.003)


@dataclasses.dataclass(frozen=True)
class Scan:
  """Counts of a whole file, decoded as UTF-8."""

  num_bad: int  # bytes that are not UTF-8
  num_wide: int  # characters beyond ASCII that are
  num_ascii: int

  @property
  def is_other(self) -> bool:
    """Whether it is text in another encoding, and not UTF-8 with some damage."""
    return self.num_bad > self.num_wide

  @property
  def is_dense(self) -> bool:
    """Whether so many bytes are not ASCII that the script is not Latin."""
    return self.num_bad > 0.6 * self.num_ascii


def scan(path: Path, limit: int | None = None) -> Scan:
  """Reads the file, or `limit` bytes of it. Raises DataError."""
  decode = codecs.getincrementaldecoder('utf-8')('surrogateescape').decode
  begin, num_bad, num_wide, num_ascii = 0, 0, 0, 0
  with open_stream(path) as stream:
    chunk = b'-'
    while chunk:
      chunk = stream.read(_CHUNK if limit is None else min(_CHUNK, limit - begin))
      text = decode(chunk, final=not chunk)
      begin += len(chunk)
      bad, plain = (0, len(text)) if text.isascii() else (
          len(re.findall(kind, text)) for kind in ('[\udc80-\udcff]', '[\0-\x7f]'))
      num_bad, num_ascii, num_wide = num_bad + bad, num_ascii + plain, num_wide + len(text) - bad - plain
  return Scan(num_bad, num_wide, num_ascii)
