"""Sources give every text of a path once, in a fixed order; downloads are whole, right, and made once."""

import hashlib
import http.server
import os
import threading

import pytest

from llm_jax.data import DataConfig, open_data
from llm_jax.data.fetch import fetch, is_url
from llm_jax.data.sources import open_source
from llm_jax.errors import DataError, StorageError

BODY = bytes(range(256)) * 3000  # several reads of a socket


def read(path, source='auto'):
  return [(document.name, document.text) for document in open_source(source, str(path)).documents()]


@pytest.fixture
def tree(tmp_path):
  files = {'b.txt': 'bee\r\nkeeps its line ends\r', 'a.txt': 'ay \u4e2d\U0001F600\x00', 'sub/deep/c.py': 'sea',
           'sub/d': '', '.hidden': 'no', '.git/config': 'no', 'sub/.cache/e.txt': 'no', 'sub/.f.txt': 'no'}
  for name, text in files.items():
    path = tmp_path / 'tree' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
  return tmp_path / 'tree', {name: text for name, text in files.items() if text != 'no'}


def test_folder_gives_each_file_that_is_not_hidden_in_order(tree):
  root, visible = tree
  assert read(root) == sorted(visible.items())


def test_a_hidden_folder_above_the_path_hides_nothing(tree, tmp_path):
  root, visible = tree
  root.rename(tmp_path / '.tree')
  assert dict(read(tmp_path / '.tree')) == visible


def test_file_gives_its_bytes(tree):
  root, visible = tree
  assert read(root / 'b.txt') == [('b.txt', visible['b.txt'])]
  assert read(root / '.hidden') == [('.hidden', 'no')]  # named outright


def test_glob(tree):
  root, visible = tree
  assert [text for _, text in read(f'{root}/*.txt')] == [visible['a.txt'], visible['b.txt']]
  assert [text for _, text in read(f'{root}/**/*.py')] == [visible['sub/deep/c.py']]
  everything = read(f'{root}/**')
  assert [text for _, text in everything] == [visible[name] for name in sorted(visible)]
  assert [name for name, _ in everything] == sorted(visible), 'names that no working directory changes'


def test_missing_path_names_it(tmp_path):
  with pytest.raises(DataError, match='nowhere'):
    open_source('auto', str(tmp_path / 'nowhere'))
  with pytest.raises(DataError, match='matches nothing'):
    open_source('auto', str(tmp_path / '*.txt'))


def test_folder_without_files(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / '.hidden').write_text('x')
  with pytest.raises(DataError, match='holds no files'):
    open_source('auto', str(tmp_path))


@pytest.mark.parametrize('prefix', ['', 'some ascii', '中文'])
def test_invalid_utf8_names_file_and_offset(prefix, tmp_path):
  (tmp_path / 'good.txt').write_text('fine')
  (tmp_path / 'latin.txt').write_bytes(prefix.encode() + b'\xe9t\xe9')
  with pytest.raises(DataError) as e:
    read(tmp_path)
  assert str(tmp_path / 'latin.txt') in str(e.value)
  assert f'byte {len(prefix.encode())} ' in str(e.value)


def test_fingerprint_changes_when_a_file_does(tree):
  root, _ = tree

  def fingerprint():
    return open_source('auto', str(root)).fingerprint()

  seen = [fingerprint()]
  assert fingerprint() == seen[0]
  changes = [lambda: os.utime(root / 'a.txt', (1, 1)), lambda: (root / 'b.txt').write_text('longer than it was before'),
             lambda: (root / 'new').write_text(''), lambda: (root / 'new').rename(root / 'newer')]
  for change in changes:
    change()
    assert fingerprint() not in seen
    seen.append(fingerprint())
  (root / '.hidden').write_text('changed, but not read')
  assert fingerprint() == seen[-1]


def test_stdlib_is_megabytes_of_code_without_tests_and_packages():
  source = open_source('auto', 'stdlib')
  names = [name for name, _ in source.files]
  assert {'json/decoder.py', 'argparse.py', 'asyncio/events.py'} <= set(names)
  assert names == sorted(names, key=lambda name: name.split('/'))
  skipped = {'test', 'tests', 'site-packages', 'dist-packages', '__pycache__'}
  assert not [name for name in names if skipped & set(name.split('/'))]
  assert sum(len(document.text.encode()) for document in source.documents()) > 5e6


