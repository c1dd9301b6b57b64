"""Fields of records: no text is left out in silence, paths reach into objects, odd values matter only where used."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from llm_jax.base.errors import DataError
from llm_jax.data.formats.text import jsonl
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.extras.formats.columnar import arrow, parquet
from llm_jax.extras.formats.text_tables import csv_file, json_file


def write_jsonl(path, rows):
  path.write_text(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows))


def write_json(path, rows):
  path.write_text(json.dumps(rows))


def write_parquet(path, rows):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_arrow(path, rows):
  table = pyarrow.Table.from_pylist(rows)
  with pyarrow.ipc.new_file(path, table.schema) as writer:
    writer.write_table(table)


FORMATS = {'jsonl': (write_jsonl, jsonl), 'json': (write_json, json_file), 'parquet': (write_parquet, parquet),
           'arrow': (write_arrow, arrow)}
every_format = pytest.mark.parametrize('kind', FORMATS)


def read(kind, folder, rows, **config):
  write, reader = FORMATS[kind]
  write(folder / f'x.{kind}', rows)
  return list(reader(File(f'x.{kind}', folder / f'x.{kind}'), SourceConfig(**config)))


def pairs(documents):
  assert all(isinstance(d, Document) for d in documents), documents
  return [(d.text, d.answer) for d in documents]


@every_format
@pytest.mark.parametrize(('row', 'prompt', 'answer'), [
    ({'instruction': 'Do', 'input': 'this', 'output': 'done'}, 'Do\nthis', 'done'),
    ({'instruction': 'Do', 'context': 'here', 'response': 'ok', 'category': 'x'}, 'Do\nhere', 'ok'),
    ({'instruction': 'Do', 'input': '', 'output': 'done'}, 'Do', 'done'),
    ({'instruction': 'Do', 'output': 'done'}, 'Do', 'done'),
    ({'system': 'Be kind', 'prompt': 'Hi', 'completion': 'Ho'}, 'Be kind\nHi', 'Ho'),
    ({'output': 'b', 'input': 'a', 'instruction': 'i', 'system': 's'}, 's\ni\na', 'b'),
    ({'question': 'q', 'answer': 'a', 'id': 'x7'}, 'q', 'a')])
def test_all_parts_of_a_known_prompt_are_joined(kind, row, prompt, answer, tmp_path):
  assert pairs(read(kind, tmp_path, [row] * 2)) == [(prompt, answer)] * 2


def test_the_parts_of_each_prompt_are_those_that_its_record_has(tmp_path, capsys):
  rows = [{'instruction': 'a', 'output': 'b'}, {'instruction': 'a', 'input': None, 'output': 'b'},
          {'instruction': 'a', 'input': 'i', 'output': 'b'}, {'instruction': 'a', 'output': 'b', 'system': 's'}]
  documents = read('jsonl', tmp_path, rows, join=' | ', path=str(tmp_path))
  assert [text for text, _ in pairs(documents)] == ['a', 'a', 'a | i', 's | a']
  read('jsonl', tmp_path, rows[2:], path=f'{tmp_path}/other')
  assert f'data: {tmp_path}/other: prompt instruction + input, answer output' in capsys.readouterr().out


@every_format
@pytest.mark.parametrize('row', [
    {'prompt': 'p', 'completion': 'c', 'reasoning': 'because'},
    {'instruction': 'i', 'input': 'x', 'output': 'o', 'text': 'all of it'},
    {'instruction': 'i', 'output': 'o', 'history': [['q', 'a']]},
    {'question': 'q', 'answer': 'a', 'context': 'c'}])
def test_text_left_over_beside_a_known_pair_is_refused_by_name(kind, row, tmp_path):
  name = list(row)[-1]
  try:
    [document] = read(kind, tmp_path, [row])
    message = document.why
  except DataError as e:  # of a table, whose columns show it
    message = str(e)
  assert f'{name} would be left out' in message
  assert 'config.data.field=' in message and '+' + name in message


def test_text_left_over_in_a_later_record_is_refused(tmp_path):
  good, *rest = read('jsonl', tmp_path, [{'text': 'a', 'title': None}, {'text': 'b', 'title': 't'}, {'text': 'c'}])
  assert good.text == 'a' and rest[1].text == 'c'
  assert 'title would be left out' in rest[0].why and rest[0].where.endswith('line 2')


def test_named_fields_leave_out_the_rest(tmp_path):
  row = {'prompt': 'p', 'completion': 'c', 'reasoning': 'because'}
  assert pairs(read('jsonl', tmp_path, [row], field='prompt', answer_field='completion')) == [('p', 'c')]
  assert pairs(read('jsonl', tmp_path, [row], field='reasoning+prompt', answer_field='completion',
                    join=r'\n\n')) == [('because\n\np', 'c')]
  assert pairs(read('jsonl', tmp_path, [{'a+b': 'x', 'a': 'y'}], field='a+b')) == [('x', None)]


@every_format
def test_a_dotted_path_reaches_into_objects(kind, tmp_path):
  rows = [{'id': i, 'doc': {'meta': {'n': i}, 'body': {'text': f'text {i}'}}, 'doc2': {'reply': f'r {i}'}}
          for i in range(3)]
  config = {'field': 'doc.body.text', 'answer_field': 'doc2.reply', 'label_field': 'doc.meta.n'}
  documents = read(kind, tmp_path, rows, **config)
  assert pairs(documents) == [(f'text {i}', f'r {i}') for i in range(3)]
  assert [d.label for d in documents] == [0, 1, 2]
  try:
    [document, *_] = read(kind, tmp_path, rows, field='doc.body.txt')
    message = document.why
  except DataError as e:
    message = str(e)
  assert "'doc.body.txt'" in message and 'doc.body.text' in message


@every_format
def test_a_key_with_a_dot_is_found_before_a_path(kind, tmp_path):
  assert pairs(read(kind, tmp_path, [{'a.b': 'key', 'a': {'b': 'path'}}], field='a.b'))[0][0] == 'key'


def test_a_null_object_is_a_bad_record(tmp_path):
  for kind in FORMATS:
    documents = read(kind, tmp_path, [{'doc': {'text': 'x'}}, {'doc': None}], field='doc.text')
    assert isinstance(documents[1], BadRecord) and 'null' in documents[1].why, kind


@every_format
def test_lists_of_texts_are_joined_by_an_option(kind, tmp_path):
  rows = [{'n': 1, 'text': ['one', 'two']}, {'n': 2, 'text': ['three']}]
  assert pairs(read(kind, tmp_path, rows, join=r'\n'))[0] == ('one\ntwo', None)
  assert [text for text, _ in pairs(read(kind, tmp_path, rows, field='text', join=''))] == ['onetwo', 'three']
  for config in ({}, {'field': 'text'}):
    try:
      message = read(kind, tmp_path, rows, **config)[0].why
    except DataError as e:
      message = str(e)
    assert 'config.data.join' in message
  nested = [{'turns': [{'text': 'a'}, {'text': 'b'}]}]
  if kind in ('json', 'jsonl'):
    assert pairs(read(kind, tmp_path, nested, field='turns.text', join='/')) == [('a/b', None)]


def test_texts_of_a_list_that_are_not_utf8_are_bad_records(tmp_path):
  column = pyarrow.array([[b'fine'], [b'caf\xe9']])
  pyarrow.parquet.write_table(pyarrow.table({'text': column}), tmp_path / 'x.parquet')
  documents = list(parquet(File('x', tmp_path / 'x.parquet'), SourceConfig(join=' ')))
  assert documents[0].text == 'fine' and 'UTF-8' in documents[1].why


ODD = ['NaN', '-Infinity', '9' * 5000, '1e999', r'"\ud800"', 'null', '{"a": 1, "a": 2}']


@pytest.mark.parametrize('value', ODD)
def test_odd_values_matter_only_in_fields_that_are_used(value, tmp_path):
  lines = ['{"text": "first"}', f'{{"text": "x", "n": {value}}}', f'{{"n": {value}, "text": "y"}}']
  for field in ('text', None) if value != r'"\ud800"' else ('text',):
    assert [text for text, _ in pairs(read('jsonl', tmp_path, lines, field=field))] == ['first', 'x', 'y']
  (tmp_path / 'x.json').write_text(f'[{", ".join(lines)}]')
  assert len(pairs(list(json_file(File('x', tmp_path / 'x.json'), SourceConfig(field='text'))))) == 3
  assert isinstance(read('jsonl', tmp_path, lines, field='n')[1], BadRecord)


def test_a_key_given_twice_matters_where_it_is_used(tmp_path):
  lines = ['{"text": "a", "n": 1, "n": 2}', '{"text": "a", "text": "b", "n": 1}']
  good, bad = read('jsonl', tmp_path, lines)
  assert good.text == 'a' and "'text' is given twice" in bad.why


def test_names_of_a_class_label_are_kept(tmp_path):
  features = {'label': {'names': ['neg', 'pos'], '_type': 'ClassLabel'}, 'text': {'_type': 'Value'}}
  table = pyarrow.table({'text': ['a', 'b', 'c'], 'label': [1, 0, -1]}).replace_schema_metadata(
      {'huggingface': json.dumps({'info': {'features': features}})})
  pyarrow.parquet.write_table(table, tmp_path / 'x.parquet')
  with pyarrow.ipc.new_file(tmp_path / 'x.arrow', table.schema) as writer:
    writer.write_table(table)
  for reader, name in ((parquet, 'x.parquet'), (arrow, 'x.arrow')):
    documents = list(reader(File(name, tmp_path / name), SourceConfig(label_field='label')))
    assert [d.label for d in documents[:2]] == ['pos', 'neg']
    assert isinstance(documents[2], BadRecord), '-1 stands for no label'


# Tables in text.

@pytest.mark.parametrize(('name', 'data', 'expected'), [
    ('semicolon', '\ufeffid;text;n\n0;a, b;1\n1;c, d;2,5\n', ['a, b', 'c, d']),
    ('tab', 'id\ttext\n0\ta, b\n1\tc; d\n', ['a, b', 'c; d']),
    ('pipe', 'id|text\n0|a, b\n1|c\n', ['a, b', 'c']),
    ('comma', 'id,text\n0,a;b\n1,c\n', ['a;b', 'c']),
    ('quoted', 'id;text\n0;"a; b"\n1;"c\nd"\n', ['a; b', 'c\nd']),
    ('one column', 'text\nhello\nthere; you\n', ['hello', 'there; you']),
    ('lists in a field', 'text,type\none/two,a\n1;2:3;4,b\n', ['one/two', '1;2:3;4']),
    ('decimal commas', 'amount;text\n1,50;coffee\n2,25;tea\n', ['coffee', 'tea']),
    ('quotes before spaces', 'text;n\n"a "" b";1\n"c d";2\n', ['a " b', 'c d']),
    ('dashes', 'date;text\n2011-01-01;-1\n2011-01-02;x\n', ['-1', 'x'])])
def test_the_delimiter_is_found(name, data, expected, tmp_path):
  (tmp_path / 'x.csv').write_text(data)
  assert [d.text for d in csv_file(File('x.csv', tmp_path / 'x.csv'), SourceConfig(field='text'))] == expected


@pytest.mark.parametrize('data', [
    'text;n\nhello, you\nthere\n',  # one field by comma, whose name holds a semicolon, and uneven rows
    'a,b;c\n1,2;3\n4,5;6\n',  # both give rows of one width
    'month, year;amount;note\nApril, 2023;25.00;paid\nMay, 2023;4\n'])  # commas are even, but semicolons divide more
def test_a_delimiter_in_doubt_is_refused(data, tmp_path):
  (tmp_path / 'x.csv').write_text(data)
  with pytest.raises(DataError, match=r'x\.csv.*config\.data\.delimiter'):
    list(csv_file(File('x.csv', tmp_path / 'x.csv'), SourceConfig(field='text')))
  rows = list(csv_file(File('x.csv', tmp_path / 'x.csv'), SourceConfig(field=data.split('\n')[0], delimiter='tab')))
  assert [row.text for row in rows] == data.splitlines()[1:]
