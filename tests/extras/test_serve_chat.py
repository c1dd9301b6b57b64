"""Chat completions, which a run that learned answers to prompts has; the server runs in a thread of this process."""

import json

import pytest
from serving import in_thread

from llm_jax import main

pytest.importorskip('uvicorn')
pytest.importorskip('starlette')

from llm_jax.extras.serving import app

CONFIG = '''
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = 60
  config.batch_tokens = config.tokens_per_device = 8 * 16
  config.model.num_layers = 1
  config.model.embed_dim = 32
  config.model.num_heads = 2
  config.data.path = {path!r}
  config.data.answer_field = 'answer'
  config.data.tokenizer = 'byte'
  config.data.task = 'prompt_answer'
  config.data.packing = 'pad'
  config.data.seq_len = 16
  config.data.val_fraction = 0.0  # the documents are copies of three
  config.optim.learning_rate = 1e-2
  config.optim.warmup_cosine.warmup_steps = 5
  config.eval.sample_tokens = 0
  config.eval.every = 0
  return config
'''


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  folder = tmp_path_factory.mktemp('serve_chat')
  lines = [json.dumps({'text': f'{word}?', 'answer': word.upper()}) for word in ('ab', 'cd', 'ef') for _ in range(20)]
  (folder / 'pairs.jsonl').write_text('\n'.join(lines) + '\n')
  (folder / 'tiny.py').write_text(CONFIG.format(path=str(folder / 'pairs.jsonl')))
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/pairs'])
  with in_thread(folder / 'pairs') as client:
    yield client


def ask(content, **more):
  return {'model': 'pairs', 'messages': [{'role': 'user', 'content': content}], 'temperature': 0} | more


def test_the_one_user_message_is_answered(server):
  for content in ('ab?', [{'type': 'text', 'text': 'ab'}, {'type': 'text', 'text': '?'}]):
    answer = json.loads(server.send('/v1/chat/completions', ask(content)).read())
    [choice] = answer['choices']
    assert choice['message']['role'] == 'assistant' and choice['message']['content'] == 'AB'
    assert choice['finish_reason'] == 'stop' and answer['object'] == 'chat.completion'
    assert answer['usage'] == {'prompt_tokens': 4, 'completion_tokens': 3, 'total_tokens': 7}
  [choice] = server.complete(prompt='cd?', temperature=0)['choices']
  assert choice['text'] == 'CD'


def test_a_stream_begins_with_the_role(server):
  events = server.stream('/v1/chat/completions', **ask('ef?', max_completion_tokens=1))
  deltas = [event['choices'][0]['delta'] for event in events]
  assert deltas[0]['role'] == 'assistant' and ''.join(delta['content'] for delta in deltas) == 'E'
  assert events[-1]['choices'][0]['finish_reason'] == 'length' and events[0]['object'] == 'chat.completion.chunk'


@pytest.mark.parametrize(('change', 'param'), [
    ({'messages': []}, 'messages'), ({'messages': None}, 'messages'), ({'tools': [{}]}, 'tools'),
    ({'messages': [{'role': 'system', 'content': 'a'}, {'role': 'user', 'content': 'a'}]}, 'messages'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages'), ({'prompt': 'a'}, 'prompt'),
    ({'logprobs': True}, 'logprobs'), ({'response_format': {'type': 'json_object'}}, 'response_format')], ids=str)
def test_what_is_not_supported_is_an_error(server, change, param):
  response = server.send('/v1/chat/completions', ask('ab?') | change)
  assert response.status == 400 and json.loads(response.read())['error']['param'] == param


def test_a_body_that_does_not_arrive_in_time_is_answered_with_408(server, monkeypatch):
  monkeypatch.setattr(app, 'BODY_SECONDS', 0.2)
  response = server.send_half().getresponse()
  assert response.status == 408 and response.headers['connection'] == 'close'
  assert json.loads(response.read())['error']['message'] == 'the body did not arrive within 0.2 seconds'


def test_the_openai_client_chats(server):
  openai = pytest.importorskip('openai')
  client = openai.OpenAI(base_url=f'{server.address}/v1', api_key='none', max_retries=0)
  assert client.chat.completions.create(**ask('cd?')).choices[0].message.content == 'CD'
  chunks = client.chat.completions.create(**ask('cd?'), stream=True)
  assert ''.join(chunk.choices[0].delta.content for chunk in chunks) == 'CD'
