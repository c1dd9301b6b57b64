"""A token store that was changed after it was written is found out: when it is opened, or before the part is used."""

import dataclasses
import pickle
import time

import numpy as np
import pytest
from test_store import config_of, only_store, write_corpus

from llm_jax.base.errors import DataError
from llm_jax.data.open import open_data
from llm_jax.data.pipeline import mixed, prefetched, train_batches, train_sources
from llm_jax.data.stores import checks
from llm_jax.data.stores.store import open_store


@pytest.fixture
def folder(tmp_path):
  """A store of many blocks, in several files."""
  write_corpus(tmp_path / 'corpus', 40, words_per_file=400)
  open_data(config_of(tmp_path, shard_tokens=20_000))
  return only_store(tmp_path / 'cache')


@pytest.fixture
def as_large(monkeypatch):
  """Checks every store as a large one, without the thread; with blocks of 1,024 bytes when it was written so."""
  monkeypatch.setattr(checks, 'SMALL', -1)
  monkeypatch.setattr(checks, 'BACKGROUND_SECONDS', 0)


def overwrite(path, begin, end, value=b'\1'):
  data = bytearray(path.read_bytes())
  data[begin:end] = value * (end - begin)
  path.write_bytes(data)


def test_ids_that_were_overwritten_are_found_when_a_small_store_is_opened(folder, tmp_path):
  path = folder / 'train-00000.tokens'
  overwrite(path, path.stat().st_size // 4, path.stat().st_size)
  with pytest.raises(DataError, match=r'train-00000\.tokens: sha256 .*delete the folder'):
    open_data(config_of(tmp_path, shard_tokens=20_000))


def test_each_block_of_a_large_store_is_checked_before_its_first_use(tmp_path, monkeypatch, as_large):
  monkeypatch.setattr(checks, 'BLOCK', 1024)
  monkeypatch.setattr(checks, '_PIECE', 4096)
  write_corpus(tmp_path / 'corpus', 40, words_per_file=400)
  whole = np.array(open_data(config_of(tmp_path)).train['data'].tokens[:])
  folder = only_store(tmp_path / 'cache')
  overwrite(folder / 'train-00000.tokens', 5 * 1024 + 7, 6 * 1024 - 7)
  tokens = open_store(folder)['train'].tokens
  for begin, end in ((0, 5 * 512), (6 * 512, len(whole)), (6 * 512, 6 * 512 + 1)):
    assert tokens[begin:end].tolist() == whole[begin:end].tolist()
  for begin, end in ((5 * 512, 5 * 512 + 1), (0, len(whole)), (6 * 512 - 1, 6 * 512 + 1)):
    with pytest.raises(DataError, match=r'train-00000\.tokens: damaged between bytes 5120 and 6144'):
      tokens[begin:end]


@pytest.mark.parametrize('name', ['train-00000.tokens', 'train.starts', 'val-00000.tokens'])
def test_the_thread_finds_damage_that_is_not_used_yet(name, folder, monkeypatch):
  monkeypatch.setattr(checks, 'SMALL', 0)  # columns are then checked by the thread too
  path = folder / name
  overwrite(path, path.stat().st_size - 4, path.stat().st_size, b'\7')
  tokens, deadline = open_store(folder)['train'].tokens, time.monotonic() + 10
  with pytest.raises(DataError, match=name):
    while time.monotonic() < deadline:
      tokens[:8]
      time.sleep(0.01)


def test_checksums_that_were_changed_are_found(folder, as_large, monkeypatch):
  monkeypatch.setattr(checks, 'SMALL', 4096)
  overwrite(folder / 'train-00000.tokens.crc', 0, 4)
  with pytest.raises(DataError, match=r'train-00000\.tokens\.crc: sha256'):
    open_store(folder)


def test_damage_ends_the_batches_of_a_run(folder, tmp_path, as_large):
  config = config_of(tmp_path, shard_tokens=20_000, seq_len=64)
  data = open_data(config)
  data = dataclasses.replace(data, splits=data.splits | {'train': {'data': open_store(folder)['train']}})
  overwrite(folder / 'train-00001.tokens', 0, 20_000)
  mixture = mixed(config, train_sources(config, data), lambda step: step, 0)
  batches = train_batches(mixture, lambda n: 8 * n, np.arange(8))
  with pytest.raises(DataError, match='damaged'):
    for _, batch in zip(range(1000), prefetched(batches, 0), strict=False):
      assert batch['tokens'].any()


def test_a_pickled_store_holds_no_data_and_checks_again(folder, as_large):
  store = open_store(folder)['train']
  store.tokens[:]
  pickled = pickle.dumps(store)
  assert len(pickled) < 10_000
  copy = pickle.loads(pickled)  # noqa: S301
  assert copy.starts.tolist() == store.starts.tolist()
  assert copy.tokens[:].tolist() == store.tokens[:].tolist()
  overwrite(folder / 'train-00000.tokens', 0, 10)
  with pytest.raises(DataError, match='damaged'):
    pickle.loads(pickled).tokens[:1]  # noqa: S301


def test_starts_are_mapped(folder):
  starts = open_store(folder)['train'].starts
  while isinstance(starts.base, np.ndarray) and not isinstance(starts, np.memmap):
    starts = starts.base
  assert isinstance(starts, np.memmap)


def test_prepare_waits_for_the_thread(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(checks, 'SMALL', 0)
  for file in open_store(folder)['train'].tokens.files:
    file.wait_for_checks()
  overwrite(folder / 'val-00000.tokens', 0, 10)
  with pytest.raises(DataError, match='val-00000'):
    open_store(folder)['train'].tokens.files[0].wait_for_checks()
