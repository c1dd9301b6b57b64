"""Text formats: files of real libraries are read back equal, bad records are reported, damage raises DataError."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import sqlite3
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.formats.compression import open_stream
from llm_jax.data.formats.text import jsonl, text
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.extras.formats.sqlite import sqlite
from llm_jax.extras.formats.text_tables import csv_file, json_file, toml

TEXT = st.text(max_size=60)  # any characters but surrogates
QUICK = settings(max_examples=40, deadline=None, derandomize=True)
COMPRESS = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress,
            '.zst': lambda data: zstandard.ZstdCompressor().compress(data)}


def read(reader, path, data=None, **config):
  if data is not None:
    path.write_bytes(data)
  return list(reader(File(path.name, path), SourceConfig(**config)))


def texts(documents):
  documents = list(documents)
  assert all(isinstance(d, Document) for d in documents), documents
  return [d.text for d in documents]


def bad(documents):
  """{last word of where: why} of the bad records."""
  return {d.where.split()[-1]: d.why for d in documents if isinstance(d, BadRecord)}


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  return tmp_path_factory.mktemp('formats') / 'file'


@QUICK
@given(TEXT, st.integers(8, 24))
def test_pieces_of_a_text_join_to_the_text(path, value, limit):
  documents = read(text, path, value.encode(), max_record_bytes=limit)
  assert ''.join(texts(documents)) == value.removeprefix('\ufeff')
  assert [d.continues for d in documents] == [False, *[True] * (len(documents) - 1)][:len(documents)]
  assert all(0 < len(d.text.encode()) <= limit for d in documents)


def test_a_long_text_is_cut_after_newlines(path):
  value = ('line\r\n' * 50).encode()
  assert all(t.endswith('\n') for t in texts(read(text, path, value, max_record_bytes=40)))


@QUICK
@given(st.lists(TEXT.filter(lambda t: '<|' not in t and t != '<')), st.sampled_from(['<|>', '<|é|>']))
def test_separators_divide_a_text_into_documents(path, values, separator):
  values = [v.replace('<', '') for v in values]
  found = texts(read(text, path, separator.join(values).encode(), separator=separator))
  assert found == [v for v in [values[0].removeprefix('\ufeff'), *values[1:]] if v] if values else found == []


def test_separators_are_found_across_reads(path):
  separator, limit = '<|endoftext|>', 2_000_000
  values = ['a' * 1_048_570, 'b' * 2_100_000, 'é' * 700_000, 'c' * limit, 'd' * (limit + 1), 'end']
  documents = read(text, path, separator.join(values).encode(), separator=separator, max_record_bytes=limit)
  assert [isinstance(d, Document) for d in documents] == [True, False, True, True, False, True]
  assert texts([d for d in documents if isinstance(d, Document)]) == [values[0], values[2], values[3], values[5]]
  assert documents[-1].name == 'file:6'
  assert documents[1].where.endswith(f'byte {len(values[0]) + len(separator)}') or 'longer' in documents[1].why


def test_text_that_is_not_utf8_is_one_bad_record(path):
  [record] = read(text, path, b'good\n' * 100 + b'\xff\xfe', max_record_bytes=50)
  assert 'not UTF-8 text at byte 500 (ff fe)' in record.why
  [record] = read(text, path, b'cut \xc3')
  assert 'at byte 4' in record.why
  first, record, last = read(text, path, b'one|t\xff|three', separator='|')
  assert (first.text, last.text) == ('one', 'three') and 'at byte 5' in record.why
  [document] = read(text, path, b'\xef\xbb\xbfmark')
  assert document.text == 'mark'
  assert read(text, path, b'') == read(text, path, b'\xef\xbb\xbf') == []


@QUICK
@given(st.lists(st.tuples(TEXT, TEXT), max_size=8), st.booleans())
def test_json_lines_round_trip(path, rows, ascii_only):
  lines = [json.dumps({'id': 1, 'prompt': a, 'completion': b}, ensure_ascii=ascii_only) for a, b in rows]
  documents = read(jsonl, path, '\n'.join(lines).encode())
  assert [(d.text, d.answer) for d in documents] == rows
  assert [d.name for d in documents] == [f'file:{i}' for i in range(1, len(rows) + 1)]
  assert [(d.text, d.answer) for d in read(json_file, path, f' [{", ".join(lines)}]\n'.encode())] == rows


def test_bad_json_lines_are_reported_and_skipped(path):
  lines = [b'{"text": "first"}', b'', b'{"text": NaN}', b'{"text": "a", "text": "b"}', rb'{"text": "\ud800"}', b'[1]',
           b'{"other": "x"}', b'{"text": 3.5}', b'{"text": "\xff"}', b'{"text": ', b'{"text": null}',
           b'{"text": "%s"}' % (b'x' * 2000), b'[' * 5000, b'{"text": %s}' % (b'9' * 5000), b'{"text": [1, -1]}',
           b'{"text": [1, 99999999999999999999]}', b'{"text": [1, true]}', b'{"text": "last"}']
  documents = read(jsonl, path, b'\n'.join(lines), max_record_bytes=6000)
  found = bad(documents)
  assert set(found) == {'3', '4', '5', '6', '7', '8', '9', '10', '11', '13', '14', '15', '16', '17'}
  assert [d.text for d in documents if isinstance(d, Document)] == ['first', 'x' * 2000, 'last']
  words = {'3': 'NaN', '4': 'twice', '5': 'U+D800', '7': 'missing; the record has other', '9': 'byte 10', '15': '-1'}
  for line, word in words.items():
    assert word in found[line], found[line]
  assert set(bad(read(jsonl, path, b'\n'.join(lines), max_record_bytes=1500))) == {*found, '12'}


def test_fields_are_chosen_by_config_or_type(path):
  rows = [{'a': 'x', 'b': 'y', 'n': 3, 'v': [0.5, 1]}]
  def one(**config):
    return read(jsonl, path, json.dumps(rows[0]).encode(), **config)[0]

  with pytest.raises(DataError, match=r'line 1: .* set config.data.field to one of a, b'):
    one()
  assert one(field='b').text == 'y'
  document = one(answer_field='a', label_field='v')
  assert (document.text, document.answer, document.label) == ('y', 'x', (0.5, 1.0))
  assert one(field='a', label_field='n').label == 3.0
  assert 'the record has a, b, n, v' in one(field='text').why
  [ids] = read(jsonl, path, b'{"id": 7, "tokens": [1, 2]}')
  assert ids.text.dtype == np.int64 and ids.text.tolist() == [1, 2]
  # The fields chosen at the first record are used for all.
  assert list(bad(read(jsonl, path, b'{"a": "x"}\n{"b": "y"}'))) == ['2']


def test_json_files_may_be_arrays_or_objects(path):
  assert texts(read(json_file, path, b'{"version": 1, "examples": [{"a": "x"}, {"a": "y"}]}')) == ['x', 'y']
  assert texts(read(json_file, path, b'\xef\xbb\xbf {"a": "x"}')) == ['x']
  assert read(json_file, path, b'[]') == read(json_file, path, b'') == []
  assert list(bad(read(json_file, path, b'[{"a": "x"}, 3, {"a": NaN}, {"a": "y"}]'))) == ['2', '3']
  long = [{'a': chr(65 + i) * 300_000} for i in range(10)]  # longer than one read
  assert texts(read(json_file, path, json.dumps(long).encode())) == [r['a'] for r in long]
  for damaged in (b'[{"a": "x"},]', b'[{"a": "x"} {"a": "y"}]', b'[{"a": "x"}', b'[{"a": "x"}]]', b'[,{"a": "x"}]',
                  b'[', b'{"a": [{"t": "x"}], "b": [{"t": "y"}]}', b'{"a": ', b'nonsense', b'[' * 100_000):
    with pytest.raises(DataError, match=str(path)):
      read(json_file, path, damaged)
  with pytest.raises(DataError, match='format to jsonl'):
    read(json_file, path, b'{"a": "x"} {"a": "y"}')


@pytest.mark.parametrize('size', [1, 700_000, 1_500_000])
def test_a_json_file_may_hold_an_object_a_line(path, size):
  records = [{'a': chr(65 + i) * size} for i in range(4)]
  lines = '\n'.join(map(json.dumps, records)).encode()
  for content in (lines, b'\n ' + lines + b'\n\n', lines.replace(b'\n', b'\r\n')):
    assert texts(read(json_file, path, content)) == [record['a'] for record in records]
  assert list(bad(read(json_file, path, lines + b'\n{"a": \n'))) == ['5']


@QUICK
@given(st.lists(st.tuples(TEXT, TEXT), max_size=8), st.sampled_from(',;\t|'))
def test_csv_round_trip(path, rows, delimiter):
  out = io.StringIO(newline='')
  csv.writer(out, delimiter=delimiter).writerows([('input', 'output'), *rows])
  assert [(d.text, d.answer) for d in read(csv_file, path, out.getvalue().encode())] == rows


def test_bad_csv_rows_are_reported(path):
  documents = read(csv_file, path, b'text\r\n"a\r\nb"\r\nx,y\r\n\r\n"a"b\r\n\xff\r\n"a ""quote"""\r\n')
  assert texts(d for d in documents if isinstance(d, Document)) == ['a\r\nb', 'a "quote"']
  assert {line: why.split()[0] for line, why in bad(documents).items()} == {'4': '2', '6': 'malformed', '7': 'field'}
  assert [d.name for d in documents if isinstance(d, Document)] == ['file:2', 'file:8']
  with pytest.raises(DataError, match='line 3: a quote is opened'):
    read(csv_file, path, b'text\na\n"b\nc\n')
  with pytest.raises(DataError, match='begins in line 3 takes more than 50 bytes'):
    read(csv_file, path, b'text\na\n"b\n' + b'c\n' * 50, max_record_bytes=50)
  with pytest.raises(DataError, match="'a' twice"):
    read(csv_file, path, b'a,a\n1,2\n')
  assert texts(read(csv_file, path, b'text\n' + b'x' * 300_000)) == ['x' * 300_000]  # beyond the csv module's own limit


