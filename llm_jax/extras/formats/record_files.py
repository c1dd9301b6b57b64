"""Readers of record files: ArrayRecord and TFRecord."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.compression import open_stream
from llm_jax.data.formats.records import to_documents
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.formats.text import parse_json
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig

_AT_ONCE = 64  # records
_CRC_BLOCK = 4096  # bytes
# The schema of tf.train.Example, as a FileDescriptorProto in text format.
_EXAMPLE = '''
name: "example.proto" package: "llm_jax" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Int64List" oneof_index: 0 }
}
message_type { name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Feature" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Entry" } }
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Features" } }
'''


def arrayrecord(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document per record; the first record determines the kind of all, as in tfrecord."""
  return to_documents(_named(file, _array_records(file), config), config)


def tfrecord(file: File, config: SourceConfig) -> Iterator[Document | BadRecord]:
  """One document per record. Checksums are verified, but a file cut between two records looks complete.

  The first record determines the kind of all: a tf.train.Example if it parses as one with features and no unknown
  fields; a JSON object if it parses as one; else UTF-8 text.
  """
  return to_documents(_named(file, _tf_records(file, config), config), config)


def _named(file: File, records: Iterable[bytes | BadRecord], config: SourceConfig) -> Iterator[tuple[str, str, Any]]:
  """(name, where, mapping of fields) of each record. Plain text becomes the field config.field, or 'text'."""
  kind = None
  for i, record in enumerate(records, 1):
    name, where = f'{file.name}:{i}', f'{file.path}, record {i}'
    if isinstance(record, BadRecord):
      yield name, where, BadRecord(where, record.why)
      continue
    kind = kind or _kind(record)
    if kind == 'example':
      fields = _parse_example(record)
      yield name, where, fields if fields else BadRecord(where, 'not a tf.train.Example, as the first record is')
    elif kind == 'json':
      yield name, where, parse_json(record, where)
    else:
      yield name, where, {config.field or 'text': record}


def _kind(record: bytes) -> str:
  if _parse_example(record):
    return 'example'
  return 'json' if isinstance(parse_json(record, ''), dict) else 'text'


def _parse_example(record: bytes) -> dict[str, Any] | None:
  """Features by name; a list of one value as that value, integers always as an array. None: not an Example."""
  from google.protobuf import message

  try:
    example = _example_class().FromString(record)
  except (message.DecodeError, UnicodeDecodeError):
    return None
  if example.SerializeToString() == b'' or _has_unknown(example):
    return None
  return {entry.key: _feature(entry.value) for entry in example.features.feature} or None


def _has_unknown(example: Any) -> bool:
  from google.protobuf import unknown_fields

  parts = [example, example.features, *example.features.feature]
  return any(len(unknown_fields.UnknownFieldSet(part)) for part in parts)


def _feature(feature: Any) -> Any:
  kind = feature.WhichOneof('kind')
  if kind is None:
    return None
  values = list(getattr(feature, kind).value)
  if kind == 'int64_list':
    return np.array(values, np.int64)
  return values[0] if len(values) == 1 else values


@functools.cache
def _example_class() -> Any:
  try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
  except ImportError:
    raise ConfigError("TFRecord files need the package protobuf: pip install 'llm_jax[data]'") from None
  pool = descriptor_pool.DescriptorPool()
  pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('llm_jax.Example'))


def _array_records(file: File) -> Iterator[bytes]:
  try:
    from array_record.python import array_record_module
  except ImportError:
    raise ConfigError('ArrayRecord files need the package array_record: pip install array_record') from None
  if not file.path.is_file():
    raise DataError(f'{file.path}: no such file')
  number = 0
  try:
    reader = array_record_module.ArrayRecordReader(str(file.path), 'readahead_buffer_size:0,max_parallelism:0')
    count = reader.num_records()
    for number in range(0, count, _AT_ONCE):
      yield from reader.read(number, min(number + _AT_ONCE, count))
    if not reader.ok():
      raise ValueError('the reader reported an error')
  except (RuntimeError, ValueError, IndexError, OSError) as e:
    raise DataError(f'{file.path}, after record {number}: damaged or truncated, or not ArrayRecord: '
                    f'{str(e)[:200].splitlines()[0]}') from None


def _tf_records(file: File, config: SourceConfig) -> Iterator[bytes | BadRecord]:
  """The records' bytes. In the file, each has uint64 length, checksum of the length, bytes, checksum of the bytes."""
  with open_stream(file.path) as stream:
    offset = 0
    while header := stream.read(12):
      where = f'{file.path} at byte {offset}'
      if len(header) < 12:
        raise DataError(f'{where}: truncated: it ends inside the head of a record; get the file again')
      length, checksum = struct.unpack('<QI', header)
      if masked_crc32c(header[:8]) != checksum:
        raise DataError(f'{where}: damaged, or not TFRecord: the checksum of a length differs')
      if length > config.max_record_bytes:
        _skip(stream, length + 4, where)
        yield BadRecord(where, f'{length} bytes; config.data.max_record_bytes is {config.max_record_bytes}')
      else:
        data = stream.read(length + 4)
        if len(data) < length + 4:
          raise DataError(f'{where}: truncated: it ends inside a record of {length} bytes; get the file again')
        if masked_crc32c(data[:-4]) != struct.unpack('<I', data[-4:])[0]:
          raise DataError(f'{where}: damaged: the checksum of a record differs; get the file again')
        yield data[:-4]
      offset += 12 + length + 4


def _skip(stream: BinaryIO, count: int, where: str) -> None:
  while count:
    data = stream.read(min(count, 1 << 20))
    if not data:
      raise DataError(f'{where}: truncated: it ends inside a record; get the file again')
    count -= len(data)


def masked_crc32c(data: bytes) -> int:
  """The checksum of TFRecord: CRC-32C, rotated by 15 bits, plus a constant."""
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
  """CRC-32C (Castagnoli, RFC 3720) by blocks: a byte's contribution is looked up by the number of bytes after it."""
  table, crc = _crc_table(), 0xFFFFFFFF
  for begin in range(0, len(data), _CRC_BLOCK):
    block = np.frombuffer(data, np.uint8, min(_CRC_BLOCK, len(data) - begin), begin).copy()
    size = len(block)
    block[:4] ^= np.frombuffer(struct.pack('<I', crc), np.uint8)[:size]
    shares = table[np.arange(size - 1, -1, -1), block]
    crc = int(np.bitwise_xor.reduce(shares)) ^ (crc >> 8 * size if size < 4 else 0)
  return crc ^ 0xFFFFFFFF


@functools.cache
def _crc_table() -> np.ndarray:
  """[following bytes, byte value]: uint32."""
  crc = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    crc = np.where(crc & 1, crc >> 1 ^ np.uint32(0x82F63B78), crc >> 1)
  table = np.empty((_CRC_BLOCK, 256), np.uint32)
  table[0] = crc
  for i in range(1, _CRC_BLOCK):
    table[i] = table[i - 1] >> 8 ^ crc[table[i - 1] & 0xFF]
  return table


register(FORMATS, 'arrayrecord', arrayrecord, NoSettings)
register(FORMATS, 'tfrecord', tfrecord, NoSettings)
