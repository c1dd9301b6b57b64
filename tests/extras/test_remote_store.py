"""Stores in object storage: a run reads the rows that it would read from the folder, and keeps a bounded part here."""

import os
import pickle
import random
import shutil

import numpy as np
import pytest
from s3 import s3_server

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.commands import data_prepare
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data, store_recipes
from llm_jax.data.pipeline import eval_batches, open_batches
from llm_jax.extras import remote_store

fsspec = pytest.importorskip('fsspec')


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """(data of a prepared store of 300,000 tokens, its folder)."""
  folder = tmp_path_factory.mktemp('corpus')
  rng = random.Random(0)
  for part in range(3):
    documents = [' '.join(str(rng.randrange(10**6)) for _ in range(rng.randrange(40))) for _ in range(700)]
    (folder / f'{part}.txt').write_text('\n\n'.join(documents))
  config = DataConfig(path=str(folder), cache_dir=str(folder.parent / 'made'), tokenizer='byte', separator='\n\n',
                      split='document', val_fraction=0.1, shard_tokens=90_000)
  data = open_data(config)
  [recipe] = store_recipes(config).values()
  return data, recipe.folder


def upload(folder, url):
  fs, root = fsspec.core.url_to_fs(url)
  for path in folder.iterdir():
    fs.pipe_file(f'{root}/{path.name}', path.read_bytes())
  return fs, root


def config_of(path, cache, **fields):
  return DataConfig(path=str(path), cache_dir=str(cache), tokenizer='bpe', seq_len=128, mask_documents=False, **fields)


def batches_of(config, data, number=6):
  batches = open_batches(config, data, 16, np.arange(16), 0, 0, lambda step: step * 16, None, 0, 1)
  try:
    return [next(batches) for _ in range(number)]
  finally:
    batches.close()


def assert_equal_data(local, config):
  data = open_data(config)
  assert data.train['data'].sha256 == local.train['data'].sha256
  for split in ('train', 'val'):
    np.testing.assert_array_equal(data.splits[split]['data'].tokens[:], local.splits[split]['data'].tokens[:])
    np.testing.assert_array_equal(data.splits[split]['data'].starts, local.splits[split]['data'].starts)
  for batch, expected in zip(batches_of(config, data), batches_of(config, local), strict=True):
    for name in expected:
      np.testing.assert_array_equal(batch[name], expected[name])


def test_a_prepared_folder_can_be_the_path(local, tmp_path, capsys):
  data, folder = local
  assert_equal_data(data, config_of(folder, tmp_path))
  assert 'prepared, with its splits, filters and tokenizer' in capsys.readouterr().out


def test_a_store_in_memory_gives_the_rows_of_the_folder(local, tmp_path):
  data, folder = local
  upload(folder, 'memory://bucket/equal')
  assert_equal_data(data, config_of('memory://bucket/equal', tmp_path))


def test_a_host_fetches_only_the_blocks_of_its_rows(local, tmp_path, monkeypatch):
  _, folder = local
  monkeypatch.setattr(remote_store, 'BLOCK_BYTES', 1 << 16)
  upload(folder, 'memory://bucket/few')
  config = config_of('memory://bucket/few', tmp_path)
  from llm_jax.data.open import open_examples
  data = open_data(config)
  examples = open_examples(config, data, data.train['data'], train=True)
  kept = tmp_path / 'remote'
  before = len(list(kept.rglob('*.tokens.[0-9]*')))
  examples.make(100, np.random.default_rng(0))
  assert 1 <= len(list(kept.rglob('*.tokens.[0-9]*'))) - before <= 2, 'one row of 256 bytes'
  # A process that makes batches gets the store by pickle.
  row = pickle.loads(pickle.dumps(examples)).make(100, np.random.default_rng(0))  # noqa: S301
  np.testing.assert_array_equal(row['tokens'], examples.make(100, np.random.default_rng(0))['tokens'])


