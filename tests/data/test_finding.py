"""Which files a path gives: each real file once, what is left out counted, splits by name, text by content."""

import json
import os
import threading

import pytest
from bad_files import arrow

from llm_jax.base.errors import DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources.documents import Document, File, SourceConfig
from llm_jax.data.sources.files import open_sides, open_source
from llm_jax.data.sources.naming import missing_shards, splits_of
from llm_jax.data.tokenizers.tokenizer import decode


def write(root, files):
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return root


def names(path, **options):
  return [file.name for file in open_source(SourceConfig(str(path), **options), 'no cache').files]


def notes(path, **options):
  return ' '.join(open_source(SourceConfig(str(path), **options), 'no cache').notes)


def texts(path, cache='no cache', **options):
  items = [item for _, item in open_source(SourceConfig(str(path), **options), cache).records()]
  assert all(isinstance(item, Document) for item in items), items
  return [item.text for item in items]


def lines(*values):
  return ''.join(json.dumps({'text': value}) + '\n' for value in values)


@pytest.fixture
def linked(tmp_path):
  """A folder with every kind of link, beside files that no path below it should give."""
  root = write(tmp_path / 'root', {'a.txt': 'a', 'sub/b.txt': 'b', 'sub/deep/c.txt': 'c'})
  write(tmp_path, {'other/d.txt': 'd', 'above.txt': 'x'})
  for link, target in {'up': '..', 'sub/self': '.', 'out': '../other', 'out2': '../other', 'again.txt': 'a.txt',
                       'zsub': 'sub', 'gone.txt': 'nowhere'}.items():
    (root / link).symlink_to(target)
  os.link(root / 'sub/b.txt', root / 'sub/hard.txt')
  os.mkfifo(root / 'pipe.txt')
  return root


@pytest.mark.parametrize('pattern', ['', '/**/*.txt', '/**', '/**/*', '/**/**/*.txt'])
def test_a_folder_and_a_glob_give_each_real_file_once(linked, pattern):
  assert names(f'{linked}{pattern}') == ['a.txt', 'out/d.txt', 'sub/b.txt', 'sub/deep/c.txt']


def test_a_glob_of_one_level_gives_each_real_file_once(linked):
  assert names(f'{linked}/*/*.txt') == ['out/d.txt', 'sub/b.txt', 'up/above.txt']  # a link that is named is followed


def test_what_is_left_out_is_counted_by_kind(linked):
  write(linked, {'.hidden': 'h', '.git/config': 'g', 'a.txt~': 'old', 'b.bak': 'old', '#c.txt#': 'old'})
  told = notes(linked)
  for part in ('2 hidden (.git, ...)', '3 backup', '1 link to nothing (gone.txt)',
               '1 pipe, socket or device (pipe.txt)', '2 further name of a file', '4 link to a folder'):
    assert part in told, (part, told)
  assert 'hidden' not in notes(f'{linked}/**/*.txt')
  assert names(f'{linked}/*.bak') == ['b.bak'], 'a pattern can name backups'


def test_a_bracket_in_a_name_is_no_pattern(tmp_path):
  root = write(tmp_path, {'notes [2023]/a[1].txt': 'x', 'notes [2023]/b.txt': 'y', 'notes 2/c.txt': 'z', 'd1.md': '1',
                          'd2.md': '2', 'e[1].md': '3', 'e1.md': '4'})
  assert names(root / 'notes [2023]') == names(f'{root}/notes [2023]/*.txt') == ['a[1].txt', 'b.txt']
  assert names(root / 'notes [2023]/a[1].txt') == ['a[1].txt']
  assert names(f'{root}/notes [2023]/a[1]*') == ['a[1].txt']
  assert names(f'{root}/d[12].md') == ['d1.md', 'd2.md']
  assert names(f'{root}/[e]*.md') == ['e1.md', 'e[1].md']


