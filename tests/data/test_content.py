"""A store is found by what its files hold: not by their times or folder, and without reading unchanged files again."""

import os
import shutil

import pytest
from test_store import config_of, write_corpus

from llm_jax.data.open import open_data
from llm_jax.data.sources import content
from llm_jax.data.sources.content import FileHashes
from llm_jax.data.sources.documents import File


def stores(tmp_path):
  return sorted(path.name for path in (tmp_path / 'cache/stores').iterdir() if path.is_dir())


@pytest.fixture
def reads(monkeypatch):
  """The files that were read to be hashed."""
  read, found = content.file_sha256, []

  def noted(path):
    found.append(os.path.basename(path))
    return read(path)

  monkeypatch.setattr(content, 'file_sha256', noted)
  return found


def test_equal_files_need_no_new_store_whatever_their_times_and_folder(tmp_path, capsys):
  write_corpus(tmp_path / 'corpus', 5)
  first = open_data(config_of(tmp_path))
  made = stores(tmp_path)
  for path in (tmp_path / 'corpus').iterdir():
    os.utime(path, (1e9, 1e9))
  assert 'tokenizing' not in capsys.readouterr().err
  open_data(config_of(tmp_path))
  shutil.copytree(tmp_path / 'corpus', tmp_path / 'other/corpus')
  again = open_data(config_of(tmp_path, path=str(tmp_path / 'other/corpus')))
  assert stores(tmp_path) == made
  assert again.train['data'].sha256 == first.train['data'].sha256
  assert 'kept in' not in capsys.readouterr().out


def test_other_content_of_equal_size_and_time_is_another_store(tmp_path):
  write_corpus(tmp_path / 'corpus', 5)
  path = tmp_path / 'corpus/000.txt'
  stat, text = path.stat(), path.read_bytes()
  open_data(config_of(tmp_path))
  path.write_bytes(b'X' + text[1:])
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  open_data(config_of(tmp_path))
  assert len(stores(tmp_path)) == 2


def test_unchanged_files_are_not_read_again(tmp_path, reads, monkeypatch):
  paths = []
  for name in 'abc':
    paths.append(tmp_path / name)
    paths[-1].write_text(name)
  files = [File(path.name, path) for path in paths]
  expected = FileHashes().of(files, str(tmp_path))
  assert len(reads) == 3
  monkeypatch.setattr(content, 'SETTLED_SECONDS', -3600)
  for changed in (3, 0, 1, 0):
    if changed == 1:
      os.utime(paths[1], (1, 1))
    reads.clear()
    assert FileHashes(tmp_path / 'cache').of(files, str(tmp_path)) == expected
    assert len(reads) == changed
  (tmp_path / 'b').write_text('B')
  os.utime(paths[1], (1, 1))  # the time of the last change of anything tells
  assert FileHashes(tmp_path / 'cache').of(files, str(tmp_path)) != expected


def test_files_that_may_still_change_are_read_again(tmp_path, reads):
  (tmp_path / 'a').write_text('1')
  for _ in range(2):
    FileHashes(tmp_path / 'cache').of([File('a', tmp_path / 'a')], str(tmp_path))
  assert reads == ['a', 'a']


def test_a_damaged_index_is_made_again(tmp_path, reads, monkeypatch):
  monkeypatch.setattr(content, 'SETTLED_SECONDS', -3600)
  (tmp_path / 'a').write_text('1')
  for _ in range(2):
    FileHashes(tmp_path / 'cache').of([File('a', tmp_path / 'a')], str(tmp_path))
    [index] = (tmp_path / 'cache/hashes').iterdir()
    index.write_text('{"damaged')
  assert reads == ['a', 'a']


def test_files_of_a_stream_are_not_read_to_be_hashed(tmp_path, reads):
  (tmp_path / 'corpus').mkdir()
  for i in range(30):
    (tmp_path / f'corpus/{i}.txt').write_text(f'text {i} ' * 20)
  data = open_data(config_of(tmp_path, tokenizer='bpe', streaming=True, split='count', val_documents=5))
  assert data.tokenizer is not None and not reads
