"""enwik8 is the published file or an error; generated data follows its path, the same on any machine."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from web import serving

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.sources.documents import File, SourceConfig
from llm_jax.extras.named import enwik8, modular, synthetic

TEXT = b'<mediawiki>' * 1000


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setenv('no_proxy', '*')
  with serving() as server:
    yield server


def make_zip(path, name='enwik8', text=TEXT):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(name, text)
  return path


def get(tmp_path, url, **published):
  return enwik8(tmp_path / 'cache', url, **{'size': len(TEXT), 'sha1': hashlib.sha1(TEXT).hexdigest(), **published})


def test_enwik8_is_fetched_and_checked_once(tmp_path, server, monkeypatch):
  server.files['/enwik8.zip'] = make_zip(tmp_path / 'a.zip').read_bytes()
  monkeypatch.setenv('LLM_JAX_ENWIK8_URL', f'{server.url}/enwik8.zip')
  path = get(tmp_path, None)
  assert path.read_bytes() == TEXT
  server.stop()
  assert get(tmp_path, None) == path


@pytest.mark.parametrize(('name', 'text', 'published', 'message'), [
    ('enwik9', TEXT, {}, 'no file enwik8'), ('enwik8', TEXT[:-1], {}, f'{len(TEXT) - 1} bytes'),
    ('enwik8', b'?' + TEXT[1:], {}, hashlib.sha1(b'?' + TEXT[1:]).hexdigest()),
    ('enwik8', TEXT, {'size': 100_000_000}, 'the published file has 100000000')])
def test_a_wrong_enwik8_is_rejected_and_not_cached(tmp_path, server, name, text, published, message):
  server.files['/enwik8.zip'] = make_zip(tmp_path / 'a.zip', name, text).read_bytes()
  for hits in (1, 2):
    with pytest.raises(DataError, match=message):
      get(tmp_path, f'{server.url}/enwik8.zip', **published)
    assert len(server.hits) == hits
  assert not [p for p in (tmp_path / 'cache').rglob('*') if p.is_file()]


def test_a_local_enwik8_archive_is_checked_and_kept(tmp_path):
  good, bad = make_zip(tmp_path / 'good.zip'), make_zip(tmp_path / 'bad.zip', text=TEXT[1:])
  assert get(tmp_path, str(good)).read_bytes() == TEXT
  with pytest.raises(DataError, match=r'bad\.zip'):
    get(tmp_path, str(bad))
  assert bad.exists()


def read(reader, path):
  return list(reader(File(path, Path(path)), SourceConfig(path=path)))


@pytest.mark.parametrize('vocab_size', [1, 7, 50257, 1 << 31])
def test_synthetic_ids_are_uniform_and_extend_shorter_sets(vocab_size):
  documents = read(synthetic, f'synthetic:{vocab_size}:150001')
  ids = np.concatenate([d.text for d in documents])
  assert (ids.dtype, len(ids)) == (np.int64, 150001)
  assert [len(d.text) for d in documents[:-1]] == [65536, 65536]
  assert len({d.name for d in documents}) == 3
  assert not any(d.continues for d in documents)
  assert 0 <= ids.min() <= ids.max() < vocab_size
  counts = np.bincount((ids * 7 // vocab_size) if vocab_size >= 7 else ids)
  assert np.abs(counts - len(ids) / len(counts)).max() < 5 * (len(ids) / len(counts))**0.5  # 5 sigma
  more = np.concatenate([d.text for d in read(synthetic, f'synthetic:{vocab_size}:200000')])
  assert (more[:150001] == ids).all()


def test_synthetic_ids_are_the_same_everywhere():
  ids = read(synthetic, 'synthetic:1000:5')[0].text
  assert ids.tolist() == [203, 521, 848, 603, 818]
  assert sum(len(d.text) for d in read(synthetic, 'synthetic')) == 10_000_000


@pytest.mark.parametrize('operation', ['add', 'sub', 'mul', 'div'])
@pytest.mark.parametrize('p', [2, 13])
def test_modular_tables_hold_every_equation_once(p, operation):
  rows = [(*d.text.tolist(), *d.answer.tolist()) for d in read(modular, f'modular:{p}:{operation}')]
  holds = {'add': lambda a, b, c: (a + b - c) % p == 0, 'sub': lambda a, b, c: (a - b - c) % p == 0,
           'mul': lambda a, b, c: (a * b - c) % p == 0, 'div': lambda a, b, c: b > 0 and (b * c - a) % p == 0}
  expected = {(a, p, b, p + 1, c) for a in range(p) for b in range(p) for c in range(p) if holds[operation](a, b, c)}
  assert len(rows) == len(expected) == (p * (p - 1) if operation == 'div' else p * p)
  assert set(rows) == expected


def test_half_of_a_modular_table_is_a_fair_sample():
  documents = read(modular, 'modular')
  assert len(documents) == 97 * 96
  assert [d.name for d in documents] == [d.name for d in read(modular, 'modular')]
  assert documents[0].name.split(':')[-1] == '60,90'
  half = np.array([[d.text[0], d.text[2], d.answer[0]] for d in documents[:len(documents) // 2]])
  for column, least in zip(half.T, (0, 1, 0), strict=True):  # b is not 0
    counts = np.bincount(column)[least:]
    assert counts.min() > 20  # 48 each, 5 of 48 the standard deviation
  assert [d.name.split(':')[-1] for d in documents] != [d.name.split(':')[-1] for d in read(modular, 'modular:97:mul')]


@pytest.mark.parametrize('path', [
    'synthetic:x', 'synthetic:0:5', 'synthetic:5:0', 'synthetic:-1', 'synthetic:1:2:3', 'synthetic:', 'synthetic:²',
    'synthetic:99999999999:5', 'modular:12:div', 'modular:1', 'modular:97:pow', 'modular:97:add:3', 'modular:5000:add',
    f'synthetic:{"9" * 5000}'])
def test_impossible_paths_are_named(path):
  with pytest.raises(ConfigError, match=r'config\.data\.path') as e:
    read(synthetic if path.startswith('synthetic') else modular, path)
  assert path in str(e.value)
