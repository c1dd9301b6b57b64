"""A token store holds exactly its corpus, and is complete or absent."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from llm_jax.base.errors import ConfigError, DataError, StorageError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import check_fingerprint, data_fingerprint, open_data, tokenize
from llm_jax.data.sources.documents import SourceConfig
from llm_jax.data.sources.files import open_source
from llm_jax.data.sources.filters import FilterConfig
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, TokenizerConfig, decode

WORDS = ['the', 'cat', 'wörter', '中文', '\U0001F600', 'x = 1', '\t', '\r\n', '<|endoftext|>', 'é', 'zzz']
LOSSLESS = ['byte', 'char', 'bpe']


def write_corpus(folder, num_files, words_per_file=40, seed=0):
  """Writes a folder of texts of uneven lengths; returns {name: text} in reading order."""
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


def texts_of(store, tokenizer):
  """The text of each document of a store."""
  assert store.starts[0] == 0
  rows = np.split(np.asarray(store.tokens[:]), store.starts[1:])
  ends = tokenizer.eos_id != tokenizer.bos_id
  assert all(row[0] == tokenizer.bos_id and tokenizer.bos_id not in row[1:] for row in rows)
  assert not ends or all(row[-1] == tokenizer.eos_id and tokenizer.eos_id not in row[:-1] for row in rows)
  return [decode(tokenizer, row[1:-1] if ends else row[1:]) for row in rows]


def sides_of(config, sides=('train', 'val')):
  data = open_data(config)
  return [texts_of(data.splits[side]['data'], data.tokenizer) for side in sides]


def files_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def only_store(cache):
  [store] = [path for path in (Path(cache) / 'stores').iterdir() if path.is_dir()]
  return store


@pytest.mark.parametrize('split', ['document', 'tail', 'count'])
@pytest.mark.parametrize('tokenizer', LOSSLESS)
def test_both_splits_together_are_the_corpus(tmp_path, tokenizer, split):
  corpus = write_corpus(tmp_path / 'corpus', 30)
  data = open_data(config_of(tmp_path, tokenizer=tokenizer, split=split, val_documents=7))
  train, val = (texts_of(side['data'], data.tokenizer) for side in (data.train, data.val))
  assert train
  assert val
  if split == 'tail':
    assert ''.join(train + val) == ''.join(corpus.values())
  else:
    assert sorted(train + val) == sorted(corpus.values())
    assert [t for t in corpus.values() if t in train] == train  # each side in the order of the files
    assert [t for t in corpus.values() if t in val] == val
  assert data.train['data'].num_bytes + data.val['data'].num_bytes == len(''.join(corpus.values()).encode())
  assert data.train['data'].bytes_scale == 1


@pytest.mark.parametrize('split', ['document', 'tail'])
@pytest.mark.parametrize('tokenizer', list(TOKENIZERS))
def test_store_equals_tokenizing_by_hand(tmp_path, tokenizer, split):
  write_corpus(tmp_path / 'corpus', 25)
  texts = dict(zip(('train', 'val'), sides_of(config_of(tmp_path, split=split)), strict=True))
  data = open_data(config_of(tmp_path, tokenizer=tokenizer, split=split))
  # Merges and words are learnt from the training split only, characters from both.
  by_hand = TOKENIZERS[tokenizer].fit(texts['train'] + (texts['val'] if tokenizer == 'char' else []),
                                      TokenizerConfig(300))
  assert data.tokenizer.to_json() == by_hand.to_json()
  assert data.vocab_size == len(by_hand.token_bytes)
  end = [by_hand.eos_id] if by_hand.eos_id != by_hand.bos_id else []
  for name in ('train', 'val'):
    rows = [[by_hand.bos_id, *ids.tolist(), *end] for ids in by_hand.encode(texts[name])]
    store = data.splits[name]['data']
    assert store.tokens[:].tolist() == np.concatenate(rows).tolist()
    assert store.starts.tolist() == [sum(map(len, rows[:i])) for i in range(len(rows))]
    assert store.num_bytes == len(''.join(texts[name]).encode())
    known_bytes = sum(len(by_hand.token_bytes[token]) for token in store.tokens[:])
    assert store.num_bytes == pytest.approx(store.bytes_scale * known_bytes)


def test_ids_beyond_uint16_are_kept(tmp_path):
  characters = [chr(c) for c in range(0x20, 0x20 + 70000) if not 0xD800 <= c < 0xE000]
  random.Random(0).shuffle(characters)
  (tmp_path / 'corpus').mkdir()
  (tmp_path / 'corpus/all.txt').write_bytes(''.join(characters).encode())
  data = open_data(config_of(tmp_path, tokenizer='char'))
  assert data.vocab_size > 1 << 16
  train, val = (texts_of(side['data'], data.tokenizer) for side in (data.train, data.val))
  assert ''.join(train + val) == ''.join(characters)


def test_shards_are_one_array(tmp_path):
  write_corpus(tmp_path / 'corpus', 30)
  whole = open_data(config_of(tmp_path)).train['data']
  data = open_data(config_of(tmp_path, shard_tokens=700)).train['data']
  expected = np.asarray(whole.tokens[:])
  assert len(data.tokens.files) == -(-len(expected) // 700) > 5
  assert all(file.size == 700 for file in data.tokens.files[:-1])
  assert len(data.tokens) == len(expected)
  rng = random.Random(0)
  for _ in range(200):
    begin, end = rng.randrange(-2, len(expected) + 9), rng.randrange(0, len(expected) + 9)
    assert data.tokens[begin:end].tolist() == expected[begin:end].tolist()
  assert data.starts.tolist() == whole.starts.tolist()


# Long texts, pairs, labels, filters, bad records.

def jsonl(path, records):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join((json.dumps(r) if isinstance(r, dict) else r) + '\n' for r in records))


def manifest_of(cache):
  return json.loads((only_store(cache) / 'manifest.json').read_text())


@pytest.mark.parametrize('split', ['document', 'tail', 'count'])
def test_text_in_pieces_is_one_document(tmp_path, split):
  corpus = write_corpus(tmp_path / 'corpus', 30, words_per_file=200)
  options = {'split': split, 'val_documents': 7}
  expected = sides_of(config_of(tmp_path, **options), ('train', 'val'))
  pieces = sides_of(config_of(tmp_path, max_record_bytes=64, cache_dir=str(tmp_path / 'other'), **options))
  assert manifest_of(tmp_path / 'other')['report']['in'] == len(corpus)
  source = open_source(SourceConfig(str(tmp_path / 'corpus'), max_record_bytes=64), tmp_path)
  assert len(list(source.records())) > 5 * len(corpus)
  if split == 'document':  # the hash of the first piece decides the split
    assert sorted(pieces[0] + pieces[1]) == sorted(corpus.values())
  else:
    assert pieces == expected


def test_filters_treat_a_text_in_pieces_as_one_document(tmp_path):
  (tmp_path / 'corpus').mkdir()
  head, texts = 'the same head in both\n' * 3, ['one goes on here\n', 'another goes on there\n']
  for i, text in enumerate(texts):
    (tmp_path / f'corpus/{i}.txt').write_text(head + text * 3)
  (tmp_path / 'corpus/2.txt').write_text('last')
  train, val = sides_of(config_of(tmp_path, split='count', val_documents=1, max_record_bytes=len(head),
                                  filters=FilterConfig(deduplicate=True)))
  assert val == [head + texts[0] * 3]
  assert train == [head + texts[1] * 3, 'last']
  _, val = sides_of(config_of(tmp_path, split='count', val_documents=1, max_record_bytes=len(head),
                              filters=FilterConfig(min_chars=len(head))))
  assert val == [head + texts[0] * 3]  # the filter judges the first piece, not the short last one


def test_pairs_and_labels_are_kept_with_their_documents(tmp_path):
  records = [{'text': f'question {i}' * (i % 4 + 1), 'reply': 'yes' if i % 3 else 'no, at length', 'kind': 'abc'[i % 3]}
             for i in range(80)]
  jsonl(tmp_path / 'corpus/x.jsonl', records)
  data = open_data(config_of(tmp_path, field='text', answer_field='reply', label_field='kind', split='count',
                             val_documents=20))
  for store, expected in ((data.val['data'], records[:20]), (data.train['data'], records[20:])):
    rows = np.split(np.asarray(store.tokens[:]), store.starts[1:])
    assert [(decode(data.tokenizer, row[1:at]), decode(data.tokenizer, row[at:]))
            for row, at in zip(rows, store.answers, strict=True)] == [(r['text'], r['reply']) for r in expected]
    classes = manifest_of(tmp_path / 'cache')['classes']
    assert [classes[int(label)] for label in store.labels] == [r['kind'] for r in expected]


def test_pairs_with_different_answers_are_no_duplicates(tmp_path):
  jsonl(tmp_path / 'corpus/x.jsonl', [{'prompt': 'a coin?', 'completion': c} for c in ('heads', 'tails', 'heads')] +
        [{'prompt': f'{i}', 'completion': 'x'} for i in range(9)])
  open_data(config_of(tmp_path, split='tail', filters=FilterConfig(deduplicate=True)))
  assert manifest_of(tmp_path / 'cache')['report']['dropped'] == {'duplicate': 1}


@pytest.mark.parametrize('split', ['document', 'tail', 'count'])
def test_every_record_is_kept_dropped_or_bad(tmp_path, split):
  records = [{'text': f'text {i % 70} {"word " * (i % 7)}'} for i in range(200)]
  records += [{'text': ''}, 'broken', '{"text": 1}']
  random.Random(0).shuffle(records)
  jsonl(tmp_path / 'corpus/x.jsonl', records)
  data = open_data(config_of(
      tmp_path, split=split, val_documents=9, on_bad_record='skip', max_bad_fraction=0.1, field='text',
      filters=FilterConfig(min_chars=12, deduplicate=True)))
  report = manifest_of(tmp_path / 'cache')['report']
  assert report == data.reports['data']
  texts = [r['text'] for r in records if isinstance(r, dict)]
  kept = {text for text in texts if len(text) >= 12}
  assert report['in'] == len(records) == report['kept'] + sum(report['dropped'].values()) + report['bad']
  assert (report['kept'], report['bad'], report['dropped']['empty']) == (len(kept), 2, 1)
  assert report['dropped']['duplicate'] == sum(len(text) >= 12 for text in texts) - len(kept)
  stored = [text for side in (data.train, data.val) for text in texts_of(side['data'], data.tokenizer)]
  assert sorted(''.join(stored)) == sorted(''.join(kept))
  assert split == 'tail' or sorted(stored) == sorted(kept)
  with pytest.raises(DataError, match=r'line \d+'):
    open_data(config_of(tmp_path, split=split, val_documents=9, field='text'))
  with pytest.raises(DataError, match='max_bad_fraction'):
    open_data(config_of(tmp_path, split=split, val_documents=9, field='text', on_bad_record='skip',
                        max_bad_fraction=0.005))


# Opening a store again.

def test_reopening_a_store_changes_nothing(tmp_path):
  write_corpus(tmp_path / 'corpus', 3)
  first = open_data(config_of(tmp_path, tokenizer='bpe'))
  store = only_store(tmp_path / 'cache')
  stats = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
  files = files_of(store)
  second = open_data(config_of(tmp_path, tokenizer='bpe'))
  assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == stats
  assert files_of(store) == files
  for a, b in ((first.train['data'], second.train['data']), (first.val['data'], second.val['data'])):
    assert a.tokens[:].tolist() == b.tokens[:].tolist()
    assert a.starts.tolist() == b.starts.tolist()
    assert (a.sha256, a.num_bytes) == (b.sha256, b.num_bytes)


def test_a_changed_corpus_or_setting_makes_a_new_store(tmp_path):
  write_corpus(tmp_path / 'corpus', 3)
  seen = set()
  for overrides in ({}, {'tokenizer': 'char'}, {'tokenizer': 'bpe'}, {'tokenizer': 'bpe', 'vocab_size': 290},
                    {'val_fraction': 0.2}, {'split': 'document'},
                    {'shard_tokens': 99}, {'filters': FilterConfig(min_chars=2)}):
    open_data(config_of(tmp_path, **overrides))
    stores = {path for path in (tmp_path / 'cache/stores').iterdir() if path.is_dir()}
    assert len(stores - seen) == 1, overrides
    seen = stores
  with open(tmp_path / 'corpus/001.txt', 'a') as f:
    f.write('one more line')
  assert 'one more line' in ''.join(map(''.join, sides_of(config_of(tmp_path))))


@pytest.mark.parametrize('name', ['train-00000.tokens', 'val-00000.tokens', 'val.starts', 'tokenizer.json',
                                  'manifest.json'])
@pytest.mark.parametrize('damage', ['short', 'long', 'gone'])
def test_a_damaged_store_is_rejected(tmp_path, name, damage):
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


def test_verify_finds_one_flipped_bit(tmp_path):
  write_corpus(tmp_path / 'corpus', 30, words_per_file=300)
  open_data(config_of(tmp_path, shard_tokens=3000))
  store = only_store(tmp_path / 'cache')
  assert len(list(store.glob('train-*.tokens'))) > 3
  open_data(config_of(tmp_path, shard_tokens=3000, verify=True))
  for path in sorted(store.iterdir()):
    if path.name != 'manifest.json' and path.stat().st_size:
      content = bytearray(path.read_bytes())
      at = random.Random(path.name).randrange(len(content))
      content[at] ^= 1 << at % 8
      path.write_bytes(content)
      with pytest.raises(DataError) as e:
        open_data(config_of(tmp_path, shard_tokens=3000, verify=True))
      assert str(path) in str(e.value)
      content[at] ^= 1 << at % 8
      path.write_bytes(content)
  open_data(config_of(tmp_path, shard_tokens=3000, verify=True))


@pytest.mark.parametrize(('text', 'split'), [('', 'tail'), ('a', 'tail'), ('one document only', 'document')])
def test_an_empty_split_is_an_error(tmp_path, text, split):
  (tmp_path / 'corpus').mkdir()
  (tmp_path / 'corpus/a.txt').write_text(text)
  for _ in range(2):  # the first attempt must not leave a store behind
    with pytest.raises(DataError, match=r'token\(s\) for (train|val)'):
      open_data(config_of(tmp_path, split=split, val_fraction=0.01))


@pytest.mark.parametrize('below', ['', 'deeper/still'])
def test_an_unwritable_cache_dir_is_an_error(tmp_path, below):
  write_corpus(tmp_path / 'corpus', 3)
  (tmp_path / 'file').write_text('not a folder')
  with pytest.raises(StorageError, match='cache_dir') as e:
    open_data(config_of(tmp_path, cache_dir=str(tmp_path / 'file' / below)))
  assert str(tmp_path / 'file') in str(e.value)


def test_tokenize_puts_a_whole_source_in_one_store(tmp_path):
  corpus = write_corpus(tmp_path / 'corpus', 6)
  tokenizer = TOKENIZERS['byte'].fit([], TokenizerConfig())
  store = tokenize(str(tmp_path / 'corpus'), config_of(tmp_path, path='elsewhere'), tokenizer).val['data']
  assert texts_of(store, tokenizer) == list(corpus.values())
  assert store.num_bytes == len(''.join(corpus.values()).encode())


def test_fingerprint_errors_name_the_fields(tmp_path):
  write_corpus(tmp_path / 'corpus', 3)
  config = config_of(tmp_path, seq_len=16)
  data = open_data(config)
  saved = json.loads(json.dumps(data_fingerprint(config, data, batch_size=8, seed=0)))
  check_fingerprint(saved, data_fingerprint(config, open_data(config), batch_size=8, seed=0), step=5)
  other = config_of(tmp_path, seq_len=32, mask_documents=False, val_fraction=0.2)
  with pytest.raises(ConfigError) as e:
    check_fingerprint(saved, data_fingerprint(other, open_data(other), batch_size=4, seed=1), step=5)
  for words in ('config.seed', 'config.data.seq_len: checkpoint 16, now 32', 'mask_documents', 'rows in a batch',
                'training data'):
    assert words in str(e.value)
  assert 'config.data.task' not in str(e.value)
  with pytest.raises(ConfigError) as e:
    check_fingerprint(saved, data_fingerprint(other, open_data(other), batch_size=4, seed=1), 5,
                      {'val_fraction': (0.1, 0.2), 'num_workers': (0, 1)})
  assert 'config.data.val_fraction: checkpoint 0.1, now 0.2' in str(e.value)
  assert 'training data' not in str(e.value) and 'num_workers' not in str(e.value), 'the cause, not a hash'
  saved['order'] = 1
  with pytest.raises(ConfigError, match=r'the order of rows.*: checkpoint 1, now 2'):
    check_fingerprint(saved, data_fingerprint(config, open_data(config), batch_size=8, seed=0), step=5)
