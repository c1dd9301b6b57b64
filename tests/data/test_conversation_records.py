"""Records of conversations become documents with messages; what cannot be read is a bad record with the reason."""

import json
import re

import pytest

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
    {'chosen': '\n\nHuman: Q\n\nAssistant: A', 'rejected': '\n\nHuman: Q\n\nAssistant: B'},
])
def test_pairs_are_recognized(record):
  [document] = read(record)
  assert document == Document('d0', 'Q\n\nA\n\nB', messages=TURNS, rejected=(TURNS[0], ('assistant', 'B')))


def test_tools_and_system_are_kept():
  tool = {'role': 'tool', 'content': '{"x": 1}'}
  [document] = read({'messages': [ASK, SAY, tool, SAY], 'system': 'Be brief.'})
  assert document.messages == (('system', 'Be brief.'), *TURNS, ('tool', '{"x": 1}'), TURNS[1])


@pytest.mark.parametrize('record, reason', [
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
  for record, turns in (({'messages': [ASK, SAY], 'prompt': 'Q', 'n': 1}, TURNS),
                        ({'chosen': [ASK, SAY], 'rejected': [ASK, BAD], 'prompt': 'Q'}, TURNS)):
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), tmp_path / 'a.parquet')
    [document] = parquet(File('a', tmp_path / 'a.parquet'), SourceConfig())
    assert document.messages == turns and (document.rejected is None) == ('rejected' not in record)


def test_json_lines_mix_with_other_fields_that_hold_text(tmp_path):
  from llm_jax.data.formats.text import jsonl
  from llm_jax.data.sources.documents import File
  (tmp_path / 'a.jsonl').write_text(json.dumps({'text': 'x', 'title': 'y', 'messages': [ASK, SAY]}) + '\n')
  [document] = jsonl(File('a', tmp_path / 'a.jsonl'), SourceConfig())
  assert document.messages == TURNS
