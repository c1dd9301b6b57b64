"""Shards prepared by several processes and merged are the store that one process writes."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data, store_recipes
from llm_jax.extras.shards import find_shards, merge, merge_shards, parse_shard, prepare_shard

# A reader of .txt files as JSON lines that kills its own process, a Dask worker, the first time it reads part2.
KILLER = '''
import os, signal
from pathlib import Path
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.registry import FORMATS

def deadly(file, config):
  mark = Path(file.path).parent.parent / 'killed'
  if file.name == 'part2.jsonl' and not mark.exists():
    mark.touch()
    os.kill(os.getpid(), signal.SIGKILL)
  yield from FORMATS['jsonl'](file, config)

register(FORMATS, 'deadly', deadly, NoSettings)
'''


def write_parts(folder, rng, num_parts=5, **field):
  folder.mkdir()
  for part in range(num_parts):
    lines = [json.dumps({'text': f'{part} {n} ' + 'word ' * rng.randint(0, 40),
                         **{name: rng.choice(values) for name, values in field.items()}})
             for n in range(rng.choice([0, 1, 30, 90]))]
    (folder / f'part{part}.jsonl').write_text('\n'.join(lines) + '\n')
  same = {name: values[0] for name, values in field.items()}
  (folder / 'last.jsonl').write_text(''.join(json.dumps({'text': f'last {n}', **same}) + '\n' for n in range(200)))


def config_of(folder, cache, **fields):
  return DataConfig(path=str(folder), cache_dir=str(cache), tokenizer='byte', split='document', val_fraction=0.1,
                    field='text', **fields)


def assert_same(one, other):
  for split in one.splits:
    assert one.splits[split].keys() == other.splits[split].keys()
    for name, store in one.splits[split].items():
      merged = other.splits[split][name]
      assert store.sha256 == merged.sha256
      np.testing.assert_array_equal(store.tokens[:], merged.tokens[:])
      np.testing.assert_array_equal(store.starts, merged.starts)
      for column in ('answers', 'labels'):
        np.testing.assert_array_equal(getattr(store, column), getattr(merged, column))
      assert (store.num_bytes, store.bytes_scale, store.classes, store.report) == (
          merged.num_bytes, merged.bytes_scale, merged.classes, merged.report)


@pytest.mark.parametrize('fields', [{}, {'label': 'xyz'}, {'answer': ('yes', 'no', 'perhaps')}])
def test_merged_shards_equal_the_store_of_one_process(tmp_path, fields):
  seed = random.randrange(1 << 32)
  print('seed', seed)
  rng = random.Random(seed)
  write_parts(tmp_path / 'corpus', rng, **fields)
  count = rng.randint(1, 9)  # some shards may be without files
  named = {f'{name}_field': name for name in fields}
  one = open_data(config_of(tmp_path / 'corpus', tmp_path / 'one', **named))
  sharded = config_of(tmp_path / 'corpus', tmp_path / 'sharded', shard_tokens=1000, **named)
  for index in rng.sample(range(count), count):
    prepare_shard(sharded, index, count)
    prepare_shard(sharded, index, count)  # again: nothing to do
  assert_same(one, open_data(sharded))
  [recipe] = store_recipes(sharded).values()
  assert not list(recipe.folder.parent.glob('*.shard-*')), 'a merge removes the shards'


def test_identity_does_not_depend_on_the_files_of_a_store(tmp_path):
  write_parts(tmp_path / 'corpus', random.Random(0))
  config = config_of(tmp_path / 'corpus', tmp_path / 'cache')
  assert_same(open_data(config), open_data(dataclasses.replace(config, shard_tokens=777)))
  before = open_data(config).train['data'].sha256
  text = (tmp_path / 'corpus' / 'last.jsonl').read_text()
  (tmp_path / 'corpus' / 'last.jsonl').write_text(text.replace('last 7"', 'last X"'))
  assert open_data(config).train['data'].sha256 != before


def test_missing_shards_are_named(tmp_path):
  write_parts(tmp_path / 'corpus', random.Random(0))
  config = config_of(tmp_path / 'corpus', tmp_path / 'cache')
  with pytest.raises(DataError, match='has no shards'):
    merge(config)
  for index in (0, 2):
    prepare_shard(config, index, 4)
  for opened in (merge, open_data):
    with pytest.raises(DataError, match=r'2 of 4 shards are prepared; missing: 1, 3'):
      opened(config)


def test_settings_that_need_all_documents_are_refused(tmp_path):
  write_parts(tmp_path / 'corpus', random.Random(0))
  config = config_of(tmp_path / 'corpus', tmp_path / 'cache')
  with pytest.raises(ConfigError, match=r'config.data.split: tail needs all text'):
    prepare_shard(dataclasses.replace(config, split='tail'), 0, 2)
  with pytest.raises(ConfigError, match=r'config.data.filters.deduplicate'):
    prepare_shard(dataclasses.replace(config, filters=dataclasses.replace(config.filters, deduplicate=True)), 0, 2)
  for text in ('3', '2/2', '-1/2', 'a/b'):
    with pytest.raises(ConfigError, match='--shard'):
      parse_shard(text)


def test_a_merge_that_was_killed_is_done_again(tmp_path):
  write_parts(tmp_path / 'corpus', random.Random(0))
  config = config_of(tmp_path / 'corpus', tmp_path / 'cache')
  for index in range(3):
    prepare_shard(config, index, 3)
  [recipe] = store_recipes(config).values()
  aside = recipe.folder.with_name(f'{recipe.folder.name}.merging')
  shutil.copytree(next(recipe.folder.parent.glob('*.shard-00000-of-00003')), aside)  # what a kill leaves
  assert find_shards(recipe.folder) == {3: [0, 1, 2]}
  assert merge_shards(recipe.folder, [])
  assert_same(open_data(config_of(tmp_path / 'corpus', tmp_path / 'one')), open_data(config))


def test_warnings_about_all_files_are_not_those_of_a_shard(tmp_path, capsys):
  (tmp_path / 'corpus').mkdir()
  for name, text in (('a', 'one\n---\ntwo'), ('b', 'three'), ('c', 'four\n---\nfive')):
    (tmp_path / 'corpus' / f'{name}.txt').write_text(text * 50)
  config = DataConfig(path=str(tmp_path / 'corpus'), cache_dir=str(tmp_path / 'cache'), tokenizer='byte',
                      split='document', val_fraction=0.0, separator='\n---\n')
  for index in range(3):
    prepare_shard(config, index, 3)
  merge(config)
  assert 'occurs in no text file' not in capsys.readouterr().out


def test_dask_workers_prepare_shards_although_one_is_killed(tmp_path):
  distributed = pytest.importorskip('distributed')
  from llm_jax.base import plugins
  from llm_jax.extras.dask_shards import prepare
  write_parts(tmp_path / 'corpus', random.Random(3))
  (tmp_path / 'dask_killer.py').write_text(KILLER)
  one = open_data(config_of(tmp_path / 'corpus', tmp_path / 'one'))
  plugins.load_all([str(tmp_path / 'dask_killer.py')])
  config = config_of(tmp_path / 'corpus', tmp_path / 'cache', format='deadly')
  with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
    prepare(config, cluster.scheduler_address, 6, [str(tmp_path / 'dask_killer.py')])
  assert (tmp_path / 'killed').exists()
  assert_same(one, open_data(config))


def test_an_address_without_a_scheduler_is_one_message(tmp_path, monkeypatch):
  pytest.importorskip('distributed')
  from llm_jax.extras import dask_shards
  monkeypatch.setattr(dask_shards, 'TIMEOUT', 0.5)
  write_parts(tmp_path / 'corpus', random.Random(0))
  with pytest.raises(ConfigError, match='no Dask scheduler answers at'):
    dask_shards.prepare(config_of(tmp_path / 'corpus', tmp_path / 'cache'), 'tcp://127.0.0.1:9', 2, [])
