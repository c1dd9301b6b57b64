"""Writers of the bad-data corpus: each function takes the contents of a file and returns a function that writes it."""

from __future__ import annotations

import io
import json
import os
import pickle
import sqlite3
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

Make = Callable[[Path], Path]  # (folder to write into) -> the path for --path

TEXTS = [f'Document {i} says {i * i}, and nothing else.\n' for i in range(40)]
PROSE = ''.join(TEXTS).encode() * 20
MARKER = 'code_was_run'  # the folder that a payload would make if it ran


class Payload:
  """Unpickling it makes the folder `marker`."""

  def __init__(self, marker: Path):
    self.marker = marker

  def __reduce__(self):
    return os.mkdir, (str(self.marker),)


def raw(name: str, data: bytes | str) -> Make:
  def make(folder: Path) -> Path:
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name
  return make


def bomb(name: str, compress: Callable[[bytes], bytes]) -> Make:
  return lambda folder: raw(name, compress(bytes(1 << 25)))(folder)


def beside(other: Make, make: Make) -> Make:
  return lambda folder: (other(folder), make(folder))[1]


def cut(whole: Make, keep: float = 0.6) -> Make:
  def make(folder: Path) -> Path:
    path = whole(folder)
    os.truncate(path, int(path.stat().st_size * keep))
    return path
  return make


def damaged(whole: Make, at: float = 0.5) -> Make:
  """Changes four bytes, at the share `at` of the file, or -`at` bytes before its end."""
  def make(folder: Path) -> Path:
    path = whole(folder)
    data = bytearray(path.read_bytes())
    begin = int(len(data) * at if at > 0 else len(data) + at)
    data[begin:begin + 4] = bytes(b ^ 0x5A for b in data[begin:begin + 4])
    path.write_bytes(data)
    return path
  return make


def renamed(whole: Make, name: str) -> Make:
  return lambda folder: whole(folder).rename(folder / name)


def within(*makes: Make) -> Make:
  """A folder with the files of all `makes`."""
  def make(folder: Path) -> Path:
    (folder / 'corpus').mkdir()
    for one in makes:
      one(folder / 'corpus')
    return folder / 'corpus'
  return make


def lines(name: str, records: Iterable[object]) -> Make:
  """JSON lines; bytes and texts are written unchanged."""
  return raw(name, b''.join((r if isinstance(r, bytes) else r.encode() if isinstance(r, str) else
                             json.dumps(r).encode()) + b'\n' for r in records))


def amid(*bad: object, at: int = 6) -> list[object]:
  """Good records with bad ones among them; the first bad one is number `at` + 1."""
  records: list[object] = [{'text': text} for text in TEXTS]
  return [*records[:at], *bad, *records[at:]]


def zst(name: str, data: bytes, times: int = 1) -> Make:
  def make(folder: Path) -> Path:
    import zstandard
    with zstandard.open(folder / name, 'wb') as f:
      for _ in range(times):
        f.write(data)
    return folder / name
  return make


