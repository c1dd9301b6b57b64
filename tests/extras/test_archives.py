"""Archives are unpacked completely, or give one error and leave no files; nothing is written outside the folder."""

import errno
import io
import os
import random
import tarfile
import zipfile

import pytest

from llm_jax.base.errors import DataError, StorageError
from llm_jax.extras import archives
from llm_jax.extras.archives import unpack

FILES = {'a.txt': b'ay', 'sub/b.bin': bytes(range(256)) * 400, 'sub/deep/empty': b'', 'sub/zeros': bytes(3000),
         'é 中.txt': b'sea', 'x' * 150 + '.txt': b'a name that needs a header of its own', 'last/zeros': bytes(5000)}
KINDS = ['zip', 'tar', 'tar.gz', 'tar.bz2', 'tar.xz', 'tar.zst']


def write(path, members, **options):
  """Writes an archive of [(name, body or function from entry to body)] with the real libraries."""
  kind = path.name.partition('.')[2]
  if kind == 'zip':
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      for name, body in members:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        body = body(info) if callable(body) else body
        archive.writestr(info, body)
    return path
  packed = kind.partition('.')[2]
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode='w:' + packed.replace('zst', ''), **options) as archive:
    for name, body in members:
      info = tarfile.TarInfo(name)
      body = body(info) if callable(body) else body
      info.size = len(body)
      archive.addfile(info, io.BytesIO(body))
  body = raw.getvalue()
  if packed == 'zst':
    body = pytest.importorskip('zstandard').compress(body)
  path.write_bytes(body)
  return path


def contents(folder):
  return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def rejected(path, cache, match, error=DataError):
  with pytest.raises(error, match=match) as e:
    unpack(path, cache)
  assert str(path) in str(e.value)
  assert not [p for p in cache.rglob('*') if p.name != 'unpacked'], 'files were left behind'


@pytest.fixture
def cache(tmp_path):
  yield tmp_path / 'cache'
  assert {p.name for p in tmp_path.iterdir()} <= {'cache', *(f'a.{kind}' for kind in KINDS)}, 'written outside'


@pytest.mark.parametrize('kind', KINDS)
def test_an_archive_is_unpacked_once(kind, tmp_path, cache):
  folder = unpack(write(tmp_path / f'a.{kind}', FILES.items()), cache)
  assert contents(folder) == FILES
  assert not os.access(folder / 'a.txt', os.X_OK)
  (folder / 'a.txt').unlink()
  assert unpack(tmp_path / f'a.{kind}', cache) == folder
  assert not (folder / 'a.txt').exists(), 'unpacked again'
  other = unpack(write(tmp_path / f'a.{kind}', [('a.txt', b'changed')]), cache)
  assert contents(other) == {'a.txt': b'changed'}
  assert {p.name for p in (cache / 'unpacked').iterdir()} == {folder.name, other.name}


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_unpacked(form, tmp_path, cache):
  files = {name: body for name, body in FILES.items() if len(name) < 100 or form != tarfile.USTAR_FORMAT}
  assert contents(unpack(write(tmp_path / 'a.tar', files.items(), format=form), cache)) == files


def typed(kind, target=''):
  def make(info):
    if isinstance(info, zipfile.ZipInfo):
      info.external_attr = {tarfile.SYMTYPE: 0o120777, tarfile.CHRTYPE: 0o020666}[kind] << 16
      return target.encode()
    info.type, info.linkname = kind, target
    return b''
  return make


@pytest.mark.parametrize('kind', ['zip', 'tar', 'tar.gz'])
@pytest.mark.parametrize(('name', 'body', 'match'), [
    ('../evil', b'x', r"'\.\./evil'.*leads out"), ('sub/../../evil', b'x', 'leads out'), ('..', b'x', 'leads out'),
    ('..\\evil', b'x', 'leads out'), ('/tmp/evil', b'x', 'absolute'), ('C:\\evil', b'x', 'absolute'),
    ('link', typed(tarfile.SYMTYPE, '/etc/passwd'), "'link': is a link"), ('./.', b'x', 'without a name'),
    ('device', typed(tarfile.CHRTYPE), 'is a device'), ('a.txt', b'again', "'a.txt'.*another member"),
    ('a.txt/below', b'x', 'another member'), ('folder', b'x', 'another member'),
    ('y' * 256, b'x', 'no file can be named'), ('deep/' * 250, b'x', 'no file can be named')])
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_malicious_members_are_rejected(kind, name, body, match, tmp_path, cache):
  members = [('a.txt', b'ay'), ('folder/b.txt', b'bee'), (name, body), ('c.txt', b'sea')]
  rejected(write(tmp_path / f'a.{kind}', members), cache, match)


@pytest.mark.parametrize(('kind', 'match'), [(tarfile.LNKTYPE, 'link'), (tarfile.FIFOTYPE, 'device'),
                                             (tarfile.BLKTYPE, 'device'), (tarfile.GNUTYPE_SPARSE, 'sparse')])
def test_links_and_devices_in_tars_are_rejected(kind, match, tmp_path, cache):
  rejected(write(tmp_path / 'a.tar', [('a.txt', b'ay'), ('b', typed(kind, 'a.txt'))]), cache, match)


def test_a_tar_name_that_is_not_utf8_is_rejected(tmp_path, cache):
  rejected(write(tmp_path / 'a.tar', [('caf\udce9', b'x')], errors='surrogateescape', format=tarfile.GNU_FORMAT), cache,
          'not UTF-8')


