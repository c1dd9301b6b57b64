"""Passwords and tokens reach neither a file nor the terminal; a run that needs them again says how to give them."""

import base64
import contextlib
import http.server
import json
import sys
import threading

import pytest
from program import TINY, finish, start, start_in_turn

from llm_jax import config_file, main
from llm_jax.base import process
from llm_jax.base.errors import ConfigError
from llm_jax.base.redaction import check_given, hide, is_secret_name, public, public_command, redact, whole_url

USER, PASSWORD, TOKEN, KEY, OTHER = 'canary-user', 'canary%2Fpassword', 'canary-token', 'canary-key', 'canary-other'
LOGGER = '''
from llm_jax.base.loggers import LOGGERS, Logger
from llm_jax.base.registry import register

class Quiet(Logger):
  def __init__(self, run, api_key: str = ''):
    assert api_key.startswith('can' + 'ary') and api_key not in str(run.config)

register(LOGGERS, 'quiet', Quiet)
'''


class Guarded(http.server.BaseHTTPRequestHandler):
  """Serves a text to who knows user, password and token."""

  def do_GET(self):
    login = base64.b64encode(f'{USER}:canary/password'.encode()).decode()
    if self.headers.get('Authorization') != f'Basic {login}' or TOKEN not in self.path:
      self.send_error(403, f'no access to {self.path}')
      return
    body = b'\n'.join(b'line %d of a text that is long enough' % i for i in range(2000))
    self.send_response(200)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass


@pytest.fixture
def url():
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Guarded) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield f'http://{USER}:{PASSWORD}@127.0.0.1:{server.server_address[1]}/x.txt?token={TOKEN}'
    server.shutdown()
    thread.join()


def leaks(folder, *outputs):
  """(place, secret) of each canary in a file, a file's name or an output."""
  found = [(path.name, path.read_bytes() + str(path.relative_to(folder)).encode())
           for path in folder.rglob('*') if path.is_file()]
  found += [('output', output.encode()) for output in outputs]
  assert len(found) > len(outputs)
  encoded = base64.b64encode(f'{USER}:canary/password'.encode()).decode()
  return [(place, secret) for place, content in found
          for secret in ('canary', encoded, 'password@') if secret.encode() in content]


def test_no_secret_is_written_or_printed(url, tmp_path, monkeypatch):
  """In one folder: a run, its resumption from config.json, a launch that fails, and the cache."""
  (tmp_path / 'tiny.py').write_text(TINY.format(corpus='unused'))
  plugin = tmp_path.parent / 'quiet_logger.py'
  plugin.write_text(LOGGER)
  small = ['--config.eval.every=4', '--config.checkpoint.every=2', f'--plugin={plugin}',
           '--config.eval.max_tokens=64', '--config.eval.sample_tokens=0']
  secret = [f'--config.data.path={url}', '--config.log.loggers=tensorboard,jsonl,csv,quiet',
            '--config.log.quiet.api_key', KEY]
  flags = [*small, *secret]
  failing = [word.replace(TOKEN, OTHER) for word in flags]
  outputs = [finish(start_in_turn(
      tmp_path, ('train', '--config=tiny.py', '--workdir=run', *flags, '--config.num_steps=2'),
      ('train', '--config=tiny.py', '--workdir=failed', *failing)), 65)]
  assert 'HTTP 403' in outputs[0] and not leaks(tmp_path, *outputs)

  run = tmp_path / 'run'
  config = json.loads((run / 'config.json').read_text())
  hidden = config['data']['path']
  assert hidden.startswith('http://REDACTED@127.0.0.1:') and hidden.endswith('/x.txt?REDACTED')
  assert config['log']['quiet']['api_key'] == 'REDACTED'
  again = [f'--config={run}/config.json', f'--workdir={run}', f'--plugin={plugin}', '--config.num_steps=4']
  with pytest.raises(ConfigError, match=r'config\.log\.quiet\.api_key: is secret'):
    main.main(again)
  again += ['--config.log.quiet.api_key', KEY]
  with pytest.raises(ConfigError) as e:
    main.main(again)
  assert 'LLM_JAX_URLS' in str(e.value) and hidden in str(e.value)
  monkeypatch.setenv('LLM_JAX_URLS', f'http://{OTHER}@elsewhere/x {url}')
  outputs.append(finish(start(tmp_path, 'main', *again)))
  assert 'resuming from step 2' in outputs[1] and 'changed: config.data' not in outputs[1]
  assert not leaks(tmp_path, *outputs)


