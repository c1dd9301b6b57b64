"""Records of conversations become documents with messages; what cannot be read is a bad record with the reason."""

import json
import re

import pytest

from llm_jax.data.chat.records import conversations_of
from llm_jax.data.formats.records import to_documents
from llm_jax.data.sources.documents import BadRecord, Document, SourceConfig

ASK, SAY = {'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A'}
BAD = {'role': 'assistant', 'content': 'B'}
TURNS = (('user', 'Q'), ('assistant', 'A'))


def read(*records, **settings):
  return list(to_documents(((f'd{i}', f'line {i}', r) for i, r in enumerate(records)), SourceConfig(**settings)))


@pytest.mark.parametrize('record, settings', [
    ({'messages': [ASK, SAY]}, {}),
    ({'conversations': [{'from': 'human', 'value': 'Q'}, {'from': 'gpt', 'value': 'A'}], 'id': 'x'}, {}),
    ({'prompt': [ASK], 'completion': [SAY]}, {}),
    ({'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'Q'}]}, SAY], 'source': 'web'}, {}),
    ({'turns': [ASK, SAY], 'text': 'other'}, {'field': 'turns'}),
    ({'prompt': [ASK], 'completion': [SAY], 'text': 'other'}, {'field': 'prompt+completion'}),
    ({'messages': [ASK, SAY | {'name': 'Ann', 'reasoning_content': None}], 'prompt': 'Q', 'model': 'm'}, {}),
    ({'ask': [ASK], 'say': [SAY]}, {'field': 'ask', 'answer_field': 'say'}),
])
def test_conversations_are_recognized(record, settings):
  [document] = read(record, **settings)
  assert document == Document('d0', 'Q\n\nA', messages=TURNS)


@pytest.mark.parametrize('record', [
    {'chosen': [ASK, SAY], 'rejected': [ASK, BAD]},
    {'chosen': [ASK, SAY], 'rejected': [ASK, BAD], 'prompt': 'Q', 'messages': [ASK, SAY], 'score': 0.5},
    {'prompt': [ASK], 'chosen': [SAY], 'rejected': [BAD]},
    {'prompt': 'Q', 'chosen': 'A', 'rejected': 'B'},
    {'question': 'Q', 'chosen': 'A', 'rejected': 'B', 'system': ''},
    {'instruction': 'Q', 'input': '', 'chosen': 'A', 'rejected': 'B'},
    {'chosen': '\n\nHuman: Q\n\nAssistant: A', 'rejected': '\n\nHuman: Q\n\nAssistant: B'},
])
def test_pairs_are_recognized(record):
  [document] = read(record)
  assert document == Document('d0', 'Q\n\nA\n\nB', messages=TURNS, rejected=(TURNS[0], ('assistant', 'B')))


def test_tools_and_system_are_kept():
  tool = {'role': 'tool', 'content': '{"x": 1}'}
  [document] = read({'messages': [ASK, SAY, tool, SAY], 'system': 'Be brief.'})
  assert document.messages == (('system', 'Be brief.'), *TURNS, ('tool', '{"x": 1}'), TURNS[1])


@pytest.mark.parametrize('record, settings', [
    ({'messages': [ASK, SAY]}, {}),
    ({'messages': [{'role': 'system', 'content': 'S'}, ASK, SAY]}, {}),
    ({'turns': [ASK, SAY]}, {'field': 'turns'}),
    ({'prompt': [ASK], 'completion': [SAY]}, {}),
    ({'ask': [ASK], 'say': [SAY]}, {'field': 'ask', 'answer_field': 'say'}),
    ({'question': 'Q', 'chosen': 'A', 'rejected': 'B'}, {}),
    ({'prompt': [ASK], 'chosen': [SAY], 'rejected': [BAD]}, {}),
    ({'chosen': [ASK, SAY], 'rejected': [ASK, BAD], 'text': 'other'}, {'field': 'chosen+rejected'}),
    ({'ask': 'Q', 'chosen': 'A', 'rejected': 'B', 'text': 'other'}, {'field': 'system+ask+chosen+rejected'}),
    ({'prompt': 'Q', 'completion': 'A'}, {}),
    ({'instruction': 'Q', 'output': 'A'}, {'join': ' '}),
    ({'ask': 'Q', 'say': 'A'}, {'field': 'system+ask', 'answer_field': 'say'}),
    ({'instruction': 'Q', 'context': '', 'response': 'A'}, {}),
])
@pytest.mark.parametrize('key', ['system', 'system_prompt'])
def test_a_system_field_is_the_first_message_of_every_form(record, settings, key):
  settings = {name: value.replace('system', key) for name, value in settings.items()}
  [document] = read({key: 'S', **record}, **settings)
  turns, *others = conversations_of(document)
  assert turns == (('system', 'S'), *TURNS)
  assert others == ([(*turns[:2], ('assistant', 'B'))] if 'chosen' in record else [])


def test_the_parts_of_a_question_stay_joined_after_its_system_prompt():
  [document] = read({'system': 'S', 'instruction': 'Do', 'input': 'this', 'output': 'A'})
  assert document.text == 'S\nDo\nthis'
  assert conversations_of(document) == [(('system', 'S'), ('user', 'Do\nthis'), TURNS[1])]
  [pair] = read({'instruction': 'Do', 'input': 'this', 'chosen': 'A', 'rejected': 'B'})
  assert pair.messages == (('user', 'Do\nthis'), TURNS[1])


@pytest.mark.parametrize('record, names, setting', [
    ({'messages': [ASK, SAY], 'context': 'c', 'instruction': 'i', 'id': 'x'}, 'context, instruction', 'messages'),
    ({'messages': [ASK, SAY], 'tools': [{'name': 'f'}]}, 'tools', 'messages'),
    ({'prompt': [ASK], 'completion': [SAY], 'context': 'c'}, 'context', 'prompt+completion'),
    ({'question': 'Q', 'chosen': 'A', 'rejected': 'B', 'context': 'c'}, 'context', 'chosen+rejected+question'),
    ({'chosen': [ASK, SAY], 'rejected': [ASK, BAD], 'messages': [ASK, SAY | {'content': 'C'}]}, 'messages',
     'chosen+rejected'),
    ({'chosen': [ASK, SAY], 'rejected': [ASK, BAD], 'prompt': 'P'}, 'the prompt', 'chosen+rejected'),
])
def test_text_beside_a_conversation_is_refused_unless_the_fields_are_named(record, names, setting):
  [found] = read(record)
  assert isinstance(found, BadRecord) and found.why.startswith(f'{names} would be left out'), found
  assert f'config.data.field={setting} to leave' in found.why
  [document] = read(record, field=setting)
  assert document.messages == TURNS


def test_named_prompts_of_a_pair_are_joined_in_their_order():
  record = {'context': 'c', 'question': 'Q', 'chosen': 'A', 'rejected': 'B'}
  [document] = read(record, field='chosen+rejected+context+question', join=' / ')
  assert document.messages == (('user', 'c / Q'), TURNS[1])
  assert isinstance(read({**record, 'question': 7}, field='question+chosen+rejected')[0], BadRecord)


@pytest.mark.parametrize('record, reason', [
    ({'messages': [ASK, SAY | {'reasoning_content': 'hm'}]},
     "message 2 of field 'messages' holds text in reasoning_content, .*write it into content"),
    ({'messages': [{'role': 'system', 'content': 'T'}, ASK, SAY], 'system': 'S'}, "first message, .*'system', differ"),
    ({'messages': []}, 'empty list'),
    ({'messages': [ASK]}, 'no turn of an assistant'),
    ({'messages': [ASK, {'role': 'narrator', 'content': 'A'}]},
     "message 2 of field 'messages' has the role 'narrator'"),
    ({'messages': [ASK, {'role': 'assistant', 'content': None}]}, 'holds None as content'),
    ({'messages': [ASK, {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 1}]}]}, 'calls a tool'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}, SAY]}, "part of type 'image_url'"),
    ({'messages': [{'role': 'user', 'content': 'a\U00100000'}, SAY]}, r'U\+100000'),
    ({'messages': [{'role': 'user', 'content': 'a\udcff'}, SAY]}, 'surrogates not allowed'),
    ({'messages': [{'role': 'user', 'content': 'x' * 200}, SAY]}, 'max_record_bytes'),
    ({'chosen': [ASK, SAY], 'rejected': [ASK, SAY]}, 'are equal'),
    ({'chosen': 'A', 'rejected': 'B'}, 'no field with the prompt'),
    ({'chosen': [ASK, SAY], 'rejected': [ASK]}, 'holds no turn|answer of the assistant of their own'),
])
def test_what_cannot_be_learnt_is_a_bad_record(record, reason):
  [found] = read(record, max_record_bytes=100)
  assert isinstance(found, BadRecord) and re.search(reason, found.why), found