def test_a_cached_repository_gives_its_snapshot(tmp_path):
  root = write(tmp_path / 'datasets--x', {'blobs/0a': lines('one'), 'refs/main': 'f00d', 'snapshots/f00d/x': ''})
  (root / 'snapshots/f00d/x').unlink()
  (root / 'snapshots/f00d/a.jsonl').symlink_to('../../blobs/0a')
  assert texts(root) == ['one']
  (root / 'snapshots/beef').mkdir()
  with pytest.raises(DataError, match='2 snapshots'):
    names(root)


# Splits.

@pytest.mark.parametrize('found', [
    {'data/train-00000-of-00002.parquet': 'train', 'data/train-00001-of-00002.parquet': 'train',
     'data/validation-00000-of-00001.parquet': 'val', 'data/test-00000-of-00001.parquet': 'test'},
    {'a.jsonl': 'train', 'b.jsonl': 'train', 'val.jsonl': 'val', 'test.jsonl.gz': 'test'},
    {'wiki.train.tokens': 'train', 'wiki.valid.tokens': 'val', 'wiki.test.tokens': 'test'},
    {'train/a.txt': 'train', 'dev/b.txt': 'val', 'test/c.txt': 'test', 'more/d.txt': 'train'},
    {'x/train/a.csv': 'train', 'x/eval/a.csv': 'test'}, {'a.parquet': 'train', 'test/b.parquet': 'test'},
    {'sales-train.csv': 'train', 'sales-test.csv': 'test', 'latest-test-results.csv': 'train'},
    {'TRAIN.csv': 'train', 'Validation.csv': 'val'},
    {'train.py': 'train', 'test.py': 'train', 'eval.py': 'train', 'tests/test_a.py': 'train'},  # code
    {'src/main/A.java': 'train', 'src/test/B.java': 'train'}, {'contest.txt': 'train', 'training.txt': 'train'},
    {'my test.md': 'train', 'notes.md': 'train'}, {'test-00000-of-00002.parquet': 'train'},
    {'test.csv': 'train', 'validation.csv': 'train'}])  # nothing would be left to train on
def test_names_of_files_tell_their_split(found):
  files = [File(name, name) for name in found]
  formats = ['text' if name.endswith(('.txt', '.md', '.tokens', '.py', '.java')) else 'csv' for name in found]
  assert dict(zip(found, splits_of(files, formats), strict=True)) == found


def sides(path, **options):
  on_bad = options.pop('on_bad_record', 'fail')
  found = open_sides(SourceConfig(str(path), **options), 'no cache', [], on_bad)
  return {side or 'train': [file.name for file in source.files] for side, source in found}, found[-1][1].notes


@pytest.mark.parametrize('val', ['val.jsonl', 'held', 'held/*.jsonl', 'link.jsonl'])
def test_files_of_val_path_are_no_training_data(tmp_path, val):
  root = write(tmp_path / 'root', {'a.jsonl': lines('a'), 'val.jsonl': lines('v'), 'held/x.jsonl': lines('x')})
  (tmp_path / 'root/link.jsonl').symlink_to('val.jsonl')
  found, told = sides(root, val_path=str(root / val))
  held = 'held/x.jsonl' if 'held' in val else 'val.jsonl'
  assert held not in found['train'] and 'a.jsonl' in found['train'] and len(found['val']) == 1
  assert held in ' '.join(told)


def test_nothing_left_beside_val_path_is_an_error(tmp_path):
  write(tmp_path, {'a.jsonl': lines('a')})
  with pytest.raises(DataError, match='no other file than val_path'):
    sides(tmp_path / 'a.jsonl', val_path=str(tmp_path))


def test_val_path_has_precedence_over_names(tmp_path):
  root = write(tmp_path, {'r/a.jsonl': lines('a'), 'r/val.jsonl': lines('v'), 'other.jsonl': lines('o')}) / 'r'
  found, told = sides(root, val_path=str(tmp_path / 'other.jsonl'))
  assert found == {'val': ['other.jsonl'], 'train': ['a.jsonl']}
  assert 'left out, as there is a val_path' in ' '.join(told)


