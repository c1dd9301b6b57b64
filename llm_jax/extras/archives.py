"""Archives (.zip, .tar, compressed tars), unpacked once into the cache; malicious contents are rejected."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from llm_jax.base.errors import DataError, StorageError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.compression import open_stream
from llm_jax.data.loaders import UNPACKERS
from llm_jax.extras.compression import FREE_BYTES, MAX_RATIO, expands_too_much
from llm_jax.extras.fetch import aside

MAX_FILES = 1_000_000
MAX_NAME_BYTES = 1024
PIECE = 1 << 20
# Exceptions of the libraries for damaged archives.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class Member:
  """One entry of an archive."""

  name: str
  kind: str  # 'file', 'folder', 'link', 'device' or 'sparse file'
  open: Callable[[], Any]  # returns a stream of its bytes


def unpack(path: Path, cache_dir: Path) -> Path:
  """The folder of the unpacked archive, made atomically and once for each size and time of the file.

  Raises DataError for a damaged, truncated or encrypted archive, for names that lead out of the folder, links, devices
  and bombs; StorageError when the folder cannot be written or the disk is full.
  """
  try:
    state = path.stat()
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None
  recipe = f'{path.resolve()} {state.st_size} {state.st_mtime_ns}'
  top = cache_dir / 'unpacked'
  target = top / hashlib.sha256(recipe.encode('utf-8', 'surrogateescape')).hexdigest()[:16]
  if target.is_dir():
    return target
  partial = aside(top)
  try:
    partial.mkdir(parents=True)
    _write(path, partial, state.st_size)
    _rename(partial, target)
  except OSError as e:
    raise StorageError(f'{top}: {path} cannot be unpacked there ({e.strerror or e}); set --config.data.cache_dir or '
                       'LLM_JAX_CACHE to a folder that can be written, with room') from None
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return target


def _rename(partial: Path, target: Path) -> None:
  try:
    os.rename(partial, target)
  except OSError:
    if not target.is_dir():  # otherwise another process has made the same folder
      raise


def _write(path: Path, folder: Path, packed: int) -> None:
  """Writes every member into `folder`, within the limits on files and bytes."""
  room, total = shutil.disk_usage(folder).free, 0
  for count, member in enumerate(_members(path), 1):
    where = f'{path}: member {member.name!r}'
    if count > MAX_FILES:
      raise DataError(f'{where}: exceeds the {MAX_FILES} members that an archive may hold; unpack it yourself and '
                      'pass the folder')
    target = folder / _checked(member, where)
    if member.kind == 'folder':
      _make(target, where)
      continue
    _make(target.parent, where)
    try:
      out = open(target, 'xb')  # noqa: SIM115
    except (FileExistsError, IsADirectoryError):
      raise DataError(f'{where}: has the name of another member') from None
    with out:
      for piece in _pieces(member, where):
        total += len(piece)
        if expands_too_much(packed, total):
          raise DataError(f'{where}: the archive expands to more than {MAX_RATIO} times its size and {FREE_BYTES} '
                          'bytes, like a bomb; if you trust it, unpack it yourself and pass the folder')
        if total > room:
          raise StorageError(f'{folder.parent}: {path} holds more than the {room} bytes that are free; set '
                             '--config.data.cache_dir or LLM_JAX_CACHE to a folder with room')
        out.write(piece)


def _pieces(member: Member, where: str) -> Iterator[bytes]:
  with _data_errors(where), member.open() as stream:
    while piece := stream.read(PIECE):
      yield piece


def _make(folder: Path, where: str) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise DataError(f'{where}: has the name of another member') from None


def _checked(member: Member, where: str) -> PurePosixPath:
  """The member's path relative to the folder. Raises DataError for members that must not be unpacked."""
  parts = member.name.replace('\\', '/').split('/')
  try:
    size = len(member.name.encode())
  except UnicodeEncodeError:
    raise DataError(f'{where}: its name is not UTF-8') from None
  if member.kind not in ('file', 'folder'):
    raise DataError(f'{where}: is a {member.kind}; only files and folders are unpacked')
  if member.name.startswith(('/', '\\')) or parts[0].endswith(':'):
    raise DataError(f'{where}: its name is absolute, which would write outside the folder')
  if '..' in parts:
    raise DataError(f'{where}: its name leads out of the folder')
  if size > MAX_NAME_BYTES or any(len(part.encode()) > 255 for part in parts) or '\0' in member.name:
    raise DataError(f'{where[:300]}: its name is {size} bytes long or holds a zero byte; no file can be named so')
  if member.kind == 'file' and not parts[-1].strip('.'):
    raise DataError(f'{where}: is a file without a name')
  return PurePosixPath(member.name)


