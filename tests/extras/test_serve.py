"""llm-jax serve as a real process, with raw requests and the openai client."""

import asyncio
import hashlib
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import serving

from llm_jax import api
from llm_jax.base.errors import ConfigError
from llm_jax.data.tokenizers.tokenizer import ByteTokenizer, before_eos, decode
from llm_jax.infer import sampling

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')

from llm_jax.extras.commands import serve
from llm_jax.extras.serving.hosts import OnlyHosts, allowed_hosts, check_host
from llm_jax.extras.serving.texts import Text


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return serving.train(tmp_path_factory.mktemp('serve'))


@pytest.fixture(scope='module')
def server(run):
  with serving.served(run) as client:
    yield client


@pytest.fixture(scope='module')
def trained(run):
  return api.load(run)


OPTIONS = {'prompt': 'def ', 'max_tokens': 12, 'temperature': 0.7}


def test_the_same_seed_gives_the_text_of_generate(server, trained):
  tokenizer, [ids] = trained.run.tokenizer, trained.run.tokenizer.encode(['def '])
  for seed in (1, 2):
    options = {'temperature': 0.9, 'top_p': 0.5, 'seed': seed}
    answer = server.complete(prompt='def ', max_tokens=40, model='tiny', **options)
    assert answer['object'] == 'text_completion' and answer['model'] == 'tiny'
    row = [int(column[0]) for column in trained.tokens('def ', num_tokens=40, **options)]
    num_tokens = row.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in row else len(row)
    [choice] = answer['choices']
    assert choice['text'] == decode(tokenizer, before_eos(tokenizer, row))
    assert choice['finish_reason'] == ('stop' if tokenizer.eos_id in row else 'length')
    assert answer['usage'] == {'prompt_tokens': len(ids) + 1, 'completion_tokens': num_tokens,  # with bos and eos
                               'total_tokens': len(ids) + 1 + num_tokens}
  assert server.complete(**OPTIONS)['choices'] != server.complete(**OPTIONS)['choices']  # without a seed


def test_several_prompts_and_samples_come_in_order(server):
  request = {'n': 2, 'max_tokens': 20, 'temperature': 0.9}
  together = server.complete(prompt=['def ', ''], seed=7, **request)
  alone = [server.complete(prompt=prompt, seed=7 + i, **request) for i, prompt in enumerate(['def ', ''])]
  choices = [choice for answer in alone for choice in answer['choices']]
  assert together['choices'] == [choice | {'index': i} for i, choice in enumerate(choices)]
  assert len({choice['text'] for choice in choices}) == 4
  assert together['usage'] == {name: sum(answer['usage'][name] for answer in alone) for name in together['usage']}


@pytest.mark.parametrize('more', [{}, {'echo': True}, {'n': 2}, {'stop': ['e', 'th']}], ids=str)
def test_a_stream_has_the_texts_of_the_whole_answer(server, more):
  request = OPTIONS | {'seed': 3, 'max_tokens': 40} | more
  whole = server.complete(**request)
  *events, last = server.stream('/v1/completions', **request, stream_options={'include_usage': True})
  assert last['usage'] == whole['usage'] and last['choices'] == []
  assert {event['id'] for event in events} == {last['id']}
  for choice in whole['choices']:
    parts = [c for event in events for c in event['choices'] if c['index'] == choice['index']]
    assert ''.join(part['text'] for part in parts) == choice['text']
    assert [part['finish_reason'] for part in parts] == [None] * (len(parts) - 1) + [choice['finish_reason']]
    assert choice['text'].startswith('def ') == ('echo' in more)


