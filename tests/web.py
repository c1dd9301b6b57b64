"""A real HTTP server on the loopback that can cut answers, resume them, and send garbage."""

import contextlib
import http.server
import threading


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    server, path = self.server, self.path.split('?')[0]
    server.hits.append(self.path)
    server.headers.append(dict(self.headers))
    self.close_connection = True
    if path == '/garbage':
      self.wfile.write(b'this is not HTTP\r\n\r\n')
    elif path == '/chunked_short':
      self.send_response(200)
      self.send_header('Transfer-Encoding', 'chunked')
      self.end_headers()
      self.wfile.write(b'1000\r\n' + bytes(100))  # 4096 bytes are promised
    elif path in server.redirects:
      self.send_response(302)
      self.send_header('Location', server.redirects[path])
      self.send_header('Content-Length', '0')
      self.end_headers()
    elif path not in server.files:
      self.send_error(404)
    else:
      self.send_file(server.files[path])

  def send_file(self, body):
    wanted, begin = self.headers.get('Range'), 0
    if self.server.ranges and wanted and self.headers.get('If-Range') == self.server.etag:
      begin = int(wanted.removeprefix('bytes=').removesuffix('-'))
    self.send_response(206 if begin else 200)
    if begin:
      self.send_header('Content-Range', f'bytes {begin}-{len(body) - 1}/{len(body)}')
    if self.server.etag:
      self.send_header('ETag', self.server.etag)
    self.send_header('Content-Length', str(len(body) - begin))
    self.end_headers()
    self.wfile.write(body[begin:][:self.server.cuts.pop(0) if self.server.cuts else None])

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(**files):
  """A server of `files` {path: bytes}; records requests in `hits` and `headers`; `stop()` ends it early."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.files, server.redirects, server.hits, server.headers = dict(files), {}, [], []
  server.cuts = []  # the number of bytes after which each answer is cut, in order
  server.ranges, server.etag = True, '"1"'
  server.url = f'http://127.0.0.1:{server.server_address[1]}'
  thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
  thread.start()

  def stop():
    if thread.is_alive():
      server.shutdown()
      thread.join()
      server.server_close()

  server.stop = stop
  try:
    yield server
  finally:
    stop()