def test_the_blocks_on_this_machine_are_bounded(local, tmp_path, monkeypatch):
  data, folder = local
  monkeypatch.setattr(remote_store, 'BLOCK_BYTES', 1 << 16)
  monkeypatch.setattr(remote_store, 'CHECK_EVERY', 2)
  upload(folder, 'memory://bucket/bounded')
  config = config_of('memory://bucket/bounded', tmp_path, remote_cache_gb=2e-4)  # 200,000 bytes of 600,000
  opened = open_data(config)
  for _ in range(2):
    np.testing.assert_array_equal(opened.train['data'].tokens[:], data.train['data'].tokens[:])
    assert sum(p.stat().st_size for p in tmp_path.rglob('*.tokens.[0-9]*')) < 200_000 + 2 * (1 << 16)


def test_prepare_prints_the_table_of_a_remote_store(local, tmp_path, capsys):
  _, folder = local
  upload(folder, 'memory://bucket/table')
  data_prepare.main(['--path=memory://bucket/table', f'--cache_dir={tmp_path}'])
  assert 'train/data' in capsys.readouterr().out


def test_a_prepared_store_in_the_cache_is_not_deleted_while_it_is_used(local, tmp_path):
  _, folder = local
  stores = tmp_path / 'stores'
  shutil.copytree(folder, stores / 'mine')
  for path in (stores / 'mine', *(stores / 'mine').iterdir()):
    os.utime(path, (0, 0))
  data = open_data(config_of(stores / 'mine', tmp_path, cache_max_days=1.0))
  assert (stores / 'mine' / 'manifest.json').exists() and len(data.train['data'].tokens)


def test_evaluation_reads_the_rows_of_the_folder(local, tmp_path):
  from llm_jax.data.open import open_examples
  data, folder = local
  upload(folder, 'memory://bucket/eval')
  config = config_of('memory://bucket/eval', tmp_path)
  remote = open_data(config)
  rows = [list(eval_batches(open_examples(config, d, d.val['data'], train=False), 8, np.arange(8), 20))
          for d in (data, remote)]
  for expected, batch in zip(*rows, strict=True):
    np.testing.assert_array_equal(expected['tokens'], batch['tokens'])


def test_damage_is_one_message(local, tmp_path, monkeypatch):
  _, folder = local
  monkeypatch.setattr(remote_store, 'WAIT', 0.01)
  fs, root = upload(folder, 'memory://bucket/damaged')
  fs.pipe_file(f'{root}/train.starts', bytes(len(fs.cat_file(f'{root}/train.starts'))))
  with pytest.raises(DataError, match=r'train.starts: differs from the manifest'):
    open_data(config_of('memory://bucket/damaged', tmp_path / 'a'))
  fs, root = upload(folder, 'memory://bucket/short')
  fs.pipe_file(f'{root}/train-00000.tokens', b'123')
  with pytest.raises(DataError, match=r'train-00000.tokens: has 3 bytes'):
    open_data(config_of('memory://bucket/short', tmp_path / 'b')).train['data'].tokens[:]
  fs, root = upload(folder, 'memory://bucket/gone')
  fs.rm(f'{root}/train-00000.tokens')
  with pytest.raises(DataError, match='memory://bucket/gone'):
    open_data(config_of('memory://bucket/gone', tmp_path / 'c')).train['data'].tokens[:]


def test_settings_that_a_prepared_store_cannot_follow_are_refused(local, tmp_path):
  _, folder = local
  with pytest.raises(ConfigError, match=r'config.data.val_path: .* is a prepared store'):
    open_data(config_of(folder, tmp_path, val_path='other.txt'))
  with pytest.raises(ConfigError, match=r'config.data.streaming: .* is a prepared store'):
    open_data(config_of(folder, tmp_path, streaming=True, split='count', val_documents=3))


@pytest.mark.slow
def test_a_store_on_an_s3_server(local, tmp_path, monkeypatch):
  data, folder = local
  with s3_server(monkeypatch):
    upload(folder, 's3://bucket/store')
    assert_equal_data(data, config_of('s3://bucket/store', tmp_path))
    with pytest.raises(DataError, match='s3://bucket/none'):
      open_data(config_of('s3://bucket/none', tmp_path))
