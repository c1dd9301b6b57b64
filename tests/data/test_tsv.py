"""TSV: quotes are text unless the config says otherwise, and a record is one line."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.base.errors import DataError
from llm_jax.data.sources.documents import BadRecord, File, SourceConfig
from llm_jax.extras.formats.text_tables import csv_file, tsv

CELL = st.text(st.characters(exclude_characters='\t\r\n', exclude_categories=('Cs',)), max_size=30)


def read(path, data, reader=tsv, **config):
  path.write_bytes(data.encode())
  return list(reader(File(path.name, path), SourceConfig(**config)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(CELL, CELL), max_size=8))
def test_every_line_is_a_record_whatever_its_quotes(tmp_path_factory, rows):
  path = tmp_path_factory.getbasetemp() / 'x.tsv'
  lines = ''.join('\t'.join(row) + '\n' for row in [('input', 'output'), *rows])
  assert [(d.text, d.answer) for d in read(path, lines)] == rows


def test_quoting_is_read_where_it_is_asked_for(tmp_path):
  data = 'id\ttext\n1\t"a ""b"""\n2\t"c\td"\n'
  assert [d.text for d in read(tmp_path / 'x.tsv', data, field='text', quoting='minimal')] == ['a "b"', 'c\td']
  first, second = read(tmp_path / 'x.tsv', data, field='text')
  assert first.text == '"a ""b"""'
  assert isinstance(second, BadRecord) and 'quoting=minimal' in second.why


def test_a_record_over_several_lines_is_refused(tmp_path):
  data = 'id\ttext\n1\t"Yes, I will\n2\tshe said"\n'
  assert [d.text for d in read(tmp_path / 'x.tsv', data, field='text')] == ['"Yes, I will', 'she said"']
  with pytest.raises(DataError, match=r'line 2: a quoted record over 2 lines'):
    read(tmp_path / 'x.tsv', data, field='text', quoting='minimal')
  out = io.StringIO(newline='')
  csv.writer(out, delimiter='\t').writerows([('id', 'text'), (1, 'one\ntwo'), (2, 'three')])
  assert [d.text for d in read(tmp_path / 'x.tsv', out.getvalue(), csv_file, field='text')] == ['one\ntwo', 'three']
  assert any(isinstance(d, BadRecord) for d in read(tmp_path / 'x.tsv', out.getvalue(), field='text'))