def test_parquet_columns_of_conversations_are_read(tmp_path):
  pa = pytest.importorskip('pyarrow')
  import pyarrow.parquet

  from llm_jax.data.sources.documents import File
  from llm_jax.extras.formats.columnar import parquet
  left = {'messages': [ASK, SAY], 'context': 'c'}
  pyarrow.parquet.write_table(pa.Table.from_pylist([left]), tmp_path / 'a.parquet')
  [bad] = parquet(File('a', tmp_path / 'a.parquet'), SourceConfig())
  assert isinstance(bad, BadRecord) and 'context would be left out' in bad.why
  for record, turns in (({'messages': [ASK, SAY], 'prompt': 'Q', 'n': 1}, TURNS),
                        ({'system': 'S', 'turns': [ASK, SAY], 'text': 'x'}, (('system', 'S'), *TURNS)),
                        ({'chosen': [ASK, SAY], 'rejected': [ASK, BAD], 'prompt': 'Q'}, TURNS)):
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), tmp_path / 'a.parquet')
    [document] = parquet(File('a', tmp_path / 'a.parquet'), SourceConfig(field='turns' if 'turns' in record else None))
    assert document.messages == turns and (document.rejected is None) == ('rejected' not in record)


def test_named_conversations_of_json_lines_leave_out_other_text(tmp_path):
  from llm_jax.data.formats.text import jsonl
  from llm_jax.data.sources.documents import File
  (tmp_path / 'a.jsonl').write_text(json.dumps({'text': 'x', 'title': 'y', 'messages': [ASK, SAY]}) + '\n')
  [document] = jsonl(File('a', tmp_path / 'a.jsonl'), SourceConfig(field='messages'))
  assert document.messages == TURNS
