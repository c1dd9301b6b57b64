"""Token files of other programs are mapped as they are, or rejected."""

import numpy as np
import pytest

from llm_jax.base.errors import DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data


def bin_config(path, **overrides):
  return DataConfig(path=str(path), val_fraction=0.25, **overrides)


def llmc(tokens, magic=20240520, count=None):
  header = np.zeros(256, np.int32)
  header[:3] = magic, 1, len(tokens) if count is None else count
  return header.tobytes() + np.asarray(tokens).tobytes()


TOKENS = np.random.default_rng(0).integers(0, 50000, 1000).astype(np.uint16)
TOKENS[[0, 300, 301, 800, 999]] = 50256


@pytest.mark.parametrize('content', [
    TOKENS.tobytes(), llmc(TOKENS), llmc(TOKENS.astype(np.uint32), 20240801)], ids=['nanogpt', 'llm.c', 'llm.c-32bit'])
def test_all_bin_formats_give_the_same_tokens(tmp_path, content):
  (tmp_path / 'x.bin').write_bytes(content)
  data = open_data(bin_config(tmp_path / 'x.bin', eot_id=50256))
  assert data.train['data'].tokens[:].tolist() + data.val['data'].tokens[:].tolist() == TOKENS.tolist()
  assert len(data.train['data'].tokens) == 750
  assert data.train['data'].starts.tolist() == [0, 300, 301]
  assert data.val['data'].starts.tolist() == [0, 50, 249]
  assert data.vocab_size == 50257
  assert data.tokenizer is None
  assert data.train['data'].sha256 != data.val['data'].sha256


def test_a_bin_may_hold_ids_beyond_uint16(tmp_path):
  tokens = np.array([128000, 5, 127999, 70000], np.uint32)
  (tmp_path / 'x.bin').write_bytes(llmc(tokens, 20240801))
  data = open_data(bin_config(tmp_path / 'x.bin', val_path=str(tmp_path / 'x.bin')))
  assert data.train['data'].tokens[:].tolist() == data.val['data'].tokens[:].tolist() == tokens.tolist()
  assert data.vocab_size == 128001


@pytest.mark.parametrize(('content', 'words'), [
    (llmc(TOKENS, count=999), ['999 tokens', '3022 bytes', '3024']),
    (llmc(TOKENS, count=1001), ['1001 tokens', '3026 bytes', '3024']),
    (llmc(TOKENS, count=-1), ['-1 tokens', '3024']),
    (llmc(TOKENS)[:-1], ['1000 tokens', '3024 bytes', '3023']),  # cut within a token
    (llmc(TOKENS)[:1024], ['1000 tokens', '1024']),  # cut behind the header
    (llmc(TOKENS)[:500], ['1000 tokens', '500']),  # cut within the header
    (llmc(TOKENS.astype(np.uint32), 20240801)[:-2], ['1000 tokens', '5024 bytes', '5022']),
    (llmc(TOKENS[:0]), ['0 token(s)']),
    (TOKENS.tobytes()[:-1], ['1999 bytes']),
    (b'', ['0 bytes']),
])
def test_a_damaged_bin_is_rejected(tmp_path, content, words):
  (tmp_path / 'x.bin').write_bytes(content)
  with pytest.raises(DataError) as e:
    open_data(bin_config(tmp_path / 'x.bin'))
  for word in (str(tmp_path / 'x.bin'), *words):
    assert word in str(e.value)


def test_bin_without_eot_id_is_one_document(tmp_path):
  TOKENS.tofile(tmp_path / 'x.bin')
  data = open_data(bin_config(tmp_path / 'x.bin'))
  assert data.train['data'].starts.tolist() == data.val['data'].starts.tolist() == [0]
  # A file that does not start with eot_id has a document at 0 too.
  data = open_data(bin_config(tmp_path / 'x.bin', val_path=str(tmp_path / 'x.bin'), eot_id=int(TOKENS[5])))
  expected = [0, *(i for i in range(1000) if TOKENS[i] == TOKENS[5])]
  assert data.train['data'].starts.tolist() == data.val['data'].starts.tolist() == expected


def test_a_folder_of_bins_gives_its_splits(tmp_path):
  TOKENS[:600].tofile(tmp_path / 'train.bin')
  (tmp_path / 'val.bin').write_bytes(llmc(TOKENS[600:]))
  data = open_data(bin_config(tmp_path, eot_id=50256))
  assert data.train['data'].tokens[:].tolist() == TOKENS[:600].tolist()
  assert data.val['data'].tokens[:].tolist() == TOKENS[600:].tolist()
  assert data.val['data'].starts.tolist() == [0, 200, 399]
  assert data.vocab_size == 50257
  TOKENS[:9].tofile(tmp_path / 'other.bin')
  data = open_data(bin_config(tmp_path, val_path=str(tmp_path / 'other.bin')))
  assert data.val['data'].tokens[:].tolist() == TOKENS[:9].tolist()
  (tmp_path / 'val.bin').unlink()
  data = open_data(bin_config(tmp_path))  # without val.bin, val is split off train.bin
  assert (len(data.train['data'].tokens), len(data.val['data'].tokens)) == (450, 150)


def test_a_bin_too_short_to_split_is_an_error(tmp_path):
  TOKENS[:3].tofile(tmp_path / 'x.bin')
  with pytest.raises(DataError, match='2 or more'):
    open_data(bin_config(tmp_path / 'x.bin'))


def test_bin_sha256_depends_on_its_content(tmp_path):
  shas = set()
  for i in range(5):
    tokens = TOKENS.copy()
    tokens[i * 150] += i > 0
    tokens.tofile(tmp_path / 'x.bin')
    shas.add(open_data(bin_config(tmp_path / 'x.bin')).train['data'].sha256)
  assert len(shas) == 5
