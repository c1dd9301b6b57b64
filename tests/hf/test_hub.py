"""Downloads from and uploads to a hub: huggingface_hub against a real server on the loopback."""

import base64
import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip('huggingface_hub')
COMMIT = 'a' * 40
FILES = {'config.json': b'{"model_type": "gpt2"}', 'model.safetensors': b'weights', 'code.py': b'raise SystemExit(9)',
         'pytorch_model.bin': b'pickle', 'merges.txt': b'',
         'README.md': b'---\nlicense: other\nlicense_name: own\n---\n'}


class Handler(http.server.BaseHTTPRequestHandler):
  """The part of the hub's protocol that is used."""

  def log_message(self, *args):
    pass

  def answer(self, body=b'', status=200, **headers):
    self.send_response(status)
    for name, value in {'Content-Length': len(body), **headers}.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def do_GET(self):
    self.server.seen.append((self.command, self.path, self.headers.get('Authorization')))
    if self.path.startswith('/api/models/org/small') and '/tree/' in self.path:
      listed = [{'type': 'file', 'path': name, 'size': len(body), 'oid': 'b' * 40} for name, body in FILES.items()]
      self.answer(json.dumps(listed).encode(), Content_Type='application/json')
    elif self.path.startswith('/api/models/org/small'):
      siblings = [{'rfilename': name} for name in FILES]
      self.answer(json.dumps({'id': 'org/small', 'sha': COMMIT, 'siblings': siblings}).encode(),
                  Content_Type='application/json')
    elif '/resolve/' in self.path and (name := self.path.rpartition('/')[2]) in FILES:
      self.answer(FILES[name], ETag=f'"{name}"', X_Repo_Commit=COMMIT)
    else:
      self.answer(b'{"error": "Repository not found"}', 404, X_Error_Code='RepoNotFound')

  do_HEAD = do_GET

  def do_POST(self):
    body = self.rfile.read(int(self.headers['Content-Length']))
    self.server.seen.append((self.command, self.path, self.headers.get('Authorization')))
    if self.path.endswith('/preupload/main'):
      files = [{'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
               for file in json.loads(body)['files']]
      answer = {'files': files}
    elif self.path.endswith('/commit/main'):
      self.server.commits.append([json.loads(line) for line in body.splitlines()])
      address = f'http://127.0.0.1:{self.server.server_address[1]}/org/new/commit/{COMMIT}'
      answer = {'commitUrl': address, 'commitOid': COMMIT, 'success': True}
    else:
      answer = {'url': f'http://127.0.0.1:{self.server.server_address[1]}/org/new'}
    self.answer(json.dumps(answer).encode(), Content_Type='application/json')


@contextlib.contextmanager
def hub():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.seen, server.commits = [], []
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()


def run(code, server, home, **environment):
  env = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HTTP', 'http'))}
  return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, env=env | {
      'HF_ENDPOINT': f'http://127.0.0.1:{server.server_address[1]}', 'HF_HOME': str(home), **environment})


def test_a_model_is_downloaded_without_pickles_and_code(tmp_path):
  with hub() as server:
    code = 'from llm_jax.base.storage import read_workdir; print(read_workdir("hf:org/small"))'
    done = run(code, server, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = done.stdout.strip().splitlines()[-1]
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'merges.txt', 'model.safetensors']
    assert Path(folder, 'model.safetensors').read_bytes() == b'weights'
    code = ('from llm_jax.hf.hub import cached; from llm_jax.hf.origin import license_of; '
            'print(license_of(cached("org/small")), cached("org/none"))')
    num_asked = len(server.seen)
    assert run(code, server, tmp_path).stdout.strip() == "{'license': 'other', 'license_name': 'own'} None"
    assert len(server.seen) == num_asked
    missing = run('from llm_jax.base.process import run_as_program\n'
                  'run_as_program(lambda argv: __import__("llm_jax.hf.hub", fromlist=["Hub"]).Hub.read("org/none"))',
                  server, tmp_path)
    assert missing.returncode == 74 and 'hf:org/none: cannot be downloaded' in missing.stderr
    assert 'Traceback' not in missing.stderr


def test_a_folder_is_uploaded_with_the_token_of_the_environment(tmp_path):
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model/config.json').write_text('{}')
  (tmp_path / 'model/README.md').write_text('# x\n')
  code = ('from pathlib import Path; from llm_jax.hf.hub import push; '
          f'print(push(Path({str(tmp_path)!r}) / "model", "org/new"))')
  with hub() as server:
    refused = run(code, server, tmp_path / 'home')
    assert refused.returncode and 'HF_TOKEN' in refused.stderr and not server.seen
    done = run(code, server, tmp_path / 'home', HF_TOKEN='secret-token')
    assert done.returncode == 0, done.stderr
    assert '/org/new' in done.stdout and 'secret-token' not in done.stdout + done.stderr
    assert [token for _, path, token in server.seen if path.endswith('/commit/main')] == ['Bearer secret-token']
    [lines] = server.commits
    added = [line['value'] for line in lines if line['key'] == 'file']
    files = {file['path']: base64.b64decode(file['content']) for file in added}
    assert files == {'config.json': b'{}', 'README.md': b'# x\n'}