@pytest.mark.parametrize('kind', ['zip', 'tar.gz', 'tar.zst', 'tar.xz', 'tar.bz2'])
def test_bombs_are_rejected(kind, tmp_path, cache):
  path = write(tmp_path / f'a.{kind}', [('a.txt', b'ay'), ('bomb', bytes(30 << 20))])
  assert path.stat().st_size < 100_000
  rejected(path, cache, 'bomb')


def test_a_bomb_of_many_files_is_rejected(tmp_path, cache):
  rejected(write(tmp_path / 'a.zip', [(f'{i}', bytes(1 << 20)) for i in range(30)]), cache, 'bomb')


def test_a_small_archive_of_zeros_is_no_bomb(tmp_path, cache):
  assert len(contents(unpack(write(tmp_path / 'a.zip', [('a', bytes(10 << 20))]), cache))['a']) == 10 << 20


def test_too_many_files_are_rejected(tmp_path, cache, monkeypatch):
  monkeypatch.setattr(archives, 'MAX_FILES', 50)
  path = write(tmp_path / 'a.tar', [(f'{i}', b'') for i in range(50)])
  assert len(contents(unpack(path, cache))) == 50
  for p in cache.rglob('*/*/*'):
    p.unlink()
  next((cache / 'unpacked').iterdir()).rmdir()
  rejected(write(tmp_path / 'a.tar', [(f'{i}', b'') for i in range(51)]), cache, "'50': exceeds the 50 members")


def test_an_archive_larger_than_the_disk_is_rejected(tmp_path, cache, monkeypatch):
  # A test cannot fill the disk, but it can change the reported free space.
  monkeypatch.setattr(archives.shutil, 'disk_usage', lambda _: type('Usage', (), {'free': 100_000}))
  rejected(write(tmp_path / 'a.tar', FILES.items()), cache, 'more than the 100000 bytes that are free', StorageError)


def test_an_encrypted_archive_is_rejected(tmp_path, cache):
  path = write(tmp_path / 'a.zip', [('a.txt', b'ay')])
  body = bytearray(path.read_bytes())
  body[6] |= 1  # the flag in the member's own header
  body[body.index(b'PK\1\2') + 8] |= 1  # and in the directory
  path.write_bytes(body)
  rejected(path, cache, "'a.txt': is encrypted")


@pytest.mark.parametrize('kind', KINDS)
def test_an_archive_truncated_anywhere_is_rejected(kind, tmp_path, cache):
  path = write(tmp_path / f'a.{kind}', FILES.items())
  body = path.read_bytes()
  end = len(body.rstrip(b'\0')) if kind == 'tar' else len(body)
  cuts = {0, 1, 100, 511, 512, 513, end - 1, *random.Random(0).sample(range(end), 25)}
  if kind == 'tar':  # also between members, where a reader might assume the end
    with tarfile.open(path) as archive:
      cuts |= {at for info in archive for at in (info.offset, info.offset_data)}
      cuts.add(max(cuts) + 5120)  # inside the last member, whose zeros look like the end of the archive
  for cut in cuts:
    path.write_bytes(body[:cut])
    rejected(path, cache, 'damaged|truncated|empty|bomb')


@pytest.mark.parametrize('kind', ['zip', 'tar', 'tar.gz'])
def test_a_damaged_archive_gives_an_error_or_every_file(kind, tmp_path, cache):
  path = write(tmp_path / f'a.{kind}', [('a', b'some text'), ('b/c', os.urandom(600)), ('d', b'last')])
  body, rng, errors = path.read_bytes(), random.Random(0), 0
  for _ in range(150):
    changed = bytearray(body)
    for _ in range(rng.choice([1, 1, 4])):
      changed[rng.randrange(len(body))] = rng.randrange(256)
    path.write_bytes(changed)
    try:
      found = contents(unpack(path, cache))
    except DataError as e:
      assert str(path) in str(e)
      errors += 1
    else:
      assert len(found) == 3, found
  assert errors > 20


def test_a_zip_with_a_shortened_directory_is_rejected(tmp_path, cache):
  path = write(tmp_path / 'a.zip', [('a', b'x'), ('b', b'y'), ('c', b'z')])
  body = bytearray(path.read_bytes())
  at = body.rindex(b'PK\5\6') + 12  # size and start of the directory: its first entry is removed
  size, begin = (int.from_bytes(body[i:i + 4], 'little') for i in (at, at + 4))
  entry = body.index(b'PK\1\2', begin + 4) - begin
  body[at:at + 8] = (size - entry).to_bytes(4, 'little') + (begin + entry).to_bytes(4, 'little')
  path.write_bytes(body)
  with zipfile.ZipFile(path) as archive:
    assert archive.namelist() == ['b', 'c']
  rejected(path, cache, 'count different members')


def test_a_tar_with_a_damaged_header_is_rejected(tmp_path, cache):
  path = write(tmp_path / 'a.tar', [('a', b'x'), ('b', b'y'), ('c', b'z')])
  body = bytearray(path.read_bytes())
  body[1024 + 150] ^= 1  # the checksum of the second header
  path.write_bytes(body)
  rejected(path, cache, 'at byte 1024 of the tar')


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz'])
def test_a_file_that_is_no_archive_is_rejected(name, tmp_path, cache):
  for body in (b'', b'plain text', b'text ' * 1000):
    (tmp_path / name).write_bytes(body)
    rejected(tmp_path / name, cache, r'damaged|truncated|empty')


def test_an_unwritable_cache_is_an_error(tmp_path):
  (tmp_path / 'cache').write_text('a file')
  with pytest.raises(StorageError, match='cache_dir') as e:
    unpack(write(tmp_path / 'a.zip', FILES.items()), tmp_path / 'cache')
  assert os.strerror(errno.ENOTDIR) in str(e.value)