def test_val_path_of_another_source_is_no_training_data(tmp_path):
  root = write(tmp_path / 'r', {'a.txt': 'to train on ' * 20, 'b.txt': 'to validate with ' * 20})
  other = write(tmp_path / 'o', {'c.txt': 'another text ' * 20})
  data = open_data(DataConfig(tokenizer='byte', split='tail', cache_dir=str(tmp_path / 'cache'), sources={
      'x': SourceConfig(str(root)), 'y': SourceConfig(str(other), val_path=str(root / 'b.txt'))}))
  assert b'validate' not in bytes(i % 256 for i in data.train['x'].tokens[:].tolist())


def test_a_missing_shard_is_named(tmp_path):
  root = write(tmp_path, {f'train-0000{i}-of-00004.jsonl': lines(str(i)) for i in (0, 2)})
  for path in (root, f'{root}/*.jsonl'):
    with pytest.raises(DataError, match=r'train-00001-of-00004\.jsonl, train-00003-of-00004\.jsonl'):
      sides(path)
    assert len(sides(path, on_bad_record='skip')[0]['train']) == 2
  write(root, {f'train-0000{i}-of-00004.jsonl': lines(str(i)) for i in (1, 3)})
  assert len(sides(f'{root}/*-0000[02]-*.jsonl')[0]['train']) == 2, 'the pattern leaves out shards that are there'
  assert missing_shards([File('', tmp_path / f'part-{i:03}-of-003') for i in (1, 2, 3)]) == [], 'counted from 1'


def test_a_snapshot_of_a_hub_data_set_keeps_its_splits(tmp_path):
  root = write(tmp_path, {'README.md': '# A card', 'data/train-00000-of-00001.jsonl': lines('a', 'b'),
                          'data/validation-00000-of-00001.jsonl': lines('c')})
  found, told = sides(root)
  assert found == {'val': ['data/validation-00000-of-00001.jsonl'], 'train': ['data/train-00000-of-00001.jsonl']}
  assert 'README.md' in ' '.join(told) and 'for val, by name' in ' '.join(told)


def test_a_saved_dataset_dict_keeps_its_splits(tmp_path):
  root = tmp_path / 'saved'
  for split in ('train', 'validation', 'test', 'unsupervised'):
    (root / split).mkdir(parents=True)
    arrow({'text': [f'{split} {i}' for i in range(3)]}, stream=True)(tmp_path).rename(root / split / 'data.arrow')
    write(root / split, {'dataset_info.json': '{}', 'state.json': '{"_data_files": [{"filename": "data.arrow"}]}'})
  write(root, {'dataset_dict.json': '{"splits": ["train", "validation", "test", "unsupervised"]}'})
  data = open_data(DataConfig(path=str(root), tokenizer='byte', cache_dir=str(tmp_path / 'cache')))
  found = {split: decode(data.tokenizer, stores['data'].tokens[:]) for split, stores in data.splits.items()}
  assert found == {'train': 'train 0train 1train 2', 'val': 'validation 0validation 1validation 2',
                   'test': 'test 0test 1test 2'}
  assert 'unsupervised' in ' '.join(data.reports['data']['notes'])


# Kinds of files.

PNG = b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' + bytes(range(256))


def test_binary_files_among_texts_are_counted_by_kind(tmp_path):
  root = write(tmp_path, {'a.txt': 'text', 'b.md': 'more \u4e2d', 'c.png': PNG, 'd.png': PNG,
                          'e.pdf': b'%PDF-1.7\n%\xe2', 'f.xlsx': b'PK\3\4' + bytes(99), 'g.dat': bytes(500),
                          'h': os.urandom(5000), 'i.txt': 'a NUL \0 in a text',
                          'j': b'\xfe\xff' + os.urandom(5000)})
  assert names(root) == ['a.txt', 'b.md', 'i.txt']
  for part in ('2 binary (.png) (c.png, ...)', '1 binary (.pdf) (e.pdf)', '1 binary (.xlsx)', '2 binary (no ending)'):
    assert part in notes(root)


