"""A served run, for tests of llm-jax serve."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

from program import environment, write_config

from llm_jax import api, main

MAX_WAITING = 4
LONG = {'prompt': [''] * 128, 'max_tokens': 500}  # takes much longer than any other request of the tests


def train(folder: Path) -> Path:
  """A run of three steps that generates up to 512 tokens."""
  write_config(folder)
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/tiny', '--config.num_steps=3',
             '--config.model.positions=rope', '--config.model.max_len=512', '--config.model.num_layers=1',
             '--config.eval.sample_tokens=0', '--config.eval.max_tokens=512', '--config.checkpoint.every=3'])
  return folder / 'tiny'


@contextlib.contextmanager
def in_thread(workdir: Path):
  """A Client of the run, which a thread of this process serves."""
  import uvicorn

  from llm_jax.extras.serving.app import make_app
  from llm_jax.extras.serving.worker import Worker
  listener, worker = socket.create_server(('127.0.0.1', 0)), Worker(4)
  served = make_app(api.load(workdir), workdir.name, worker, frozenset({'127.0.0.1'}))
  server = uvicorn.Server(uvicorn.Config(served, log_level='warning', lifespan='off'))
  thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
  thread.start()
  yield Client(f'http://127.0.0.1:{listener.getsockname()[1]}')
  worker.close()
  server.should_exit = True
  thread.join(timeout=10)
  assert not thread.is_alive()


class Client:
  """Sends raw requests to a server."""

  def __init__(self, address: str, printed: str = ''):
    self.address, self.printed = address, printed

  def send(self, path: str, body=None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
    if not isinstance(body, bytes | None):
      body = json.dumps(body).encode()
    connection.request('GET' if body is None else 'POST', path, body,
                       ({} if body is None else {'Content-Type': 'application/json'}) | headers)
    response = connection.getresponse()
    response.connection = connection
    return response

  def send_half(self) -> http.client.HTTPConnection:
    """Sends a request of which a part of the body is missing."""
    connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
    connection.request('POST', '/v1/completions', b'{', {'Content-Type': 'application/json', 'Content-Length': '9'})
    return connection

  def get(self, path: str) -> dict:
    return json.loads(self.send(path).read())

  def complete(self, **body) -> dict:
    response = self.send('/v1/completions', body)
    answer = json.loads(response.read())
    assert response.status == 200, answer
    return answer

  def stream(self, path: str, **body) -> list:
    """The data of all events."""
    response = self.send(path, body | {'stream': True})
    parts = response.read().decode().split('\n\n')
    assert response.headers['content-type'].startswith('text/event-stream') and parts.pop() == ''
    assert parts.pop() == 'data: [DONE]'
    return [json.loads(part.removeprefix('data: ')) for part in parts]

  def begin(self, **body) -> http.client.HTTPConnection:
    """Sends a request that is streamed, and waits for its first event; closing the connection cancels it."""
    response = self.send('/v1/completions', body | {'stream': True})
    assert response.readline().startswith(b'data: ')
    return response


@contextlib.contextmanager
def served(run: Path):
  """A Client of `llm-jax serve` as a real process, which Ctrl-C ends with code 0 while it generates."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'llm_jax', 'serve', f'--workdir={run.name}', '--port=0', f'--max_waiting={MAX_WAITING}'],
      cwd=run.parent, env=environment(run.parent), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  try:
    printed = ''
    for line in process.stdout:
      printed += line
      if line.startswith('ready: '):
        break
    assert 'ready: ' in printed, process.stderr.read()
    client = Client(printed.rpartition('ready: ')[2].split()[0], printed)
    yield client
    response, half, gone = client.begin(**LONG), client.send_half(), client.send_half()
    gone.close()
    process.send_signal(signal.SIGINT)
    rest = response.read().decode()
    assert 'the server is shutting down' in rest, rest
    with contextlib.suppress(ConnectionResetError):  # as its socket closes with a body that is not read
      assert half.getresponse().status == 503
    assert process.wait(timeout=30) == 0, process.stderr.read()
    assert process.stdout.read() == 'stopped\n' and 'Traceback' not in process.stderr.read()
  finally:
    process.kill()
    process.communicate()