def test_toml_tables_are_documents(path):
  data = b'title = "t"\n[[examples]]\ninput = "a"\noutput = "b"\n[[examples]]\ninput = "c"\n'
  document, record = read(toml, path, data)
  assert (document.text, document.answer) == ('a', 'b') and record.where.endswith('examples 2')
  for damaged in (b'[[x]', b'\xff', b'[[a]]\nt="x"\n[[b]]\nt="y"\n', b'title = "no list"\n'):
    with pytest.raises(DataError, match=str(path)):
      read(toml, path, damaged)


@pytest.fixture
def database(tmp_path):
  with sqlite3.connect(tmp_path / 'd.db') as connection:
    connection.execute('CREATE TABLE numbers (n INTEGER)')
    connection.execute('CREATE TABLE docs (body TEXT, n INTEGER)')
    connection.executemany('INSERT INTO docs VALUES (?, ?)', [(f'text {i}', i) for i in range(1000)])
    connection.execute("INSERT INTO docs VALUES (CAST(x'ff' AS TEXT), 0)")
  connection.close()
  return tmp_path / 'd.db'


def test_sqlite_reads_rows_and_rejects_writes(database):
  documents = read(sqlite, database)
  assert texts(documents[:-1]) == [f'text {i}' for i in range(1000)]
  assert 'byte ff' in documents[-1].why
  assert texts(read(sqlite, database, query='SELECT body AS b, n FROM docs WHERE n = 7')) == ['text 7']
  before = database.read_bytes()
  for query in ('DELETE FROM docs', 'DROP TABLE docs', "ATTACH '/tmp/other.db' AS other", 'SELECT 1; DELETE FROM docs',
                'PRAGMA journal_mode = wal', f"VACUUM INTO '{database}2'", "SELECT load_extension('x')",
                'SELECT nothing', 'WITH t AS (SELECT 1) INSERT INTO docs SELECT 1, 1 FROM t'):
    with pytest.raises(ConfigError, match=r'config.data.query'):
      read(sqlite, database, query=query)
  assert database.read_bytes() == before
  sqlite3.connect(database).execute('CREATE TABLE more (t VARCHAR(9))').connection.close()
  with pytest.raises(DataError, match='docs, more'):
    read(sqlite, database)