def test_a_code_repository_is_text(tmp_path):
  files = {'package.json': '{"name": "x", "version": "1"}', 'tsconfig.json': '{"a": {}}', 'src/a.js': 'let a',
           'src/b.js': 'let b', 'README.md': '# x', 'LICENSE': 'MIT', 'pyproject.toml': '[project]\nname = "x"\n',
           'data/t.csv': 'a,b\nx,y\n', 'src/empty.js': '', 'test/test_a.js': 'test()', 'src/e.rs': 'fn main',
           'c.c': 'int'}
  root = write(tmp_path, files | {'logo.png': PNG, 'a.db': b'SQLite format 3\0' + bytes(99),
                                  'data/rows.jsonl': lines('r')})
  assert sorted(texts(root)) == sorted([content for content in files.values() if content] + ['r'])
  assert 'read as plain text: data/t.csv, package.json' in notes(root)
  assert '1 binary (.db) (a.db), 1 binary (.png) (logo.png), 1 empty (src/empty.js)' in notes(root)


def test_data_files_stay_records_beside_a_few_texts(tmp_path):
  root = write(tmp_path, {'a.json': '{"text": "one"}', 'b.json': '{"text": "two"}', 'c.txt': 'three'})
  assert texts(root) == ['one', 'two', 'three']
  root = write(tmp_path / 'x', {f'{i}.txt': str(i) for i in range(5)} | {'a.json': json.dumps([{'text': 'a'}])})
  assert texts(root) == ['0', '1', '2', '3', '4', 'a']


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'


@pytest.mark.parametrize('name', ['a.txt', 'a.bin', 'a.parquet', 'a.jsonl', 'a.npy', 'a.csv', 'a.jsonl.zst', 'a.zip',
                                  'a.h5', 'a', 'train.bin'])
def test_a_git_lfs_pointer_is_refused_in_every_format(tmp_path, name):
  write(tmp_path / 'r', {name: POINTER, 'readme': 'text ' * 99})
  for path in (tmp_path / 'r', tmp_path / 'r' / name):
    with pytest.raises(DataError, match=f'{name}.*git lfs pull'):
      open_data(DataConfig(path=str(path), tokenizer='byte', cache_dir=str(tmp_path / 'cache')))


# Pipes.

@pytest.mark.parametrize('content, wanted', [('a text', ['a text']), (lines('a', 'b'), ['a', 'b'])])
def test_a_pipe_is_kept_and_read(tmp_path, content, wanted):
  for number in range(2):
    os.mkfifo(tmp_path / f'p{number}')
    writer = threading.Thread(target=(tmp_path / f'p{number}').write_text, args=(content,))
    writer.start()
    assert texts(tmp_path / f'p{number}', tmp_path / 'cache') == wanted
    writer.join()
  kept = [path for path in (tmp_path / 'cache/pipes').iterdir() if path.suffix != '.used']
  assert len(kept) == 1, 'equal bytes are kept once'


def test_standard_input_is_read(tmp_path):
  import subprocess
  import sys

  from program import environment
  done = subprocess.run([sys.executable, '-m', 'llm_jax', 'data', 'prepare', '-', '--tokenizer=byte'], cwd=tmp_path,
                        input=lines(*(f'text {i}' for i in range(50))), env=environment(tmp_path), capture_output=True,
                        text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert '50 documents in: 50 kept' in done.stdout


@pytest.mark.parametrize('field', ['notes', 'overlap'])
def test_a_report_of_an_older_store_is_read(field):
  from llm_jax.data.sources.filters import Report
  saved = Report(3).to_dict()
  del saved[field]
  assert Report.from_dict(saved).num_in == 3
