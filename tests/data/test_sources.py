"""Sources give every text of a path once, in a fixed order, and reading can resume at any record."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import register
from llm_jax.data.loaders import SOURCES
from llm_jax.data.sources.content import FileHashes
from llm_jax.data.sources.documents import BadRecord, Document, File, SourceConfig
from llm_jax.data.sources.files import open_source


def source_of(path, cache=Path('no cache needed'), **options):
  return open_source(SourceConfig(path=str(path), **options), cache)


def read(path, cache=Path('no cache needed'), **options):
  """(name, text) of every document."""
  items = [item for _, item in source_of(path, cache, **options).records()]
  assert all(isinstance(item, Document) for item in items)
  return [(item.name, item.text) for item in items]


@pytest.fixture
def tree(tmp_path):
  files = {'b.txt': 'bee\r\nkeeps its line ends\r', 'a.txt': 'ay \u4e2d\U0001F600\x00', 'sub/deep/c.py': 'sea',
           'sub/d': '', '.hidden': 'no', '.git/config': 'no', 'sub/.cache/e.txt': 'no', 'sub/.f.txt': 'no'}
  for name, text in files.items():
    path = tmp_path / 'tree' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
  return tmp_path / 'tree', {name: text for name, text in files.items() if text != 'no'}


def filled(files):
  return {name: text for name, text in files.items() if text}  # an empty file holds no document


def test_a_folder_gives_its_visible_files_in_order(tree):
  root, visible = tree
  assert read(root) == sorted(filled(visible).items())


def test_hidden_parent_folders_hide_no_files(tree, tmp_path):
  root, visible = tree
  root.rename(tmp_path / '.tree')
  assert dict(read(tmp_path / '.tree')) == filled(visible)


def test_a_file_gives_its_text_unchanged(tree):
  root, visible = tree
  assert read(root / 'b.txt') == [('b.txt', visible['b.txt'])]
  assert read(root / '.hidden') == [('.hidden', 'no')]  # a hidden file can be named


def test_a_glob_gives_the_matching_files(tree):
  root, visible = tree
  assert [text for _, text in read(f'{root}/*.txt')] == [visible['a.txt'], visible['b.txt']]
  assert [text for _, text in read(f'{root}/**/*.py')] == [visible['sub/deep/c.py']]
  everything = read(f'{root}/**')
  assert [text for _, text in everything] == [visible[name] for name in sorted(filled(visible))]
  assert [name for name, _ in everything] == sorted(filled(visible)), 'names depend on the working directory'


def test_a_missing_path_is_named(tmp_path):
  with pytest.raises(DataError, match='nowhere'):
    source_of(tmp_path / 'nowhere')
  with pytest.raises(DataError, match='matches nothing'):
    source_of(tmp_path / '*.txt')


def test_a_folder_without_files_is_an_error(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / '.hidden').write_text('x')
  with pytest.raises(DataError, match='holds no files'):
    source_of(tmp_path)


@pytest.mark.parametrize('prefix', ['', 'some ascii', '中文'])
def test_invalid_utf8_is_reported_with_file_and_offset(prefix, tmp_path):
  (tmp_path / 'good.txt').write_text('fine')
  (tmp_path / 'latin.txt').write_bytes(prefix.encode() + b'\xe9t\xe9')
  good, bad = [item for _, item in source_of(tmp_path).records()]
  assert good.text == 'fine'
  assert isinstance(bad, BadRecord)
  assert str(tmp_path / 'latin.txt') in bad.where
  assert f'byte {len(prefix.encode())} ' in bad.where + bad.why


@pytest.fixture
def mixed(tmp_path):
  """A folder of several formats, with bad records and a truncated file."""
  root = tmp_path / 'mixed'
  root.mkdir()
  lines = [json.dumps({'text': f'line {i}'}) for i in range(9)]
  lines[4] = '{broken'
  (root / 'a.jsonl').write_text('\n'.join(lines))
  (root / 'b.txt').write_text('one piece after another\n' * 40)
  (root / 'c.jsonl.gz').write_bytes(gzip.compress('\n'.join(f'{{"text": "{i}"}}' for i in range(5000)).encode())[:-900])
  (root / 'd.csv').write_text('text\nx\ny\n')
  (root / 'e.txt').write_bytes(b'\xff')
  return source_of(root, max_record_bytes=100)


def test_reading_resumes_after_any_record(mixed):
  records = list(mixed.records())
  assert len({position for position, _ in records}) == len(records)
  assert sum(isinstance(item, BadRecord) for _, item in records) == 3
  assert sum(item.continues for _, item in records if isinstance(item, Document)) > 5
  for i in (*range(20), *range(20, len(records), 97), len(records) - 1):
    assert list(mixed.records(records[i][0])) == records[i + 1:]


def test_formats_are_found_by_ending_or_first_bytes(tmp_path):
  for name, content in {'a.jsonl': b'{"text": "1"}\n', 'b': b'{"text": "2"}\n', 'c.md': b'{"text": "3"}',
                        'd.JSONL.gz': gzip.compress(b'{"text": "4"}\n'), 'e': gzip.compress(b'{"text": "5"}')}.items():
    (tmp_path / name).write_bytes(content)
  source = source_of(tmp_path)
  assert dict(zip([file.name for file in source.files], source.formats, strict=True)) == {
      'a.jsonl': 'jsonl', 'b': 'jsonl', 'c.md': 'text', 'd.JSONL.gz': 'jsonl', 'e': 'jsonl'}
  assert [text for _, text in read(tmp_path)] == ['1', '2', '{"text": "3"}', '4', '5']
  assert source_of(tmp_path, format='text').formats == ('text',) * 5
  with pytest.raises(ConfigError, match='known: auto, text, jsonl'):
    source_of(tmp_path, format='xml')


def test_archives_are_read_like_folders(tmp_path):
  files = {'a.txt': 'ay', 'sub/b.jsonl': '{"text": "bee"}', '.hidden': 'no'}
  with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
    for name, text in files.items():
      archive.writestr(name, text)
  assert read(tmp_path / 'x.zip', tmp_path / 'cache') == [('x.zip/a.txt', 'ay'), ('x.zip/sub/b.jsonl:1', 'bee')]


def test_the_fingerprint_changes_with_any_file(tree):
  root, _ = tree

  def fingerprint():
    return source_of(root).fingerprint(FileHashes())

  seen = [fingerprint()]
  assert fingerprint() == seen[0]
  changes = [lambda: (root / 'b.txt').write_text('longer than it was before'),
             lambda: (root / 'new').write_text(''), lambda: (root / 'new').rename(root / 'newer')]
  for change in changes:
    change()
    assert fingerprint() not in seen
    seen.append(fingerprint())
  (root / '.hidden').write_text('changed, but not read')
  os.utime(root / 'a.txt', (1, 1))
  assert fingerprint() == seen[-1]


def test_stdlib_is_megabytes_of_code_without_tests():
  source = source_of('stdlib')
  names = [file.name for file in source.files]
  assert {'json/decoder.py', 'argparse.py', 'asyncio/events.py'} <= set(names)
  assert names == sorted(names, key=lambda name: name.split('/'))
  skipped = {'test', 'tests', 'site-packages', 'dist-packages', '__pycache__'}
  assert not [name for name in names if skipped & set(name.split('/'))]
  assert sum(len(document.text.encode()) for _, document in source.records()) > 5e6
  assert sum(source.sizes()) > 5e6


def test_a_source_of_ones_own_is_registered_by_name(tmp_path, monkeypatch):
  (tmp_path / 'poem.txt').write_text('a rose')
  monkeypatch.setattr(SOURCES, '_entries', dict(SOURCES._entries))
  register(SOURCES, 'shelf', lambda config, cache_dir: [File(config.path, tmp_path / config.path.split(':')[1])])
  assert read('shelf:poem.txt') == [('shelf:poem.txt', 'a rose')]


@pytest.mark.parametrize('path', ['stdlib:json', 'enwik8:train'])
def test_nothing_may_follow_the_name_of_a_source_without_settings(path):
  with pytest.raises(ConfigError, match=f'{path}: nothing may follow'):
    source_of(path)
