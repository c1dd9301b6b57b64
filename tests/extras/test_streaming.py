"""Streams give each document once per epoch, divided among hosts, and resume exactly."""

import contextlib
import json

import numpy as np
import pytest
from test_store import jsonl

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.pipeline import open_batches
from llm_jax.data.sources.documents import SourceConfig
from llm_jax.data.sources.filters import FilterConfig
from llm_jax.data.tokenizers.tokenizer import decode
from llm_jax.extras.streaming import Counters, Documents

NUM_VAL = 6
ROWS = 4
# Settings for reading the corpus; the tests run with each.
KINDS = {
    'plain': {},
    'filtered': {'filters': FilterConfig(min_chars=12)},
    'unmasked': {'mask_documents': False, 'shuffle_buffer': 1},
    'cached': {'cache_mb': 1},
    'mixture': {'sources': {'a': (3.0,), 'b': (1.0,)}},
}


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  """Two sources of 50 documents in three files each; every fifth document is a duplicate."""
  root = tmp_path_factory.mktemp('corpora')
  for name in 'ab':
    texts = [f'{name} {i if i % 5 else i % 3} ' + 'word ' * (i % 4 if i % 5 else 2) for i in range(50)]
    for part in range(3):
      jsonl(root / name / f'{part}.jsonl', [{'text': text} for text in texts[part * 20:part * 20 + 20]])
  return root


def config_of(corpora, kind='plain', **overrides):
  options = {**KINDS[kind], **overrides}
  if 'sources' in options:
    options['sources'] = {name: SourceConfig(path=str(corpora / name), weight=weight)
                          for name, weight in options['sources'].items()}
  return DataConfig(**{'path': str(corpora / 'a'), 'tokenizer': 'byte', 'seq_len': 32, 'streaming': True,
                       'split': 'count', 'val_documents': NUM_VAL, 'shuffle_buffer': 7,
                       'cache_dir': str(corpora / 'cache'), **options})


def texts_of(corpora, kind):
  """The training texts of source a, read without llm_jax."""
  lines = [json.loads(line)['text'] for path in sorted((corpora / 'a').iterdir())
           for line in path.read_text().splitlines()]
  if kind == 'filtered':
    lines = [line for line in lines if len(line) >= 12]
  held = list(dict.fromkeys(lines))[:NUM_VAL]
  return [line for line in lines if line not in held]  # no copies of documents to validate with


def documents_of(corpora, kind, shard=0, num_shards=1, cache_bytes=0, counters=None):
  data = open_data(config_of(corpora, kind))
  [corpus] = data.streams.values()
  return iter(Documents(corpus, data.tokenizer, shard, num_shards, cache_bytes, counters or Counters())), data.tokenizer