def test_generation_ends_at_a_stop_string(server):
  request = OPTIONS | {'seed': 5, 'max_tokens': 40}
  full = server.complete(**request)
  text = full['choices'][0]['text']
  stop = text[len(text) // 2:][:3]
  cut = server.complete(**request, stop=['never in it', stop])
  assert cut['choices'][0] == full['choices'][0] | {'text': text[:text.index(stop)], 'finish_reason': 'stop'}
  assert cut['usage']['completion_tokens'] < full['usage']['completion_tokens'] == 40


def test_texts_are_cut_at_the_first_stop_string_that_is_complete():
  seed = random.randrange(1 << 30)
  print('seed', seed)
  rng = random.Random(seed)
  for _ in range(500):
    full = ''.join(rng.choices('abé', k=rng.randrange(12)))
    stop = tuple(''.join(rng.choices('abé', k=rng.randrange(1, 4))) for _ in range(rng.randrange(3)))
    text = Text(ByteTokenizer(), stop)
    parts = []
    for byte in full.encode():
      if text.finish is None:
        parts.append(text.add(byte))
    if text.finish is None:
      parts.append(text.end('length'))
    prefixes = (full[:size] for size in range(len(full) + 1))
    expected = next((min(p.index(s) for s in stop if s in p) for p in prefixes if any(s in p for s in stop)), None)
    assert ''.join(parts) == full[:expected], (full, stop)
    assert text.finish == ('length' if expected is None else 'stop')


def test_a_full_context_ends_a_text(server, trained):
  [ids] = trained.run.tokenizer.encode(['x = 1\n' * 100])
  answer = server.complete(prompt='x = 1\n' * (100 * 505 // len(ids)), max_tokens=10 ** 9, seed=0)
  assert answer['choices'][0]['finish_reason'] == 'length'
  assert answer['usage']['total_tokens'] == 512


def test_a_prompt_longer_than_the_context_is_continued_from_its_end(server):
  usage = server.complete(prompt='x' * 9000, max_tokens=30, seed=0)['usage']
  assert usage['prompt_tokens'] == 512 - 30 and usage['completion_tokens'] <= 30


ERRORS = [
    ({'model': 'gpt-4'}, 404, 'model', "must be 'tiny'"),
    ({'temperature': -1}, 400, 'temperature', 'at least 0; got -1'),
    (b'{"temperature": NaN}', 400, None, 'NaN is not a JSON value'),
    ({'temperature': 'hot'}, 400, 'temperature', '"hot"'), (b'{"temperature": 1e999}', 400, 'temperature', 'finite'),
    ({'temperature': True}, 400, 'temperature', 'got true'), ({'top_p': 0}, 400, 'top_p', 'in (0, 1]'),
    ({'n': 17}, 400, 'n', 'from 1 to 16'), ({'n': 1.0}, 400, 'n', 'integer'),
    ({'max_tokens': 0}, 400, 'max_tokens', 'at least 1; got 0'), ({'logprobs': 0}, 400, 'logprobs', 'not supported'),
    ({'prompt': [1, 2]}, 400, 'prompt', 'token ids'), ({'prompt': []}, 400, 'prompt', 'list of strings'),
    ({'prompt': '\ud800'}, 400, 'prompt', 'lone surrogate'),
    ({'prompt': [''] * 100, 'n': 2}, 400, 'prompt', 'more than 128 texts'),
    ({'stop': ''}, 400, 'stop', 'none of them empty'), ({'stop': list('abcde')}, 400, 'stop', 'up to 4'),
    ({'seed': 'a'}, 400, 'seed', 'an integer'), ({'temprature': 1}, 400, 'temprature', "did you mean 'temperature'?"),
    ({'stream': 1}, 400, 'stream', 'true or false'),
    ({'presence_penalty': 0.5}, 400, 'presence_penalty', 'not supported'),
    ({'best_of': 3}, 400, 'best_of', 'not supported'), (b'[]', 400, None, 'must be a JSON object'),
    (b'{', 400, None, 'not JSON'), (b'\xff', 400, None, 'not JSON'), (b'[' * 100_000, 400, None, 'not JSON'),
    (b' ' * (5 << 20), 413, None, 'longer than'),
]


@pytest.mark.parametrize(('body', 'status', 'param', 'message'), ERRORS, ids=lambda x: str(x)[:40])
def test_bad_requests_get_an_error_in_openais_form(server, body, status, param, message):
  response = server.send('/v1/completions', body)
  error = json.loads(response.read())['error']
  assert response.status == status and error['param'] == param and message in error['message'], error
  assert error['type'] == 'invalid_request_error' and set(error) == {'message', 'type', 'param', 'code'}


def test_parameters_without_effect_are_accepted(server):
  server.complete(prompt='a', max_tokens=1, logprobs=None, best_of=1, presence_penalty=0, frequency_penalty=0.0,
                  logit_bias={}, suffix=None, user='me', stop=None, stream_options=None, seed=-(1 << 70))


def test_other_endpoints(server):
  assert server.get('/health') == {'status': 'ok', 'model': 'tiny', 'step': 3, 'waiting': 0}
  [model] = server.get('/v1/models')['data']
  assert model['id'] == 'tiny' and model['max_model_len'] == 512 and server.get('/v1/models/tiny') == model
  for path, body, status in (('/v1/models/x', None, 404), ('/nowhere', None, 404), ('/v1/completions', None, 405),
                             ('/v1/chat/completions', {'messages': [{'role': 'user', 'content': 'a'}]}, 400)):
    response = server.send(path, body)
    error = json.loads(response.read())['error']
    assert response.status == status and error['message']
  assert 'use /v1/completions' in error['message']


def test_other_web_pages_cannot_use_the_server(server):
  """By DNS rebinding, by a request that needs no permission, or by reading the answer."""
  for host, name in (('Evil.example:80', 'evil.example'), ('[::2]', '::2')):
    response = server.send('/v1/models', Host=host)
    message = json.loads(response.read())['error']['message']
    assert response.status == 400
    assert message == f'Host {host!r} is not a name of this server; start it with --allow_host={name}'
  assert server.send('/v1/models', Host='x@localhost').status == 400
  assert server.send('/v1/models', Host='LOCALHOST').status == server.send('/v1/models', Host='[::1]:1').status == 200
  assert server.send('/v1/completions', {'prompt': ''}, **{'Content-Type': 'text/plain'}).status == 415
  response = server.send('/health', Origin='http://evil.example')
  assert not [name for name in response.headers if name.lower().startswith('access-control')]
  page = server.send('/')
  assert page.headers['content-security-policy'].startswith("default-src 'none'")
  assert b'src=' not in page.read()


def test_concurrent_clients_each_get_their_own_answer(server):
  requests = [OPTIONS | {'seed': seed, 'max_tokens': 30, 'stop': stop} for seed in range(4) for stop in (None, 'e')]
  expected = [server.complete(**request)['choices'] for request in requests]
  with ThreadPoolExecutor(serving.MAX_WAITING) as threads:
    found = list(threads.map(lambda request: server.complete(**request)['choices'], requests))
  assert found == expected and len({str(choices) for choices in found}) > 4


def seconds_of_a_request(server):
  begin = time.monotonic()
  server.complete(prompt='', max_tokens=1)
  return time.monotonic() - begin


def test_a_client_that_disconnects_ends_its_request(server):
  """Whether it is streamed, not streamed, or still waiting."""
  running = server.begin(**serving.LONG)
  waiting = server.send('/v1/completions', serving.LONG | {'stream': True})
  assert server.get('/health')['waiting'] == 1
  waiting.connection.close()
  waiting.close()
  running.connection.close()
  running.close()
  assert seconds_of_a_request(server) < 5


def test_a_client_that_disconnects_ends_its_request_without_a_stream(server):
  client = serving.http.client.HTTPConnection(server.address.removeprefix('http://'))
  client.request('POST', '/v1/completions', json.dumps(serving.LONG), {'Content-Type': 'application/json'})
  time.sleep(0.5)
  client.close()
  assert seconds_of_a_request(server) < 5


def test_a_full_queue_is_answered_at_once_with_503(server):
  begun = [server.begin(**serving.LONG)]
  begun += [server.send('/v1/completions', serving.LONG | {'stream': True}) for _ in range(serving.MAX_WAITING)]
  refused = server.send('/v1/completions', {'prompt': ''})
  assert refused.status == 503 and refused.headers['retry-after'] == '1'
  assert json.loads(refused.read())['error']['code'] == 'overloaded'
  for response in begun:
    response.connection.close()
    response.close()
  assert seconds_of_a_request(server) < 5


def test_the_printed_lines_work(server, monkeypatch, capsys):
  assert server.printed.startswith('tiny, step 3, as model tiny\n')
  [curl] = [line for line in server.printed.splitlines() if line.startswith('curl ')]
  if shutil.which('curl'):
    done = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)['usage']['completion_tokens'] > 0
  pytest.importorskip('openai')
  exec(server.printed[server.printed.index('import openai'):server.printed.index('ready:')], {})
  assert capsys.readouterr().out.strip()


def test_the_openai_client(server):
  openai = pytest.importorskip('openai')

  def client():
    return openai.OpenAI(base_url=f'{server.address}/v1', api_key='none', max_retries=0, timeout=60)

  assert [model.id for model in client().models.list()] == ['tiny']
  request = OPTIONS | {'model': 'tiny', 'max_tokens': 30}
  expected = [server.complete(**request, seed=seed)['choices'][0]['text'] for seed in range(4)]
  found = {}

  def ask(seed):
    if seed % 2:
      found[seed] = client().completions.create(**request, seed=seed).choices[0].text
    else:
      found[seed] = ''.join(chunk.choices[0].text for chunk in client().completions.create(
          **request, seed=seed, stream=True))

  threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [found[seed] for seed in range(4)] == expected
  with pytest.raises(openai.BadRequestError, match='temperature: must be') as e:
    client().completions.create(model='tiny', prompt='', temperature=-1)
  assert e.value.param == 'temperature'
  with pytest.raises(openai.NotFoundError) as e:
    client().completions.create(model='gpt-4', prompt='')
  assert e.value.code == 'model_not_found'
  begun = [server.begin(**serving.LONG)]
  begun += [server.send('/v1/completions', serving.LONG | {'stream': True}) for _ in range(serving.MAX_WAITING)]
  with pytest.raises(openai.InternalServerError, match='try again later'):
    client().completions.create(model='tiny', prompt='')
  for response in begun:
    response.connection.close()
    response.close()


def test_a_port_that_is_taken_is_one_message(server, run):
  port = server.address.rpartition(':')[2]
  with pytest.raises(ConfigError, match=f'--port={port}: cannot listen there: Address already in use; set another'):
    serve.main([f'--workdir={run}', '--checkpoint=none', f'--port={port}'])  # before the run is loaded
  with pytest.raises(ConfigError, match='--port: must be in 0 to 65535; got 70000'):
    serve.main([f'--workdir={run}', '--port=70000'])


def test_code_in_the_folder_is_executed_only_with_trust(run, tmp_path):
  copy = shutil.copytree(run, tmp_path / 'run')
  (copy / 'plugins').mkdir()
  (copy / 'plugins' / 'lab.py').write_text(f'from pathlib import Path\nPath({str(tmp_path / "mark")!r}).touch()\n')
  (copy / 'plugins.json').write_text(json.dumps([{
      'name': 'lab', 'path': 'lab.py', 'sha256': hashlib.sha256((copy / 'plugins/lab.py').read_bytes()).hexdigest()}]))
  with pytest.raises(ConfigError, match=r'pass it again with --plugin=lab\.py, or .* with --trust'):
    serve.main([f'--workdir={copy}', '--port=0'])
  assert not (tmp_path / 'mark').exists()


def test_hosts_that_requests_may_name():
  local = {'127.0.0.1', 'localhost', '::1'}
  assert allowed_hosts('127.0.0.1', []) == local and '*' not in allowed_hosts('0.0.0.0', ['lab'])
  assert local | {'lab'} <= allowed_hosts('0.0.0.0', ['lab']) - {'0.0.0.0'}
  assert [check_host(name) for name in ('Lab', '10.0.0.1', '0::1', '*.lab.example')] == [
      'lab', '10.0.0.1', '::1', '*.lab.example']


@pytest.mark.parametrize('name', ['*', 'a*b', '*.', 'a.*', 'http://x', 'x:80', '[::1]', 'a b', '', 'a..b', '-a', 'é'])
def test_a_name_that_no_request_can_have_is_refused_before_the_run_is_loaded(name, run):
  with pytest.raises(ConfigError, match='--allow_host: must be a host name, an IP address') as e:
    serve.main([f'--workdir={run}', '--checkpoint=none', '--port=0', f'--allow_host={name}'])
  assert str(e.value).endswith(f'got {name!r}')


def test_names_below_a_name():
  async def answer(scope, receive, send):
    sent.append(scope['headers'])

  async def ignore(message):
    pass

  sent = []
  for host in (b'a.lab:80', b'a.b.LAB', b'lab', b'xlab', b'a.lab.x', b''):
    asyncio.run(OnlyHosts(answer, frozenset({'*.lab'}))({'type': 'http', 'headers': [(b'host', host)]}, None, ignore))
  assert sent == [[(b'host', b'a.lab:80')], [(b'host', b'a.b.LAB')]]


def test_the_printed_address_is_one_that_is_served():
  assert serve.url('0.0.0.0', 1) == 'http://127.0.0.1:1' and serve.url('::1', 2) == 'http://[::1]:2'
  if socket.has_ipv6:
    with serve.listen('::', 0) as listener:
      address = urlsplit(serve.url('::', listener.getsockname()[1]))
      socket.create_connection((address.hostname, address.port)).close()


STUCK = """
import asyncio, time
from llm_jax.extras.commands.serve import end
from llm_jax.extras.serving.worker import Worker

async def main(worker):
  job = worker.submit(lambda: time.sleep(60))
  while not job.future.running():
    await asyncio.sleep(0.01)
  worker.close()

worker = Worker(1)
asyncio.run(main(worker))
end(worker)
"""


def test_the_server_ends_while_a_request_compiles():
  done = subprocess.run([sys.executable, '-c', STUCK], capture_output=True, text=True, timeout=30)
  assert done.returncode == 0 and done.stdout == 'stopped\n', done.stderr


def test_all_values_of_an_option_share_a_program(trained):
  def compiled(**options):
    before = sampling._prefill._cache_size()
    list(trained.tokens('def ', num_tokens=1, **options))
    return sampling._prefill._cache_size() - before

  for _ in range(2):  # JAX may note the second call of a program apart, without compiling it again
    compiled(), compiled(temperature=0), compiled(top_p=0.5), compiled(top_k=3)
  assert compiled(temperature=0.3) == compiled(temperature=0, top_p=0.5, top_k=3) == compiled(top_p=0.7) == 0
  assert compiled(top_k=10 ** 6) == 1 and compiled(top_k=10 ** 30) == 0


@pytest.mark.parametrize('seed', [-1, 1 << 32, 10 ** 20])
def test_a_seed_outside_32_bits_is_refused(seed, trained):
  with pytest.raises(ConfigError, match=f'--seed must be in 0 to 4294967295; got {seed}'):
    trained.tokens('def ', seed=seed)
