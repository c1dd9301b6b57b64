"""The cache: what it holds is listed, what is used least is deleted, and nothing that is in use."""

import gc
import json
import os
import subprocess
import sys
import time
import zipfile

import pytest
from program import environment
from test_store import config_of, write_corpus

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.open import open_data
from llm_jax.data.sources import corpus as corpora
from llm_jax.data.stores import cache
from llm_jax.extras.commands import data_cache


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
  monkeypatch.setattr(cache, 'GRACE_SECONDS', -1)
  gc.collect()


def make(tmp_path, name, days=0.0):
  """A store that was last used `days` ago; its folder."""
  write_corpus(tmp_path / name, 5, seed=name)
  before = set((tmp_path / 'cache/stores').iterdir()) if (tmp_path / 'cache/stores').exists() else set()
  open_data(config_of(tmp_path, path=str(tmp_path / name)))
  gc.collect()
  [folder] = [path for path in set((tmp_path / 'cache/stores').iterdir()) - before if path.is_dir()]
  os.utime(folder.with_name(f'{folder.name}.used'), (time.time() - days * 86400,) * 2)
  return folder


def stores(tmp_path):
  return {entry.path: entry for entry in cache.entries(tmp_path / 'cache') if entry.kind == 'stores'}


def test_entries_have_size_use_and_source(tmp_path):
  old, new = make(tmp_path, 'old', 3), make(tmp_path, 'new')
  found = stores(tmp_path)
  assert list(found) == [old, new], 'the least recently used first'
  assert found[old].num_bytes >= sum(path.stat().st_size for path in old.iterdir())
  assert time.time() - found[old].used == pytest.approx(3 * 86400, abs=100)
  assert str(tmp_path / 'old') in found[old].about and 'tokenizer byte' in found[old].about
  assert {entry.kind for entry in cache.entries(tmp_path / 'cache')} == {'stores', 'tokenizers', 'hashes'} - (
      set() if (tmp_path / 'cache/hashes').exists() else {'hashes'})


def test_the_least_recently_used_is_deleted_first(tmp_path):
  folders = {days: make(tmp_path, f'days{days}', days) for days in (1, 5, 3)}
  for entry in cache.entries(tmp_path / 'cache'):
    if entry.kind != 'stores':
      cache._delete(entry)
  total = sum(entry.num_bytes for entry in cache.entries(tmp_path / 'cache'))
  cache.prune(tmp_path / 'cache', total - 1, None)
  assert set(stores(tmp_path)) == {folders[1], folders[3]}
  cache.prune(tmp_path / 'cache', None, 2)
  assert set(stores(tmp_path)) == {folders[1]}
  cache.prune(tmp_path / 'cache', 0, None)
  assert not [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()], 'locks and markers go too'
  open_data(config_of(tmp_path, path=str(tmp_path / 'days1')))
  assert set(stores(tmp_path)) == {folders[1]}, 'it is made again'


def test_what_is_in_use_is_kept(tmp_path):
  folder = make(tmp_path, 'used', 9)
  data = open_data(config_of(tmp_path, path=str(tmp_path / 'used')))
  tokens = data.train['data'].tokens[:].tolist()
  assert stores(tmp_path)[folder].in_use
  os.utime(folder.with_name(f'{folder.name}.used'), (1, 1))
  cache.prune(tmp_path / 'cache', 0, 0)
  assert list(stores(tmp_path)) == [folder]
  again = open_data(config_of(tmp_path, path=str(tmp_path / 'used')))
  assert again.train['data'].tokens[:].tolist() == tokens
  del data, again
  gc.collect()
  cache.prune(tmp_path / 'cache', 0, 0)
  assert not stores(tmp_path)


def test_a_store_that_another_process_uses_is_kept(tmp_path):
  folder = make(tmp_path, 'used')
  code = ('import sys; from llm_jax.data.stores.cache import lease; from pathlib import Path\n'
          'kept = lease(Path(sys.argv[1])); print("ready", flush=True); sys.stdin.read()')
  with subprocess.Popen([sys.executable, '-c', code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        env=environment(tmp_path)) as job:
    assert job.stdout.readline() == b'ready\n'
    cache.prune(tmp_path / 'cache', 0, 0)
    assert list(stores(tmp_path)) == [folder]
    job.kill()
  cache.prune(tmp_path / 'cache', 0, 0)
  assert not stores(tmp_path)


def test_an_archive_that_a_stream_may_read_is_kept(tmp_path):
  with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
    archive.writestr('a.txt', 'some text ' * 30)
  open_data(config_of(tmp_path, path=str(tmp_path / 'x.zip'), split='tail'))
  gc.collect()
  deleted = cache.prune(tmp_path / 'cache', 0, 0)
  assert 'stores' in {entry.kind for entry in deleted}
  [entry] = [entry for entry in cache.entries(tmp_path / 'cache') if entry.kind == 'unpacked']
  assert entry.in_use and (entry.path / 'a.txt').is_file()


def test_the_config_bounds_the_cache(tmp_path, capsys):
  old = make(tmp_path, 'old', 9)
  write_corpus(tmp_path / 'corpus', 5)
  open_data(config_of(tmp_path, cache_max_days=5.0))
  assert old not in stores(tmp_path) and len(stores(tmp_path)) == 1
  assert f'deleted from the cache, used least: {old.name}' in capsys.readouterr().out
  with pytest.raises(ValueError, match='cache_max_gb must be 0 or more'):
    config_of(tmp_path, cache_max_gb=-1.0)


def test_the_command_lists_and_prunes(tmp_path, capsys):
  folder = make(tmp_path, 'corpus', 40)
  flags = [f'--cache_dir={tmp_path / "cache"}']
  capsys.readouterr()
  data_cache.main(flags)
  out = capsys.readouterr().out
  assert folder.name in out and '40.0 days ago' in out and 'stores' in out
  data_cache.main([*flags, '--format=json'])
  assert folder.name in {os.path.basename(entry['path']) for entry in json.loads(capsys.readouterr().out)}
  data_cache.main([*flags, '--prune', '--max_days=30'])
  assert f'stores/{folder.name}' in capsys.readouterr().out and not folder.exists()
  for wrong in (['--prune'], ['--max_gb=3'], ['--prune', '--max_days=-1'], [f'--cache_dir={tmp_path}/none']):
    with pytest.raises(ConfigError, match=r'max_days|no such folder'):
      data_cache.main([*flags, *wrong])


def test_unfinished_stores_can_be_deleted(tmp_path, monkeypatch):
  write_corpus(tmp_path / 'corpus', 5)
  monkeypatch.setattr(corpora.StoreWriter, 'finish', lambda *_, **__: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    open_data(config_of(tmp_path))
  gc.collect()
  [entry] = stores(tmp_path).values()
  assert entry.about == 'unfinished' and entry.num_bytes
  cache.prune(tmp_path / 'cache', 0, None)
  assert not stores(tmp_path) and not list((tmp_path / 'cache/stores').iterdir())


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
  write_corpus(tmp_path / 'corpus', 5)
  add = corpora.StoreWriter.add

  def append(self, documents):
    add(self, documents)
    with open(tmp_path / 'corpus/004.txt', 'a') as file:
      file.write('more')

  monkeypatch.setattr(corpora.StoreWriter, 'add', append)
  for _ in range(2):
    with pytest.raises(DataError, match=r'004\.txt: changed while it was read'):
      open_data(config_of(tmp_path, split='document'))
  monkeypatch.undo()
  assert 'more' in (tmp_path / 'corpus/004.txt').read_text()
  open_data(config_of(tmp_path, split='document'))