@contextlib.contextmanager
def _data_errors(where: str) -> Iterator[None]:
  """Turns errors from reading the archive into DataError."""
  try:
    yield
  except DAMAGE as e:
    raise DataError(f'{where}: truncated or damaged ({e}); get the archive again') from None
  except (NotImplementedError, RuntimeError) as e:  # zipfile raises these for encryption and unknown compression
    raise DataError(f'{where}: cannot be unpacked ({e}); unpack it yourself and pass the folder') from None


def _members(path: Path) -> Iterator[Member]:
  return _zip_members(path) if path.name.lower().endswith('.zip') else _tar_members(path)


def _zip_members(path: Path) -> Iterator[Member]:
  with _data_errors(str(path)):
    archive = zipfile.ZipFile(path)
  with archive:
    if _stated_members(path) not in (len(archive.infolist()) & 0xffff, 0xffff):
      raise DataError(f'{path}: damaged: its end record and directory count different members; get the archive '
                      'again')
    for info in archive.infolist():
      mode = stat.S_IFMT(info.external_attr >> 16)
      kind = {0: 'file', stat.S_IFREG: 'file', stat.S_IFDIR: 'folder', stat.S_IFLNK: 'link'}.get(mode, 'device')
      if info.flag_bits & 1:
        raise DataError(f'{path}: member {info.filename!r}: is encrypted; unpack it yourself and pass the folder')
      yield Member(info.filename, 'folder' if info.is_dir() and kind == 'file' else kind,
                   functools.partial(archive.open, info))


def _stated_members(path: Path) -> int:
  """Number of members in a zip's end record, modulo 65536; 65535: more. zipfile does not check it."""
  with open(path, 'rb') as f:
    f.seek(max(0, path.stat().st_size - (1 << 16) - 22))
    tail = f.read()
  return int.from_bytes(tail[tail.rindex(b'PK\5\6') + 10:][:2], 'little')


def _tar_members(path: Path) -> Iterator[Member]:
  with open_stream(path) as raw:
    stream: Any = _Recent(raw)
    with _data_errors(str(path)):
      archive = tarfile.open(fileobj=stream, mode='r|', bufsize=_Recent.SIZE // 2)  # noqa: SIM115
    end = 0
    while True:
      with _data_errors(str(path)):
        info = archive.next()
      if info is None:
        break
      end = info.offset_data + (-(-info.size // 512) * 512 if info.isreg() else 0)
      kind = 'folder' if info.isdir() else 'link' if info.issym() or info.islnk() else \
          'sparse file' if info.issparse() else 'file' if info.isreg() else 'device'
      yield Member(info.name, kind, functools.partial(archive.extractfile, info))
    # tarfile treats a damaged header, and a cut between two members, as the end. A real end is zeros to the last byte.
    rest, num_zeros = stream.since(end), 0
    while rest and not rest.strip(b'\0'):
      num_zeros += len(rest)
      rest = stream.read(_Recent.SIZE)
    if rest or not num_zeros:
      raise DataError(f'{path} at byte {end} of the tar: truncated or damaged, neither a member nor the end follows; '
                      'get the archive again')


class _Recent:
  """A stream that keeps the last bytes read from it."""

  SIZE = 1 << 17

  def __init__(self, stream: BinaryIO):
    self.stream, self.count, self.recent = stream, 0, b''

  def read(self, size: int) -> bytes:
    data = self.stream.read(size)
    self.count += len(data)
    self.recent = (self.recent + data)[-self.SIZE:]
    return data

  def since(self, position: int) -> bytes:
    return self.recent[max(0, len(self.recent) - (self.count - position)):] if position < self.count else b''


register(UNPACKERS, 'archive', unpack, NoSettings)
