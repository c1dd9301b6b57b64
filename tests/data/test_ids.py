"""Sources of token ids alone need no tokenizer, in every format; Megatron's pairs are read by their index."""

import json

import numpy as np
import pytest
from bad_files import megatron

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources.documents import SourceConfig

IDS = np.random.default_rng(0).integers(0, 50_000, (20, 50))


def write_parquet(path):
  import pyarrow
  import pyarrow.parquet
  pyarrow.parquet.write_table(pyarrow.table({'input_ids': IDS.tolist()}), path)


def write_hdf5(path):
  import h5py
  with h5py.File(path, 'w') as f:
    f['ids'] = IDS


WRITERS = {'x.bin': lambda path: IDS.astype(np.uint16).tofile(path), 'x.npy': lambda path: np.save(path, IDS),
           'x.npz': lambda path: np.savez(path, IDS), 'x.parquet': write_parquet, 'x.h5': write_hdf5,
           'x.jsonl': lambda path: path.write_text(''.join(json.dumps({'ids': row}) + '\n' for row in IDS.tolist())),
           'x.json': lambda path: path.write_text(json.dumps([{'ids': row} for row in IDS.tolist()]))}


def opened(folder, path, **config):
  return open_data(DataConfig(**{'path': str(path), 'split': 'tail', 'val_fraction': 0.2,
                                 'cache_dir': str(folder / 'cache'), **config}))


@pytest.mark.parametrize('tokenizer', ['bpe', 'byte', 'none'])
@pytest.mark.parametrize('name', WRITERS)
def test_ids_alone_need_no_tokenizer_in_any_format(name, tokenizer, tmp_path, capsys):
  WRITERS[name](tmp_path / name)
  data = opened(tmp_path, tmp_path / name, tokenizer=tokenizer)
  assert data.tokenizer is None
  assert data.train['data'].tokens[:].tolist() + data.val['data'].tokens[:].tolist() == IDS.ravel().tolist()
  assert data.vocab_size == IDS.max() + 1
  assert ('token ids alone' in capsys.readouterr().out) == (tokenizer != 'none')


def test_bytes_go_with_the_tokenizer_byte_alone(tmp_path):
  (tmp_path / 'x').write_bytes(bytes(range(256)) * 4)
  assert opened(tmp_path, tmp_path / 'x', format='bytes', tokenizer='byte').vocab_size == 257
  with pytest.raises(ConfigError, match='set it to byte'):
    opened(tmp_path, tmp_path / 'x', format='bytes', tokenizer='bpe')


@pytest.mark.parametrize('name', ['x.npy', 'x.bin'])
def test_ids_beside_texts_are_refused(name, tmp_path):
  (tmp_path / 'a.txt').write_text('some text ' * 50)
  WRITERS[name](tmp_path / name)
  sources = {'texts': SourceConfig(str(tmp_path / 'a.txt')), 'ids': SourceConfig(str(tmp_path / name))}
  with pytest.raises(ConfigError, match=rf'{name} holds token ids beside .*a\.txt; set it to the tokenizer of these'):
    opened(tmp_path, '', sources=sources)


# Megatron.

@pytest.mark.parametrize('dtype', [np.int32, np.uint16, np.int64])
@pytest.mark.parametrize('place', ['pair', 'prefix', 'folder', 'val_path'])
def test_a_pair_of_megatron_is_read_by_its_index(dtype, place, tmp_path):
  folder = tmp_path / 'pair'
  folder.mkdir()
  ids = IDS.ravel()[:12].astype(dtype)
  (folder / 'corpus.idx').write_bytes(megatron([2, 1, 4, 0, 3, 2], [0, 2, 3, 4, 6], dtype))
  ids.tofile(folder / 'corpus.bin')
  path = {'prefix': folder / 'corpus', 'folder': folder}.get(place, folder / 'corpus.bin')
  config = {'val_path': str(folder / 'corpus.bin')} if place == 'val_path' else {'val_fraction': 0.0}
  data = opened(tmp_path, path, **config)
  store = data.val['data'] if place == 'val_path' else data.train['data']
  assert store.tokens[:].tolist() == ids.tolist()
  assert store.starts.tolist() == [0, 3, 7], 'the empty document has no tokens'


def test_a_part_of_a_pair_keeps_the_borders_inside_it(tmp_path):
  (tmp_path / 'x.idx').write_bytes(megatron([3, 4, 3], [0, 1, 2, 3], np.uint16))
  IDS.ravel()[:10].astype(np.uint16).tofile(tmp_path / 'x.bin')
  data = opened(tmp_path, tmp_path / 'x.bin', val_fraction=0.5)
  assert (data.train['data'].starts.tolist(), data.val['data'].starts.tolist()) == ([0, 3], [0, 2])


def test_an_index_without_sequences_gives_the_type(tmp_path, capsys):
  (tmp_path / 'x.idx').write_bytes(megatron([], [], np.int32) + bytes(48))
  IDS.ravel().astype(np.int32).tofile(tmp_path / 'x.bin')
  data = opened(tmp_path, tmp_path / 'x.bin', val_fraction=0.0)
  assert data.train['data'].tokens[:].tolist() == IDS.ravel().tolist()
  assert 'lists no sequences' in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r'config\.data\.dtype: uint16, but .*x\.idx says int32'):
    opened(tmp_path, tmp_path / 'x.bin', dtype='uint16')


@pytest.mark.parametrize(('ids', 'dtype', 'refused'), [
    (np.arange(100), np.int32, True), (np.arange(0, 130_000, 7), np.int32, True), (np.arange(100), np.int64, True),
    (np.arange(100), np.uint16, False), (np.arange(1000) % 3, np.uint16, False), (np.zeros(100), np.uint16, False),
    (np.repeat(np.arange(500), 2) % 16, np.uint16, False)])
def test_wide_ids_are_not_read_as_uint16(ids, dtype, refused, tmp_path):
  ids.astype(dtype).tofile(tmp_path / 'x.bin')
  if refused:
    with pytest.raises(DataError, match=f'dtype={np.dtype(dtype).name}'):
      opened(tmp_path, tmp_path / 'x.bin', val_fraction=0.0)
  found = opened(tmp_path, tmp_path / 'x.bin', val_fraction=0.0, dtype=np.dtype(dtype).name).train['data']
  assert found.tokens[:].tolist() == ids.tolist()