def test_the_config_command_and_sweeps_show_no_secret(tmp_path, capsys):
  from llm_jax.extras.commands import config_fields, sweep
  config_fields.main(['--config=gpt_small', f'--config.data.path=https://{USER}:{PASSWORD}@host/x?t={TOKEN}', 'data'])
  assert 'https://REDACTED@host/x?REDACTED' in (printed := capsys.readouterr().out) and 'canary' not in printed
  assert 'canary' not in sweep.name_of(1, {'data.path': f'https://{USER}:{PASSWORD}@host/x'})


@pytest.mark.parametrize(('value', 'shown'), [
    ('https://a:b@host/x?t=1', 'https://REDACTED@host/x?REDACTED'),
    ('s3://a:b@host/part-?.txt', 's3://REDACTED@host/part-?.txt'),
    ('abfs://c/x?sig=abc', 'abfs://c/x?REDACTED'), ('data.path=https://a:b@h/x', 'data.path=https://REDACTED@h/x'),
    ('https://host/x#page', 'https://host/x#page'), ('notes/a@b?.txt', 'notes/a@b?.txt'),
    ('https://a:p@ss@host/x', 'https://REDACTED@host/x')])
def test_values_without_their_secrets(value, shown):
  assert hide(value) == shown == hide(shown)


def test_names_of_secrets():
  assert all(map(is_secret_name, ('password', 'log.x.api_key', 'auth_token', 'token', 'client_secret', 'HF_TOKEN')))
  assert not any(map(is_secret_name, (
      'eos_token', 'tokenizer', 'batch_tokens', 'max_tokens', 'data.key_field', 'state_key', 'num_keys')))


def test_command_lines_messages_and_nested_values():
  assert public_command(['x', '--config.log.w.api_key=abc', '--token', 'abc', '--seed=1']) == [
      'x', '--config.log.w.api_key=REDACTED', '--token', 'REDACTED', '--seed=1']
  assert public({'stages': {'late': {'set': ['log.w.password=hidden-one', 'seed=1']}}, 'n': (1, None)}) == {
      'stages': {'late': {'set': ['log.w.password=REDACTED', 'seed=1']}}, 'n': (1, None)}
  hide('https://someone:hidden%20two@host/x?key=hidden-three')
  message = redact("Invalid port: 'hidden two@host', https://h/x?key=hidden-four, hidden-one and hidden-three")
  assert 'hidden' not in message and 'Invalid port' in message


def test_what_was_not_stored_is_asked_for(monkeypatch):
  monkeypatch.delenv('LLM_JAX_URLS', raising=False)
  assert whole_url('https://host/x') == 'https://host/x'
  with pytest.raises(ConfigError, match='LLM_JAX_URLS'):
    whole_url('https://REDACTED@host/x')
  monkeypatch.setenv('LLM_JAX_URLS', 'https://a:b@host/y https://a:b@host/x')
  assert whole_url('https://REDACTED@host/x') == 'https://a:b@host/x'
  with pytest.raises(ConfigError, match=r'config\.log\.x\.api_key: is secret'):
    check_given({'log': {'x': {'api_key': 'REDACTED'}}})


def test_an_uncaught_error_shows_no_secret(tmp_path, capsys, monkeypatch):
  error = ValueError('bad: https://a:hidden-five@host/x')

  def fail(argv):
    raise error

  monkeypatch.setattr('sys.excepthook', None)
  monkeypatch.setattr('signal.signal', lambda *_: None)
  with contextlib.suppress(ValueError):
    process.run_as_program(fail)
  sys.excepthook(ValueError, error, None)
  printed = capsys.readouterr().err
  assert 'hidden-five' not in printed and 'ValueError: bad: https://REDACTED@host/x' in printed


def test_a_config_file_with_a_secret_is_remembered(tmp_path):
  config_file.open_config('gpt_small').resolve({'data.path': 'https://a:hidden-six@host/x'}, cpu_only=True)
  assert redact('x hidden-six') == 'x REDACTED'