def read(iterator, tokenizer, count):
  texts = []
  for _ in range(count):
    ids = next(iterator)
    np.testing.assert_array_equal(ids['tokens'][1:], ids['targets'][:-1])
    assert (ids['tokens'][0], ids['targets'][-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    texts.append(decode(tokenizer, ids['tokens'][1:]))
  return texts


def opened(corpora, kind, host=0, num_hosts=1, begin=0, states=None, **overrides):
  config = config_of(corpora, kind, **overrides)
  rows = np.arange(ROWS).reshape(num_hosts, -1)[host]
  return contextlib.closing(open_batches(config, open_data(config), ROWS, rows, 3, begin, lambda step: ROWS * step,
                                         states, host, num_hosts))


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize('num_hosts', [1, 2, 3])
@pytest.mark.parametrize('kind', ['plain', 'filtered'])
def test_each_host_gets_its_share_of_every_epoch(corpora, kind, num_hosts):
  expected = texts_of(corpora, kind)
  for host in range(num_hosts):
    iterator, tokenizer = documents_of(corpora, kind, host, num_hosts)
    own = expected[host::num_hosts]
    assert read(iterator, tokenizer, 3 * len(own)) == own * 3
    assert iterator.get_state()['epoch'] == 2


@pytest.mark.parametrize('kind', ['plain', 'filtered'])
def test_documents_resume_from_any_state(corpora, kind):
  iterator, tokenizer = documents_of(corpora, kind)
  count = 2 * len(texts_of(corpora, kind)) + 5
  states = [iterator.get_state()]
  texts = []
  for _ in range(count):
    texts += read(iterator, tokenizer, 1)
    states.append(json.loads(json.dumps(iterator.get_state())))
  other, _ = documents_of(corpora, kind)
  for n in (*range(0, count, 7), len(texts_of(corpora, kind)), 2, count - 1):
    other.set_state(states[n])
    assert read(other, tokenizer, min(30, count - n)) == texts[n:n + 30]
    assert other.get_state()['epoch'] == states[min(n + 30, count)]['epoch']


@pytest.mark.parametrize(('kind', 'num_hosts'), [*((kind, 1) for kind in KINDS), ('plain', 2), ('mixture', 2)])
def test_batches_resume_from_any_state(corpora, kind, num_hosts):
  for host in range(num_hosts):
    with opened(corpora, kind, host, num_hosts) as batches:
      states, expected = [], []
      for _ in range(16):
        states.append(json.loads(json.dumps(batches.state())))
        expected.append(next(batches))
    assert all(len(x) == ROWS // num_hosts for batch in expected for x in batch.values())
    for begin in (1, 11):
      kept = [states[begin] if h == host else None for h in range(num_hosts)]
      with opened(corpora, kind, host, num_hosts, begin, kept) as batches:
        for n in range(begin, begin + 5):
          assert_equal(next(batches), expected[n])


def test_rows_hold_the_documents_of_an_epoch(corpora):
  """Without shuffling, the targets of the rows are those of the documents, in order."""
  tokenizer = open_data(config_of(corpora)).tokenizer
  expected = [id for text in texts_of(corpora, 'plain') for id in [*text.encode(), tokenizer.eos_id]]
  with opened(corpora, 'plain', shuffle_buffer=1) as batches:
    rows = [{name: x[row] for name, x in batch.items()} for batch in (next(batches) for _ in range(20))
            for row in range(ROWS)]
  found = np.concatenate([row['targets'][row['loss_mask'] > 0] for row in rows]).tolist()
  assert len(found) > 2 * len(expected)
  assert found == (expected * 9)[:len(found)]
  for row in rows:
    opens = (row['tokens'] == tokenizer.bos_id) & (row['segment_ids'] > 0)
    assert (row['positions'][opens] == 0).all()


def test_a_shuffled_epoch_holds_the_same_rows(corpora):
  streams = []
  for buffer in (1, 10):
    with opened(corpora, 'plain', shuffle_buffer=buffer) as batches:
      streams.append([x.tobytes() for batch in (next(batches) for _ in range(10)) for x in batch['tokens']])
  plain, shuffled = streams
  assert plain != shuffled
  for begin in range(0, 40, 10):  # one shuffle window at a time
    assert sorted(plain[begin:begin + 10]) == sorted(shuffled[begin:begin + 10])


def test_the_second_epoch_uses_the_cache(corpora):
  count = len(texts_of(corpora, 'plain'))
  for cache_bytes in (0, 1000, 1 << 20):
    counters = Counters()
    iterator, tokenizer = documents_of(corpora, 'plain', cache_bytes=cache_bytes, counters=counters)
    first = read(iterator, tokenizer, count)
    assert (counters.cache_hits, counters.cache_misses, counters.epoch) == (0, count, 0)
    assert read(iterator, tokenizer, count) == first == texts_of(corpora, 'plain')
    assert counters.cache_hits + counters.cache_misses == 2 * count
    assert counters.epoch == 1
    if cache_bytes == 1000:
      sizes = sorted(4 * (len(text.encode()) + 2) for text in first)
      assert 1000 // sizes[-1] - 1 <= counters.cache_hits <= 1000 // sizes[0]
    else:
      assert counters.cache_hits == (count if cache_bytes else 0)


def test_the_cache_changes_no_batch(corpora):
  with opened(corpora, 'plain') as bare, opened(corpora, 'plain', cache_mb=1) as cached:
    for _ in range(16):
      assert_equal(next(bare), next(cached))
    assert bare.metrics()['data/cache_hits'] == 0
    assert cached.metrics()['data/cache_hits'] > 0


def test_validation_is_set_aside(corpora):
  data = open_data(config_of(corpora))
  held = np.split(np.asarray(data.val['data'].tokens[:]), data.val['data'].starts[1:])
  lines = [json.loads(line)['text'] for line in (corpora / 'a/0.jsonl').read_text().splitlines()]
  num_placed = lines.index(list(dict.fromkeys(lines))[NUM_VAL - 1]) + 1  # with copies among them
  assert [decode(data.tokenizer, row[1:]) for row in held] == lines[:num_placed]
  with pytest.raises(ValueError, match='val_path'):
    config_of(corpora, split='document')


def test_a_different_number_of_processes_is_rejected(corpora):
  with opened(corpora, 'plain') as batches:
    next(batches)
    states = [batches.state()]
  for host, num_hosts, kept in ((0, 2, states), (1, 2, states), (0, 1, states * 2)):
    with pytest.raises(ConfigError, match=f'{len(kept)} process'):
      opened(corpora, 'plain', host, num_hosts, 1, kept).__enter__()


def test_more_hosts_than_documents_is_an_error(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': str(i)} for i in range(NUM_VAL + 1)])
  data = open_data(DataConfig(path=str(tmp_path / 'x.jsonl'), tokenizer='byte', streaming=True, split='count',
                              val_documents=NUM_VAL, cache_dir=str(tmp_path / 'cache')))
  [corpus] = data.streams.values()
  for shard in (0, 1):
    iterator = iter(Documents(corpus, data.tokenizer, shard, 2, 0, Counters()))
    if shard == 0:
      assert len(read(iterator, data.tokenizer, 3)) == 3
    else:
      with pytest.raises(DataError, match='too few'):
        next(iterator)
