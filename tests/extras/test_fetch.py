"""Downloads are complete, verified and made once; broken ones resume; secrets in URLs are never printed."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from web import serving

from llm_jax.base.errors import ConfigError, DataError, StorageError, UserError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources.documents import is_url, shown
from llm_jax.extras import fetch
from llm_jax.extras.fetch import fetch_all

BODY = bytes(range(256)) * 12000  # 3 MB: several reads of a socket
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  monkeypatch.setattr(fetch, 'RETRY_SECONDS', 0.01)
  with serving() as server:
    server.files = {'/corpus.txt': BODY, '/corpus.bin': BODY, '/a/corpus.txt': BODY, '/b/corpus.txt': BODY}
    yield server


def left_behind(folder):
  return [path for path in folder.rglob('*') if path.is_file()]


@pytest.mark.parametrize('sha256', [None, SHA])
def test_fetch_downloads_a_file_once(server, tmp_path, sha256):
  path = fetch.fetch(f'{server.url}/corpus.txt', sha256, tmp_path)
  assert path.read_bytes() == BODY
  assert path.name == 'corpus.txt'
  server.stop()
  assert fetch_all(f'{server.url}/corpus.txt', sha256, tmp_path) == [('corpus.txt', path)]
  assert len(server.hits) == 1
  (about,) = set(left_behind(tmp_path)) - {path}
  assert json.loads(about.read_text()) == {'url': f'{server.url}/corpus.txt', 'size': len(BODY), 'sha256': SHA}


def test_each_url_and_sha256_has_its_own_file(server, tmp_path):
  paths = {fetch.fetch(f'{server.url}/{folder}/corpus.txt', sha256, tmp_path)
           for folder in 'ab' for sha256 in (None, SHA)}
  assert len(paths) == len(server.hits) == 4


@pytest.mark.parametrize(('path', 'name'), [
    ('/?q=a/b', 'download'), ('/..?x', 'download'), ('/' + 'x' * 300, 'x' * 100), ('/a/corpus.txt#part', 'corpus.txt'),
    ('/%2e%2e%2fx', '%2e%2e%2fx')])
def test_file_names_stay_inside_the_cache(server, tmp_path, path, name):
  server.files[path.split('?')[0].split('#')[0]] = BODY
  found = fetch.fetch(server.url + path, None, tmp_path)
  assert found.name == name
  assert found.resolve().is_relative_to(tmp_path / 'downloads')


def test_a_wrong_sha256_is_rejected_and_not_cached(server, tmp_path):
  wrong = '0' * 64
  for hits in (1, 2):  # a rejected file does not stay in the cache
    with pytest.raises(DataError) as e:
      fetch.fetch(f'{server.url}/corpus.txt', wrong, tmp_path)
    assert SHA in str(e.value)
    assert wrong in str(e.value)
    assert len(server.hits) == hits
  assert not left_behind(tmp_path)


@pytest.mark.parametrize('name', ['short', 'chunked_short', 'garbage', 'missing'])
def test_a_broken_response_is_not_cached(server, tmp_path, name):
  server.files['/short'] = BODY
  server.etag, server.cuts = None, [1000] * 100
  with pytest.raises(DataError) as e:
    fetch.fetch(f'{server.url}/{name}', None, tmp_path)
  assert f'{server.url}/{name}' in str(e.value)
  assert not left_behind(tmp_path)
  if name == 'short':
    assert f'1000 of {len(BODY)}' in str(e.value)  # the bytes received
    assert len(server.hits) == 2, 'no third try where the second came no further'


@pytest.mark.parametrize('port', ['server gone', 'no number'])
def test_without_a_server_the_error_says_how_to_pass_a_file(server, tmp_path, port):
  server.stop()
  url = server.url if port == 'server gone' else 'http://127.0.0.1:port'
  with pytest.raises(DataError, match=r'--config\.data\.path=FILE'):
    fetch.fetch(f'{url}/corpus.txt', None, tmp_path)
  assert not left_behind(tmp_path)


def test_an_unwritable_cache_is_an_error(server, tmp_path):
  (tmp_path / 'file').write_text('not a folder')
  with pytest.raises(StorageError, match='cache_dir'):
    fetch.fetch(f'{server.url}/corpus.txt', None, tmp_path / 'file')
  assert not server.hits


def test_a_broken_download_resumes(server, tmp_path):
  server.cuts = [1000, 2_000_000, 1]
  assert fetch.fetch(f'{server.url}/corpus.txt', None, tmp_path).read_bytes() == BODY
  assert [h.get('Range') for h in server.headers] == [None, 'bytes=1000-', 'bytes=2001000-', 'bytes=2001001-']


@pytest.mark.parametrize(('ranges', 'etag'), [(False, '"1"'), (True, None), (True, 'W/"1"')])
def test_a_download_that_cannot_resume_starts_again(server, tmp_path, ranges, etag):
  server.ranges, server.etag, server.cuts = ranges, etag, [1000, 2_000_000]
  assert fetch.fetch(f'{server.url}/corpus.txt', SHA, tmp_path).read_bytes() == BODY
  assert len(server.hits) == 3


def test_a_file_that_changes_during_download_is_not_mixed(server, tmp_path, monkeypatch):
  def change(_):
    server.files['/corpus.txt'], server.etag = BODY[::-1], '"2"'

  server.cuts = [2_000_000]
  monkeypatch.setattr(time, 'sleep', change)
  assert fetch.fetch(f'{server.url}/corpus.txt', None, tmp_path).read_bytes() == BODY[::-1]


@pytest.mark.parametrize(('damage', 'sha256'), [
    (lambda p: p.write_bytes(BODY[:-1]), None), (lambda p: p.write_bytes(b'?' + BODY[1:]), SHA), (os.remove, None)])
def test_a_damaged_copy_is_downloaded_again(server, tmp_path, damage, sha256):
  url = f'{server.url}/corpus.txt'
  path = fetch.fetch(url, sha256, tmp_path)
  damage(path)
  assert fetch.fetch(url, sha256, tmp_path).read_bytes() == BODY
  assert len(server.hits) == 2
  damage(path)
  server.stop()
  with pytest.raises(DataError, match='cannot be downloaded'):
    fetch.fetch(url, sha256, tmp_path)


def test_a_damaged_copy_is_not_replaced_by_another_file(server, tmp_path):
  url = f'{server.url}/corpus.txt'
  path = fetch.fetch(url, None, tmp_path)
  path.write_bytes(b'')
  server.files['/corpus.txt'] = BODY[::-1]
  with pytest.raises(DataError, match=f'no longer the file.*was {SHA}.*delete'):
    fetch.fetch(url, None, tmp_path)


SECRETS = ('s3cret', 'AKIA', 'hunter')


@pytest.mark.parametrize('path', ['corpus.txt', 'missing', 'garbage', 'short', 'port', 'blank', 'refused'])
def test_secrets_in_a_url_are_used_but_not_printed(server, tmp_path, capsys, path):
  host = server.url.removeprefix('http://')
  host, path = {'port': ('127.0.0.1:x', path), 'blank': (host, 'a b')}.get(path, (host, path))
  server.files['/short'] = BODY
  server.cuts = [1, 1, 0] if path == 'short' else []
  if path == 'refused':
    server.stop()
  told = ''
  for sha256 in (None, '0' * 64):
    try:
      fetch.fetch(f'http://hunter:s3cret%40@{host}/{path}?token=AKIA', sha256, tmp_path)
    except UserError as e:
      told += str(e)
  assert f'{host}/{path}' in told
  told += ''.join(str(p) + p.read_text(errors='replace') for p in left_behind(tmp_path)) + ''.join(capsys.readouterr())
  assert not [secret for secret in SECRETS if secret in told]
  if server.hits:
    assert server.headers[0]['Authorization'] == 'Basic ' + base64.b64encode(b'hunter:s3cret@').decode()
    assert server.hits[0] == f'/{path}?token=AKIA'


def test_a_password_is_not_sent_to_another_host(server, tmp_path):
  with serving() as other:
    other.files = server.files
    server.redirects['/moved'] = f'{other.url}/corpus.txt'
    url = f'{server.url}/moved'.replace('//', '//hunter:s3cret@')
    assert fetch.fetch(url, SHA, tmp_path).read_bytes() == BODY
    assert 'Authorization' in server.headers[0]
    assert 'Authorization' not in other.headers[0]


FETCH = ('import sys; from llm_jax.extras import fetch; '
         'print(fetch.fetch(sys.argv[1], None, fetch.Path(sys.argv[2])))')
LIMITED = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); ' + FETCH


def start(code, url, folder):
  return subprocess.Popen([sys.executable, '-c', code, url, str(folder)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


def test_concurrent_downloads_all_get_the_complete_file(server, tmp_path):
  processes = [start(FETCH, f'{server.url}/corpus.txt', tmp_path) for _ in range(2)]
  outputs = [process.communicate(timeout=60) for process in processes]
  assert [process.returncode for process in processes] == [0] * 2, outputs
  assert {Path(out.strip()).read_bytes() for out, _ in outputs} == {BODY}
  assert len(left_behind(tmp_path)) == 2


def test_files_of_killed_processes_are_ignored_and_deleted(server, tmp_path, monkeypatch):
  url = f'{server.url}/corpus.txt'
  sleeps = FETCH.replace('import sys;', 'import sys, os, time; os.fsync = lambda _: time.sleep(60);')
  with start(sleeps, url, tmp_path) as process:
    while not any(p.stat().st_size == len(BODY) for p in left_behind(tmp_path)):
      time.sleep(0.01)
      assert process.poll() is None
    process.send_signal(signal.SIGKILL)
  (left,) = left_behind(tmp_path)
  path = fetch.fetch(url, None, tmp_path)
  assert path.read_bytes() == BODY
  assert left.exists(), 'for all that is known its process lives'
  os.utime(left, (time.time() - fetch.STALE_SECONDS - 60,) * 2)
  path.unlink()
  fetch.fetch(url, None, tmp_path)
  assert not left.exists()


def test_a_full_disk_is_reported_as_such(server, tmp_path):
  out, err = start(LIMITED, f'{server.url}/corpus.txt', tmp_path).communicate(timeout=60)
  assert not out
  assert 'StorageError' in err
  assert 'cannot be written' in err
  assert not left_behind(tmp_path)


def test_open_data_reads_a_url(server, tmp_path):
  config = DataConfig(path=f'{server.url}/corpus.bin', sha256=SHA, cache_dir=str(tmp_path))
  data = open_data(config)
  assert data.train['data'].tokens[:].tobytes() + data.val['data'].tokens[:].tobytes() == BODY
  open_data(config)
  assert len(server.hits) == 1


def test_is_url_recognizes_schemes():
  for path, expected in (('http://a/b', True), ('https://a/b.txt', True), ('gs://b/*.txt', True), ('stdlib', False),
                         ('/a/b', False), ('a/**/*.txt', False), ('~/x', False), ('hf:user/name', False)):
    assert is_url(path) is expected


@pytest.mark.parametrize(('url', 'expected'), [
    ('https://h/a', 'https://h/a'), ('https://u:p@h/a@b?k=v#f', 'https://h/a@b?...'), ('s3://k:p@x@b/o', 's3://b/o')])
def test_shown_hides_secrets(url, expected):
  assert shown(url) == expected


# Other file systems, by fsspec.

FILES = {'a.txt': b'ay', 'sub/b.txt': BODY, 'sub/deep/c.md': b'', '.hidden': b'no', 'sub/.git/x.txt': b'no'}


@pytest.fixture(params=['memory', 'file'])
def bucket(request, tmp_path):
  fsspec = pytest.importorskip('fsspec')
  fs, root = fsspec.filesystem(request.param), f'{tmp_path}/bucket'
  for name, body in FILES.items():
    fs.makedirs(f'{root}/{name}'.rpartition('/')[0], exist_ok=True)
    fs.pipe_file(f'{root}/{name}', body)
  yield fs, f'{request.param}://{root}'
  if fs.exists(root):
    fs.rm(root, recursive=True)


@pytest.mark.parametrize(('pattern', 'names'), [
    ('', ['a.txt', 'sub/b.txt', 'sub/deep/c.md']), ('/', ['a.txt', 'sub/b.txt', 'sub/deep/c.md']),
    ('/*.txt', ['a.txt']), ('/**/*.txt', ['a.txt', 'sub/b.txt']), ('/sub/*', ['b.txt']), ('/sub/b.txt', ['b.txt']),
    ('/su?/**', ['sub/b.txt', 'sub/deep/c.md']), ('/.hidden', ['.hidden'])])
def test_folders_and_globs_are_downloaded_once(bucket, tmp_path, pattern, names):
  fs, url = bucket
  found = fetch_all(url + pattern, None, tmp_path)
  assert [name for name, _ in found] == names
  by_end = {name.rpartition('/')[2]: body for name, body in FILES.items()}
  assert [path.read_bytes() for _, path in found] == [by_end[name.rpartition('/')[2]] for name, _ in found]
  fs.rm(url.split('://')[1], recursive=True)
  assert fetch_all(url + pattern, None, tmp_path) == found


def test_a_damaged_file_of_a_folder_is_downloaded_again(bucket, tmp_path):
  fs, url = bucket
  found = dict(fetch_all(url, None, tmp_path))
  found['sub/b.txt'].write_bytes(BODY[:5])
  assert dict(fetch_all(url, None, tmp_path))['sub/b.txt'].read_bytes() == BODY
  found['a.txt'].write_bytes(b'')
  fs.rm(f'{url.split("://")[1]}/a.txt')
  with pytest.raises(DataError, match='cannot be read'):
    fetch_all(url, None, tmp_path)


def test_a_sha256_is_for_one_file_only(bucket, tmp_path):
  _, url = bucket
  assert fetch.fetch(f'{url}/sub/b.txt', SHA, tmp_path).read_bytes() == BODY
  with pytest.raises(DataError, match=SHA):
    fetch.fetch(f'{url}/a.txt', SHA, tmp_path)
  with pytest.raises(ConfigError, match='holds 3'):
    fetch_all(url, SHA, tmp_path)
  with pytest.raises(DataError, match='holds 3 files'):
    fetch.fetch(url, None, tmp_path)


def test_an_empty_remote_path_is_an_error(bucket, tmp_path):
  _, url = bucket
  for pattern in ('/nowhere', '/*.nothing', '/nowhere/*'):
    with pytest.raises(DataError, match='matches nothing'):
      fetch_all(url + pattern, None, tmp_path)


def test_a_remote_name_that_leaves_the_folder_is_rejected(tmp_path):
  fs = pytest.importorskip('fsspec').filesystem('memory')
  fs.pipe_file('/out/a.txt', b'')
  fs.store['/out/../../evil.txt'] = fs.store['/out/a.txt']  # a bucket's keys are any text
  with pytest.raises(DataError, match='leads out'):
    fetch_all('memory://out', None, tmp_path)
  fs.rm('/out', recursive=True)
  fs.store.clear()


@pytest.mark.parametrize(('url', 'package'), [('gs://b/x', 'gcsfs'), ('s3://u:s3cret@b/x', 's3fs'),
                                              ('abfs://b/x', 'adlfs')])
def test_a_missing_package_is_named(tmp_path, url, package):
  try:
    __import__(package)
    pytest.skip(f'{package} is installed')
  except ImportError:
    pass
  with pytest.raises(ConfigError, match=f'pip install {package}') as e:
    fetch_all(url, None, tmp_path)
  assert 's3cret' not in str(e.value)


def test_an_unknown_file_system_is_named(tmp_path):
  with pytest.raises(ConfigError, match='htp://'):
    fetch_all('htp://host/x', None, tmp_path)