# Downloads, from a real server on the loopback.

class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    self.server.hits.append(self.path)
    self.close_connection = True
    if self.path.startswith('/missing'):
      self.send_error(404)
    elif self.path.startswith('/garbage'):
      self.wfile.write(b'this is not HTTP\r\n\r\n')
    elif self.path.startswith('/chunked_short'):
      self.send_response(200)
      self.send_header('Transfer-Encoding', 'chunked')
      self.end_headers()
      self.wfile.write(b'1000\r\n' + BODY[:100])  # 4096 bytes are promised
    else:
      self.send_response(200)
      self.send_header('Content-Length', str(len(BODY)))
      self.end_headers()
      self.wfile.write(BODY[:1000] if self.path.startswith('/short') else BODY)

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.hits = []
  server.url = f'http://127.0.0.1:{server.server_address[1]}'
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()

  def stop():
    server.shutdown()
    thread.join()
    server.server_close()

  server.stop = stop
  yield server
  if thread.is_alive():
    stop()


def left_behind(folder):
  return [path for path in folder.rglob('*') if path.is_file()]


SHA = hashlib.sha256(BODY).hexdigest()


@pytest.mark.parametrize('sha256', [None, SHA])
def test_fetch_gives_the_body_and_asks_once(server, tmp_path, sha256):
  path = fetch(f'{server.url}/corpus.txt', sha256, tmp_path)
  assert path.read_bytes() == BODY
  assert path.name == 'corpus.txt'
  assert len(server.hits) == 1
  server.stop()
  assert fetch(f'{server.url}/corpus.txt', sha256, tmp_path) == path
  assert left_behind(tmp_path) == [path]


def test_another_url_or_sha256_is_another_file(server, tmp_path):
  paths = {fetch(f'{server.url}/{folder}/corpus.txt', sha256, tmp_path) for folder in 'ab' for sha256 in (None, SHA)}
  assert len(paths) == len(server.hits) == 4


def test_fetch_refuses_another_sha256_and_keeps_nothing(server, tmp_path):
  wrong = '0' * 64
  for hits in (1, 2):  # what was refused is not in the cache the second time either
    with pytest.raises(DataError) as e:
      fetch(f'{server.url}/corpus.txt', wrong, tmp_path)
    assert SHA in str(e.value)
    assert wrong in str(e.value)
    assert len(server.hits) == hits
  assert not left_behind(tmp_path)


@pytest.mark.parametrize('name', ['short.txt', 'chunked_short.txt', 'garbage', 'missing.txt'])
def test_fetch_of_a_broken_answer_keeps_nothing(server, tmp_path, name):
  with pytest.raises(DataError) as e:
    fetch(f'{server.url}/{name}', None, tmp_path)
  assert f'{server.url}/{name}' in str(e.value)
  assert not left_behind(tmp_path)
  if name == 'short.txt':
    assert '1000' in str(e.value)  # how far it came


@pytest.mark.parametrize('port', ['server gone', 'no number'])
def test_fetch_without_a_server_says_how_to_pass_a_file(server, tmp_path, port):
  server.stop()
  url = server.url if port == 'server gone' else 'http://127.0.0.1:port'
  with pytest.raises(DataError, match=r'--config\.data\.path=FILE'):
    fetch(f'{url}/corpus.txt', None, tmp_path)
  assert not left_behind(tmp_path)


def test_fetch_into_a_folder_that_cannot_be_written(server, tmp_path):
  (tmp_path / 'file').write_text('not a folder')
  with pytest.raises(StorageError, match='cache_dir'):
    fetch(f'{server.url}/corpus.txt', None, tmp_path / 'file')
  assert not server.hits


def test_open_data_of_a_url(server, tmp_path):
  config = DataConfig(path=f'{server.url}/corpus.bin', sha256=SHA, cache_dir=str(tmp_path))
  data = open_data(config)
  assert data.train.tokens.tobytes() + data.val.tokens.tobytes() == BODY
  open_data(config)
  assert len(server.hits) == 1


def test_is_url():
  for path, expected in (('http://a/b', True), ('https://a/b.txt', True), ('stdlib', False), ('/a/b', False),
                         ('a/**/*.txt', False), ('~/x', False)):
    assert is_url(path) is expected
