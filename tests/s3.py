"""A real S3 server on the loopback, by moto."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import fsspec
import pytest


@contextlib.contextmanager
def s3_server(monkeypatch):
  """Yields the file system of a server with the bucket s3://bucket; skips the test without s3fs and moto."""
  pytest.importorskip('s3fs').S3FileSystem.clear_instance_cache()  # those of the server before
  pytest.importorskip('moto.server')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  for name, value in {'AWS_ACCESS_KEY_ID': 'test', 'AWS_SECRET_ACCESS_KEY': 'test', 'AWS_DEFAULT_REGION': 'us-east-1',
                      'AWS_ENDPOINT_URL': f'http://127.0.0.1:{port}'}.items():
    monkeypatch.setenv(name, value)
  server = subprocess.Popen([sys.executable, '-c', 'from moto.server import main; main()', '-p', str(port)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
  try:
    for _ in range(100):
      with socket.socket() as probe:
        if probe.connect_ex(('127.0.0.1', port)) == 0:
          break
      time.sleep(0.3)
    fs, _ = fsspec.core.url_to_fs('s3://bucket')
    fs.mkdir('bucket')
    yield fs
  finally:
    server.terminate()
    server.wait(20)