CUTTABLE = {**{ending: jsonl for ending in COMPRESS}, '.db': sqlite}


@pytest.mark.parametrize('ending', CUTTABLE)
def test_a_truncated_file_is_always_an_error(ending, tmp_path, database):
  rows = [f'text {i} {random.Random(i).random()}' for i in range(300)]
  if ending == '.db':
    whole, expected = database.read_bytes(), 1001
  else:
    whole, expected = COMPRESS[ending]('\n'.join(json.dumps({'t': r}) for r in rows).encode()), len(rows)
  path = tmp_path / f'x{ending}'
  assert len(read(CUTTABLE[ending], path, whole)) == expected
  for cut in {*range(10), *range(0, len(whole), len(whole) // 40), *range(len(whole) - 12, len(whole))}:
    with pytest.raises(DataError, match=str(path)):
      read(CUTTABLE[ending], path, whole[:cut])


@pytest.mark.parametrize('ending', COMPRESS)
def test_compressed_streams_are_read_and_checked(ending, tmp_path):
  path, compress = tmp_path / f'x{ending}', COMPRESS[ending]
  data = bytes(random.Random(0).choices(b'abcdefgh\n', k=300_000))
  for written, wanted in ((compress(data), data), (compress(b'one') + compress(b'') + compress(b'two'), b'onetwo'),
                          (compress(b''), b'')):
    for name in (path, tmp_path / 'no_ending'):  # recognized by its first bytes
      name.write_bytes(written)
      with open_stream(name) as stream:
        assert stream.read() == wanted
  for damaged, word in ((compress(data) + b'junk' * 10, 'damaged'), (b'', 'is empty'), (b'plain text', 'begins with'),
                        (compress(bytes(20_000_000)), 'bomb')):
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=word) as error, open_stream(path) as stream:
      while stream.read(1 << 16):
        pass
    assert str(path) in str(error.value)


def test_zstandard_with_a_long_window_is_read(tmp_path):
  path, rows = tmp_path / 'x.jsonl.zst', [f'text {i}' for i in range(300)]
  parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
  machine = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # as `zstd --long=31` from a pipe
  whole = machine.compress('\n'.join(json.dumps({'t': r}) for r in rows).encode()) + machine.flush()
  assert zstandard.get_frame_parameters(whole).window_size == 1 << 31
  assert texts(read(jsonl, path, whole)) == rows


def test_padding_and_skippable_frames_are_allowed(tmp_path):
  path = tmp_path / 'x'
  skipped = b'\x50\x2a\x4d\x18\x04\0\0\0abcd'
  for data in (gzip.compress(b'one') + bytes(20_000), lzma.compress(b'one') + bytes(8),
               skipped + COMPRESS['.zst'](b'one') + skipped):
    path.write_bytes(data)
    with open_stream(path) as stream:
      assert stream.read() == b'one'


@pytest.mark.parametrize('reader', [jsonl, json_file, csv_file, text], ids=lambda r: r.__name__)
def test_memory_does_not_grow_with_the_file(reader, tmp_path):
  def peak(num_rows):
    rows = [{'text': f'{i} {random.Random(i).random()} ' * 100} for i in range(500)]
    lines = [r['text'] if reader in (csv_file, text) else json.dumps(r) for r in rows] * (num_rows // 500)
    whole = '[' + ',\n'.join(lines) + ']' if reader is json_file else 'text\n' + '\n'.join(lines)
    whole = whole.removeprefix('text\n') if reader is jsonl else whole
    path = tmp_path / 'big.gz'
    path.write_bytes(gzip.compress(whole.encode(), 1))
    config = SourceConfig(max_record_bytes=1 << 20)
    del whole
    tracemalloc.start()
    found = sum(len(d.text) for d in reader(File('big', path), config))
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, used

  (small_found, small), (big_found, big) = peak(1_000), peak(5_000)
  assert big_found > 4.9 * small_found > 4.9 * 2e6
  assert big < 1.2 * small + 1e6 and big < 30e6
