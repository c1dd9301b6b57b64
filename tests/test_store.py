"""The token store: nothing lost, nothing invented, whole or absent; and .bin files as they come."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llm_jax.data import DataConfig, check_fingerprint, data_fingerprint, open_data, tokenize
from llm_jax.data.tokenizers import TOKENIZERS, decode
from llm_jax.errors import ConfigError, DataError, StorageError

WORDS = ['the', 'cat', 'wörter', '中文', '\U0001F600', 'x = 1', '\t', '\r\n', '<|endoftext|>', 'é', 'zzz']


def write_corpus(folder, num_files, words_per_file=40, seed=0):
  """A folder of texts of uneven lengths; returns {name: text} in the order in which they are read."""
  folder.mkdir(parents=True, exist_ok=True)
  texts = {}
  for i in range(num_files):
    rng = random.Random(f'{seed} {i}')
    texts[f'{i:03}.txt'] = ' '.join(rng.choices(WORDS, k=rng.randrange(1, 2 * words_per_file)))
    (folder / f'{i:03}.txt').write_bytes(texts[f'{i:03}.txt'].encode())
  return texts


def config_of(tmp_path, **overrides):
  return DataConfig(**{'path': str(tmp_path / 'corpus'), 'tokenizer': 'byte', 'vocab_size': 300, 'val_fraction': 0.3,
                       'cache_dir': str(tmp_path / 'cache'), **overrides})


def documents_of(store, tokenizer):
  assert store.starts[0] == 0
  rows = np.split(store.tokens, store.starts[1:])
  assert all(row[0] == tokenizer.eot_id and tokenizer.eot_id not in row[1:] for row in rows)
  return [decode(tokenizer, row[1:]) for row in rows]


def files_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def only_store(cache):
  [store] = [path for path in (Path(cache) / 'stores').iterdir() if path.is_dir()]
  return store


@pytest.mark.parametrize('split', ['document', 'tail'])
@pytest.mark.parametrize('tokenizer', list(TOKENIZERS))
def test_both_splits_together_are_the_corpus(tmp_path, tokenizer, split):
  corpus = write_corpus(tmp_path / 'corpus', 30)
  data = open_data(config_of(tmp_path, tokenizer=tokenizer, split=split))
  train, val = (documents_of(store, data.tokenizer) for store in (data.train, data.val))
  assert train
  assert val
  if split == 'tail':
    assert ''.join(train + val) == ''.join(corpus.values())
  else:
    assert sorted(train + val) == sorted(corpus.values())
    assert [t for t in corpus.values() if t in train] == train  # each side in the order of the files
    assert [t for t in corpus.values() if t in val] == val
  assert data.train.num_bytes + data.val.num_bytes == len(''.join(corpus.values()).encode())


@pytest.mark.parametrize('split', ['document', 'tail'])
@pytest.mark.parametrize('tokenizer', list(TOKENIZERS))
def test_store_is_what_tokenizing_by_hand_gives(tmp_path, tokenizer, split):
  write_corpus(tmp_path / 'corpus', 25)
  data = open_data(config_of(tmp_path, tokenizer=tokenizer, split=split))
  texts = {'train': documents_of(data.train, data.tokenizer), 'val': documents_of(data.val, data.tokenizer)}
  # Merges are learnt from the training part alone; characters are taken from both.
  by_hand = TOKENIZERS[tokenizer](texts['train'] + (texts['val'] if tokenizer == 'char' else []), 300)
  assert data.tokenizer.to_json() == by_hand.to_json()
  assert data.vocab_size == len(by_hand.token_bytes)
  for name in ('train', 'val'):
    rows = [[by_hand.eot_id, *ids.tolist()] for ids in by_hand.encode(texts[name])]
    store = getattr(data, name)
    assert store.tokens.tolist() == np.concatenate(rows).tolist()
    assert store.starts.tolist() == [sum(map(len, rows[:i])) for i in range(len(rows))]
    assert store.num_bytes == len(''.join(texts[name]).encode())
    assert store.sha256 == hashlib.sha256(store.tokens.tobytes()).hexdigest()


def test_ids_beyond_uint16_are_kept(tmp_path):
  characters = [chr(c) for c in range(0x20, 0x20 + 70000) if not 0xD800 <= c < 0xE000]
  random.Random(0).shuffle(characters)
  (tmp_path / 'corpus').mkdir()
  (tmp_path / 'corpus/all.txt').write_bytes(''.join(characters).encode())
  data = open_data(config_of(tmp_path, tokenizer='char'))
  assert data.vocab_size > 1 << 16
  train, val = (documents_of(store, data.tokenizer) for store in (data.train, data.val))
  assert ''.join(train + val) == ''.join(characters)


def test_document_split_is_stable_when_files_come_and_go(tmp_path):
  def sides():
    data = open_data(config_of(tmp_path))
    return [set(documents_of(store, data.tokenizer)) for store in (data.train, data.val)]

  folder = tmp_path / 'corpus'
  folder.mkdir()
  for i in range(60):
    (folder / f'{i:03}.txt').write_text(f'text of {i}')
  train, val = sides()
  assert 5 < len(val) < 35  # of 60, at val_fraction 0.3
  (folder / '000.txt').unlink()
  (folder / '0005.txt').write_text('a new one between')
  (folder / 'aaa.txt').write_text('a new one behind')
  new = {'a new one between', 'a new one behind'}
  new_train, new_val = sides()
  assert new_train - new == train - {'text of 0'}
  assert new_val - new == val - {'text of 0'}
  assert new <= new_train | new_val


@pytest.mark.parametrize('val_fraction', [0.1, 0.5, 0.77])
def test_tail_split_cuts_at_the_character(tmp_path, val_fraction):
  corpus = write_corpus(tmp_path / 'corpus', 5)
  text = ''.join(corpus.values())
  data = open_data(config_of(tmp_path, val_fraction=val_fraction))  # under 20 files: tail
  train, val = (documents_of(store, data.tokenizer) for store in (data.train, data.val))
  cut = int(len(text) * (1 - val_fraction))
  assert (''.join(train), ''.join(val)) == (text[:cut], text[cut:])
  # The document across the border is cut in two, the others are whole.
  assert len(train) + len(val) == len(corpus) + 1
  assert len(set(train + val) & set(corpus.values())) == len(corpus) - 1


def test_reopened_is_the_same_and_not_made_again(tmp_path):
  write_corpus(tmp_path / 'corpus', 3)
  first = open_data(config_of(tmp_path, tokenizer='bpe'))
  store = only_store(tmp_path / 'cache')
  stats = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
  files = files_of(store)
  second = open_data(config_of(tmp_path, tokenizer='bpe'))
  assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == stats
  assert files_of(store) == files
  for a, b in ((first.train, second.train), (first.val, second.val)):
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.starts.tolist() == b.starts.tolist()
    assert (a.sha256, a.num_bytes) == (b.sha256, b.num_bytes)


def test_another_corpus_or_recipe_is_another_store(tmp_path):
  write_corpus(tmp_path / 'corpus', 3)
  seen = set()
  for overrides in ({}, {'tokenizer': 'char'}, {'tokenizer': 'bpe'}, {'tokenizer': 'bpe', 'vocab_size': 290},
                    {'val_fraction': 0.2}, {'split': 'tail'}):
    open_data(config_of(tmp_path, **overrides))
    stores = {path for path in (tmp_path / 'cache/stores').iterdir() if path.is_dir()}
    assert len(stores - seen) == 1, overrides
    seen = stores
  with open(tmp_path / 'corpus/001.txt', 'a') as f:
    f.write('one more line')
  data = open_data(config_of(tmp_path))
  assert 'one more line' in ''.join(documents_of(data.train, data.tokenizer) + documents_of(data.val, data.tokenizer))


@pytest.mark.parametrize('name', ['train.tokens', 'val.tokens', 'val.starts', 'tokenizer.json', 'manifest.json'])
@pytest.mark.parametrize('damage', ['short', 'long', 'gone'])
def test_damaged_store_is_refused(tmp_path, name, damage):
  write_corpus(tmp_path / 'corpus', 3)
  open_data(config_of(tmp_path))
  path = only_store(tmp_path / 'cache') / name
  if damage == 'gone':
    path.unlink()
  else:
    os.truncate(path, path.stat().st_size + (8 if damage == 'long' else -8))
  with pytest.raises(DataError) as e:
    open_data(config_of(tmp_path))
  assert str(path) in str(e.value)


@pytest.mark.parametrize(('text', 'split'), [('', 'tail'), ('a', 'tail'), ('one document only', 'document')])
def test_no_text_for_a_split_is_an_error_that_leaves_no_store(tmp_path, text, split):
  (tmp_path / 'corpus').mkdir()
  (tmp_path / 'corpus/a.txt').write_text(text)
  with pytest.raises(DataError, match='no text for'):
    open_data(config_of(tmp_path, split=split, val_fraction=0.01))
  assert not [path for path in (tmp_path / 'cache/stores').iterdir() if path.is_dir()]


@pytest.mark.parametrize('below', ['', 'deeper/still'])
def test_cache_dir_that_cannot_be_written(tmp_path, below):
  write_corpus(tmp_path / 'corpus', 3)
  (tmp_path / 'file').write_text('not a folder')
  with pytest.raises(StorageError, match='cache_dir') as e:
    open_data(config_of(tmp_path, cache_dir=str(tmp_path / 'file' / below)))
  assert str(tmp_path / 'file') in str(e.value)


def test_tokenize_gives_all_of_a_source_in_one_store(tmp_path):
  corpus = write_corpus(tmp_path / 'corpus', 6)
  tokenizer = TOKENIZERS['byte']([], 0)
  store = tokenize(str(tmp_path / 'corpus'), tokenizer)
  assert documents_of(store, tokenizer) == list(corpus.values())
  assert store.num_bytes == len(''.join(corpus.values()).encode())


def test_fingerprint_names_what_differs(tmp_path):
  write_corpus(tmp_path / 'corpus', 3)
  config = config_of(tmp_path, seq_len=16)
  data = open_data(config)
  saved = json.loads(json.dumps(data_fingerprint(config, data, batch_size=8, seed=0)))
  check_fingerprint(saved, data_fingerprint(config, open_data(config), batch_size=8, seed=0))
  other = config_of(tmp_path, seq_len=32, mask_documents=False, val_fraction=0.2)
  with pytest.raises(ConfigError) as e:
    check_fingerprint(saved, data_fingerprint(other, open_data(other), batch_size=4, seed=1))
  for words in ('config.seed', 'config.data.seq_len: checkpoint 16, now 32', 'mask_documents', 'rows in a batch',
                'training data'):
    assert words in str(e.value)
  assert 'config.data.task' not in str(e.value)


# Other processes.

OPEN = '''
import sys, time
from pathlib import Path
from llm_jax.data import DataConfig, open_data
print('ready', flush=True)
while not Path(sys.argv[2]).exists():
  time.sleep(0.001)
data = open_data(DataConfig(path=sys.argv[1], tokenizer='bpe', vocab_size=300, val_fraction=0.3, cache_dir=sys.argv[3]))
print('sha256', data.train.sha256, data.val.sha256)
'''


def start(corpus, cache, go, **env):
  """A process that is about to open the store at `cache`, and does once the file `go` exists."""
  return subprocess.Popen([sys.executable, '-c', OPEN, corpus / 'corpus', go, cache], text=True,
                          env=os.environ | {'JAX_PLATFORMS': 'cpu'} | env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """A corpus that takes a while to tokenize, and the files of a store that nothing disturbed."""
  tmp_path = tmp_path_factory.mktemp('undisturbed')
  write_corpus(tmp_path / 'corpus', 8, words_per_file=15_000)
  open_data(config_of(tmp_path, tokenizer='bpe', cache_dir=str(tmp_path / 'cache')))
  return tmp_path, files_of(only_store(tmp_path / 'cache'))


def test_killed_while_writing_leaves_nothing_behind_that_is_taken_for_a_store(undisturbed, tmp_path):
  corpus, expected = undisturbed
  stores = tmp_path / 'cache/stores'
  (tmp_path / 'go').touch()
  for _ in range(5):  # again, should it ever be done before the signal reaches it
    process = start(corpus, tmp_path / 'cache', tmp_path / 'go')
    try:
      while not list(stores.glob('*.partial')) and process.poll() is None:
        time.sleep(0.001)
    finally:
      process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode == -signal.SIGKILL and list(stores.glob('*.partial')):
      break
  assert process.returncode == -signal.SIGKILL
  [partial] = [path for path in stores.iterdir() if path.is_dir()]
  assert partial.name.endswith('.partial')
  assert files_of(partial) != expected

  open_data(config_of(corpus, tokenizer='bpe', cache_dir=str(tmp_path / 'cache')))
  store = only_store(tmp_path / 'cache')
  assert store.name == partial.name.removesuffix('.partial')
  assert files_of(store) == expected


def test_two_processes_at_once_make_one_store(undisturbed, tmp_path, capfd):
  corpus, expected = undisturbed
  # An ASCII locale beside: the files of a store do not depend on it.
  other = start(corpus, tmp_path / 'cache', tmp_path / 'go', LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
  assert other.stdout.readline() == 'ready\n'
  (tmp_path / 'go').touch()
  while not list(tmp_path.glob('cache/stores/*.lock')) and other.poll() is None:
    time.sleep(0.001)
  data = open_data(config_of(corpus, tokenizer='bpe', cache_dir=str(tmp_path / 'cache')))
  output = other.communicate(timeout=120)[0]
  assert other.returncode == 0, output
  assert output.splitlines()[-1] == f'sha256 {data.train.sha256} {data.val.sha256}'
  assert (output + capfd.readouterr().out).count('kept in') == 1  # one made it, the other waited
  assert files_of(only_store(tmp_path / 'cache')) == expected


# Token files made elsewhere.

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
def test_bin_formats_hold_the_same_tokens(tmp_path, content):
  (tmp_path / 'x.bin').write_bytes(content)
  data = open_data(bin_config(tmp_path / 'x.bin', eot_id=50256))
  assert data.train.tokens.tolist() + data.val.tokens.tolist() == TOKENS.tolist()
  assert len(data.train.tokens) == 750
  assert data.train.starts.tolist() == [0, 300, 301]
  assert data.val.starts.tolist() == [0, 50, 249]
  assert data.vocab_size == 50257
  assert data.tokenizer is None
  assert data.train.sha256 != data.val.sha256


def test_bin_beyond_uint16(tmp_path):
  tokens = np.array([128000, 5, 127999, 70000], np.uint32)
  (tmp_path / 'x.bin').write_bytes(llmc(tokens, 20240801))
  data = open_data(bin_config(tmp_path / 'x.bin', val_path=str(tmp_path / 'x.bin')))
  assert data.train.tokens.tolist() == data.val.tokens.tolist() == tokens.tolist()
  assert data.vocab_size == 128001


@pytest.mark.parametrize(('content', 'words'), [
    (llmc(TOKENS, count=999), ['999 tokens', '3022 bytes', '3024']),
    (llmc(TOKENS, count=1001), ['1001 tokens', '3026 bytes', '3024']),
    (llmc(TOKENS, count=-1), ['-1 tokens', '3024']),
    (llmc(TOKENS)[:-1], ['1000 tokens', '3024 bytes', '3023']),  # cut within a token
    (llmc(TOKENS)[:1024], ['1000 tokens', '1024']),  # cut behind the header
    (llmc(TOKENS)[:500], ['1000 tokens', '500']),  # cut within the header
    (llmc(TOKENS.astype(np.uint32), 20240801)[:-2], ['1000 tokens', '5024 bytes', '5022']),
    (llmc(TOKENS[:0]), ['0 tokens']),
    (TOKENS.tobytes()[:-1], ['1999 bytes']),
    (b'', ['0 bytes']),
])
def test_damaged_bin_is_refused(tmp_path, content, words):
  (tmp_path / 'x.bin').write_bytes(content)
  with pytest.raises(DataError) as e:
    open_data(bin_config(tmp_path / 'x.bin'))
  for word in (str(tmp_path / 'x.bin'), *words):
    assert word in str(e.value)


def test_bin_without_eot_id_is_one_document(tmp_path):
  TOKENS.tofile(tmp_path / 'x.bin')
  data = open_data(bin_config(tmp_path / 'x.bin'))
  assert data.train.starts.tolist() == data.val.starts.tolist() == [0]
  # A file that does not open with the token still has a document there.
  data = open_data(bin_config(tmp_path / 'x.bin', val_path=str(tmp_path / 'x.bin'), eot_id=int(TOKENS[5])))
  expected = [0, *(i for i in range(1000) if TOKENS[i] == TOKENS[5])]
  assert data.train.starts.tolist() == data.val.starts.tolist() == expected


def test_folder_of_bins(tmp_path):
  TOKENS[:600].tofile(tmp_path / 'train.bin')
  (tmp_path / 'val.bin').write_bytes(llmc(TOKENS[600:]))
  data = open_data(bin_config(tmp_path, eot_id=50256))
  assert data.train.tokens.tolist() == TOKENS[:600].tolist()
  assert data.val.tokens.tolist() == TOKENS[600:].tolist()
  assert data.val.starts.tolist() == [0, 200, 399]
  assert data.vocab_size == 50257
  TOKENS[:9].tofile(tmp_path / 'other.bin')
  data = open_data(bin_config(tmp_path, val_path=str(tmp_path / 'other.bin')))
  assert data.val.tokens.tolist() == TOKENS[:9].tolist()
  (tmp_path / 'val.bin').unlink()
  with pytest.raises(DataError, match=r'val\.bin: no such'):
    open_data(bin_config(tmp_path))


def test_bin_too_short_to_split(tmp_path):
  TOKENS[:3].tofile(tmp_path / 'x.bin')
  with pytest.raises(DataError, match='2 or more'):
    open_data(bin_config(tmp_path / 'x.bin'))


def test_bin_identity_follows_its_content(tmp_path):
  shas = set()
  for i in range(5):
    tokens = TOKENS.copy()
    tokens[i * 150] += i > 0
    tokens.tofile(tmp_path / 'x.bin')
    shas.add(open_data(bin_config(tmp_path / 'x.bin')).train.sha256)
  assert len(shas) == 5
