"""A run of task chat: warm start from a model without its tokens, its folder, and what generates from it."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from serving import in_thread

from llm_jax import api, main
from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.base.sharding import MeshConfig, make_mesh
from llm_jax.base.trees import by_name
from llm_jax.commands import evaluate, export, generate
from llm_jax.config import Config
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.tokenizers.tokenizer import load_tokenizer
from llm_jax.extras.commands import chat, data_inspect
from llm_jax.training.growth import grow

CONFIG = '''
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = 300
  config.batch_tokens = config.tokens_per_device = 8 * 64
  config.model.num_layers = 1
  config.model.embed_dim = 32
  config.model.num_heads = 2
  config.model.positions = 'rope'
  config.data.path = {path!r}
  config.data.tokenizer = 'byte'
  config.data.seq_len = 64
  config.data.task = 'chat'
  config.data.packing = 'pad'
  config.data.split = 'count'
  config.data.val_documents = 1
  config.optim.learning_rate = 1e-2
  config.optim.warmup_cosine.warmup_steps = 5
  config.eval.sample_tokens = 2
  config.eval.prompts = ('ab',)
  config.eval.every = 300
  return config
'''
ANSWERS = {'ab': 'AB', 'cd': 'CD', 'ef': 'EF'}


def turns(*words):
  return {'messages': [turn for word in words for turn in (
      {'role': 'user', 'content': word}, {'role': 'assistant', 'content': ANSWERS[word]})]}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat')
  (folder / 'text.txt').write_text('ab cd ef AB CD EF user assistant\n' * 200)
  (folder / 'chat.jsonl').write_text(''.join(json.dumps(turns(*words)) + '\n' for words in (
      ('ab',), ('cd',), ('ef',), ('ab', 'cd'), ('cd', 'ef'), ('ef', 'ab')) for _ in range(20)))
  for name, path in (('text', 'text.txt'), ('chat', 'chat.jsonl')):
    (folder / f'{name}.py').write_text(CONFIG.format(path=str(folder / path)))
  main.main([f'--config={folder}/chat.py', f'--workdir={folder}/chat'])
  return folder


@pytest.fixture(scope='module')
def text(folder):
  """A run on plain text, without the tokens of the template."""
  main.main([f'--config={folder}/text.py', f'--workdir={folder}/text', '--config.num_steps=6', '--config.eval.every=0',
             '--config.data.task=next_token', '--config.data.packing=concat', '--config.data.split=tail'])
  return folder / 'text'


@pytest.mark.slow
def test_a_warm_start_says_that_the_vocabulary_grows(folder, text, capsys):
  main.main([f'--config={folder}/chat.py', f'--workdir={folder}/warm', f'--config.start.run={text}',
             '--config.num_steps=6', '--config.eval.every=0'])
  printed = capsys.readouterr().out
  assert 'the chat template chatml adds 2 token(s) to the vocabulary, from id 257: <|im_start|>, <|im_end|>' in printed
  assert 'the vocabulary grows from 257 to 259 tokens; the new rows of' in printed


@pytest.mark.slow
def test_new_rows_are_the_mean_of_the_old_ones(text):
  run = api.load(text).run
  old = by_name(run.params)
  like = {name: jax.ShapeDtypeStruct([259 if size == 257 else size for size in x.shape], x.dtype)
          for name, x in old.items()}
  new = dict(old)
  names = grow(new, like, run, 259)
  assert names == [name for name in sorted(old) if 257 in old[name].shape] != []
  for name in names:
    a, b = (np.moveaxis(np.asarray(x[name]), old[name].shape.index(257), 0) for x in (old, new))
    assert len(b) == 259 and (b[:257] == a).all()
    np.testing.assert_allclose(b[257:], np.stack([a.mean(0)] * 2), atol=1e-6)
  assert all(new[name] is old[name] for name in old if name not in names)


@pytest.mark.slow
def test_another_vocabulary_is_still_refused(folder, text):
  with pytest.raises(ConfigError, match=r'has another tokenizer; set --config.data.tokenizer=.*tokenizer.json'):
    main.main([f'--config={folder}/chat.py', f'--workdir={folder}/x', f'--config.start.run={folder}/text',
               '--config.data.tokenizer=char'])


def test_the_run_answers_and_stops(folder, capsys):
  for prompt, system, expected in (('ab', '', 'AB'), ('cd', '', 'CD')):
    generate.main([f'--workdir={folder}/chat', f'--prompt={prompt}', '--temperature=0', f'--system={system}'])
    assert capsys.readouterr().out == f'{expected}\n'
  with jax.set_mesh(make_mesh(MeshConfig())):
    trained = api.load(folder / 'chat')
    assert trained.generate((('user', 'ab'), ('assistant', 'AB'), ('user', 'cd')), temperature=0) == 'CD'


@pytest.mark.slow
def test_a_run_without_a_template_reads_no_messages(text):
  with pytest.raises(ConfigError, match='has no chat template'):
    generate.main([f'--workdir={text}', '--prompt=ab', '--system=x'])


def test_the_folder_and_an_export_keep_the_template(folder, tmp_path, capsys):
  export.main([f'--workdir={folder}/chat', f'--out={tmp_path}/out', '--weight_bits=32'])
  for place in (folder / 'chat', tmp_path / 'out'):
    assert '{%- generation %}' in (place / 'chat_template.jinja').read_text()
    assert json.loads((place / 'tokenizer_config.json').read_text())['eos_token'] == '<|im_end|>'
    assert len(load_tokenizer(place / 'tokenizer.json').token_bytes) == 259
  capsys.readouterr()
  generate.main([f'--workdir={tmp_path}/out', '--prompt=ef', '--temperature=0'])
  assert capsys.readouterr().out == 'EF\n'


def test_new_conversations_are_evaluated_by_the_run_s_template(folder, tmp_path, capsys):
  (tmp_path / 'new.jsonl').write_text(json.dumps(turns('cd', 'ab')) + '\n')
  evaluate.main([f'--workdir={folder}/chat', f'--data={tmp_path}/new.jsonl'])
  found = json.loads(capsys.readouterr().out)
  assert found['accuracy'] == 1 and found['tokens'] == 6  # two letters and the end of each turn


def test_a_run_needs_the_template_s_file_no_more(folder, tmp_path, capsys):
  shutil.copytree(folder / 'chat', tmp_path / 'run')
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  config['data']['chat']['template'] = str(tmp_path / 'moved.jinja')
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'new.jsonl').write_text(json.dumps(turns('cd', 'ab')) + '\n')
  evaluate.main([f'--workdir={tmp_path}/run', f'--data={tmp_path}/new.jsonl'])
  assert json.loads(capsys.readouterr().out)['accuracy'] == 1


def test_chat_remembers_the_conversation(folder, monkeypatch, capsys):
  lines = ['/temperature 0', 'ab', 'cd', '/system Be brief.', 'ab', '/new', 'x' * 60, '/help', '/quit']
  monkeypatch.setattr('sys.stdin', io.StringIO('\n'.join(lines) + '\n'))
  asked = []
  prompt = ChatTokenizer.prompt
  monkeypatch.setattr(ChatTokenizer, 'prompt', lambda self, messages: asked.append(messages) or prompt(self, messages))
  chat.main([f'--workdir={folder}/chat'])
  printed = capsys.readouterr().out
  assert 'AB\nCD\n' in printed and '/new starts a new conversation' in printed and '/system TEXT' in printed
  del asked[0]  # the empty prompt, which is tried before the weights are read
  assert asked[1] == (('user', 'ab'), ('assistant', 'AB'), ('user', 'cd'))
  assert asked[2] == (('system', 'Be brief.'), ('user', 'ab')) and asked[3] == (asked[2][0], ('user', 'x' * 60))


def test_serve_answers_conversations(folder):
  pytest.importorskip('uvicorn')
  pytest.importorskip('starlette')
  before = [{'role': 'user', 'content': 'ab'}, {'role': 'assistant', 'content': 'AB'}]
  with in_thread(folder / 'chat') as client:
    for messages, expected in (([*before, {'role': 'user', 'content': 'cd'}], 'CD'), (before[:1], 'AB')):
      answer = json.loads(client.send('/v1/chat/completions', {'messages': messages, 'temperature': 0}).read())
      [choice] = answer['choices']
      assert choice['message'] == {'role': 'assistant', 'content': expected, 'refusal': None}
      assert choice['finish_reason'] == 'stop' and answer['usage']['completion_tokens'] == 3
    for wrong in ([], before, [{'role': 'narrator', 'content': 'x'}], [{'role': 'user', 'content': None}]):
      response = client.send('/v1/chat/completions', {'messages': wrong})
      assert response.status == 400 and json.loads(response.read())['error']['param'] == 'messages'
    [choice] = client.complete(prompt='ef', temperature=0)['choices']  # a prompt is a message of the user
    assert choice['text'] == 'EF'


def test_inspect_shows_what_is_learnt(folder, capsys):
  data_inspect.main([f'--config={folder}/chat.py', '--rows=1'])
  printed = capsys.readouterr().out
  assert '<|im_start|>|u|s|e|r|\\n|' in printed and '|\\n|⟦' in printed and '|<|im_end|>⟧|\\n' in printed


def test_next_token_on_pairs_is_refused():
  with pytest.raises(ConfigError, match='would learn the rejected answers'):
    build(Config, {'data': {'task': 'preference', 'packing': 'pad'}})