def parquet(columns: dict, name: str = 'data.parquet', **types: str) -> Make:
  def make(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet
    table = pyarrow.table({key: pyarrow.array(column, getattr(pyarrow, types[key])() if key in types else None)
                           for key, column in columns.items()})
    pyarrow.parquet.write_table(table, folder / name)
    return folder / name
  return make


def arrow(columns: dict, stream: bool = False) -> Make:
  def make(folder: Path) -> Path:
    import pyarrow
    table = pyarrow.table(columns)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(folder / 'data.arrow', table.schema) as writer:
      writer.write_table(table, max_chunksize=10)
    return folder / 'data.arrow'
  return make


def hdf5(**data: object) -> Make:
  def make(folder: Path) -> Path:
    import h5py
    with h5py.File(folder / 'data.h5', 'w') as f:
      for name, value in data.items():
        f[name] = value
    return folder / 'data.h5'
  return make


def hdf5_bomb(folder: Path) -> Path:
  import h5py
  with h5py.File(folder / 'data.h5', 'w') as f:
    zeros = f.create_dataset('tokens', (1 << 26,), 'i4', chunks=(1 << 22,), compression='gzip')
    chunk = zlib.compress(bytes(1 << 24))
    for begin in range(0, len(zeros), 1 << 22):
      zeros.id.write_direct_chunk((begin,), chunk)
  return folder / 'data.h5'


def hdf5_length(folder: Path) -> Path:
  """The stored length of the third text is 2 GB."""
  import h5py
  path = hdf5(text=['one', 'two', 'three'])(folder)
  with h5py.File(path) as f:
    offset = f['text'].id.get_offset()
  with open(path, 'r+b') as file:
    file.seek(offset + 2 * 16)
    file.write((2 << 30).to_bytes(4, 'little'))
  return path


def npy(array: object, name: str = 'data.npy') -> Make:
  def make(folder: Path) -> Path:
    np.save(folder / name, np.asarray(array), allow_pickle=True)
    return folder / name
  return make


def npz(compress: bool = False, **arrays: np.ndarray) -> Make:
  def make(folder: Path) -> Path:
    (np.savez_compressed if compress else np.savez)(folder / 'data.npz', **arrays)
    return folder / 'data.npz'
  return make


def payload_npy(folder: Path) -> Path:
  array = np.empty(1, object)
  array[0] = Payload(folder / MARKER)
  return npy(array)(folder)


def payload_npz(folder: Path) -> Path:
  array = np.empty(1, object)
  array[0] = Payload(folder / MARKER)
  return npz(tokens=array)(folder)


def payload(name: str, protocol: int = 4) -> Make:
  return lambda folder: raw(name, pickle.dumps(Payload(folder / MARKER), protocol))(folder)


def tfrecord(records: Iterable[bytes]) -> Make:
  def make(folder: Path) -> Path:
    from tensorboard.summary.writer.record_writer import RecordWriter
    with open(folder / 'data.tfrecord', 'wb') as f:
      writer = RecordWriter(f)
      for record in records:
        writer.write(record)
      writer.flush()
    return folder / 'data.tfrecord'
  return make


def arrayrecord(records: Iterable[bytes]) -> Make:
  def make(folder: Path) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter
    writer = ArrayRecordWriter(str(folder / 'data.array_record'), 'group_size:1')
    for record in records:
      writer.write(record)
    writer.close()
    return folder / 'data.array_record'
  return make


def database(*statements: tuple[str, list]) -> Make:
  def make(folder: Path) -> Path:
    connection = sqlite3.connect(folder / 'data.sqlite')
    for statement, rows in statements:
      connection.executemany(statement, rows or [()])
    connection.commit()
    connection.close()
    return folder / 'data.sqlite'
  return make


def zipped(members: dict[str, bytes], mode: int = 0) -> Make:
  def make(folder: Path) -> Path:
    with zipfile.ZipFile(folder / 'data.zip', 'w', zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
      warnings.simplefilter('ignore')  # duplicate names
      for name, data in members.items():
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return folder / 'data.zip'
  return make


def encrypted(whole: Make) -> Make:
  """Sets the flag for encryption in the local and the central header."""
  def make(folder: Path) -> Path:
    path = whole(folder)
    data = bytearray(path.read_bytes())
    for magic, offset in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
      data[data.index(magic) + offset] |= 1
    path.write_bytes(data)
    return path
  return make


def tarred(name: str, data: bytes = PROSE, kind: bytes = tarfile.REGTYPE, link: str = '', ending: str = '.tar') -> Make:
  def make(folder: Path) -> Path:
    mode = {'.tar': 'w', '.tar.gz': 'w:gz', '.tgz': 'w:gz'}[ending]
    with tarfile.open(folder / f'data{ending}', mode) as archive:
      for member, member_kind in (('good.txt', tarfile.REGTYPE), (name, kind)):
        info = tarfile.TarInfo(member)
        info.type, info.linkname, info.size = member_kind, link, len(data) if member_kind == tarfile.REGTYPE else 0
        archive.addfile(info, io.BytesIO(data))
    return folder / f'data{ending}'
  return make


def llmc(magic: int, stated: int, tokens: int) -> bytes:
  header = np.zeros(256, np.int32)
  header[:3] = magic, 1, stated
  return header.tobytes() + np.arange(tokens, dtype=np.uint16).tobytes()


def megatron(lengths: list[int], borders: list[int], dtype: type) -> bytes:
  """Megatron's .idx: `borders` are the first sequence of each document, and the number of sequences."""
  codes = {np.uint8: 1, np.int32: 4, np.int64: 5, np.uint16: 8}
  header = b'MMIDIDX\0\0' + struct.pack('<QBQQ', 1, codes[dtype], len(lengths), len(borders))
  positions = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
  return b''.join([header, np.array(lengths, '<i4').tobytes(), positions.astype('<i8').tobytes(),
                   np.array(borders, '<i8').tobytes()])


def saved_dataset(**changed: str) -> Make:
  """A folder as `datasets` saves it, with some files replaced."""
  def make(folder: Path) -> Path:
    path = arrow({'text': TEXTS}, stream=True)(folder)
    saved = folder / 'saved'
    saved.mkdir()
    path.rename(saved / 'data.arrow')
    (saved / 'dataset_info.json').write_text('{}')
    (saved / 'state.json').write_text(json.dumps({'_data_files': [{'filename': 'data.arrow'}]}))
    for name, text in changed.items():
      (saved / name.replace('__', '.')).write_text(text)
    return saved
  return make
