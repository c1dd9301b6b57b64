"""Batches made from text, for every kind of example: equal on all hosts and after restarts; no token is lost."""

import contextlib
import dataclasses
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import psutil
import pytest
from test_pipeline import assert_equal, batch_at, real, rows_of, split

from llm_jax.base.errors import LostError
from llm_jax.data import pipeline
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data, open_examples
from llm_jax.data.pipeline import mixed, prefetched, train_batches, train_sources
from llm_jax.data.rows.augment import Augment
from llm_jax.data.rows.examples import Examples
from llm_jax.data.sources.documents import SourceConfig

KINDS = {
    'next_token': {},
    'overlapping': {'stride': 7, 'augment': Augment(jitter=True, token_dropout=0.1, token_replace=0.1)},
    'best_fit': {'packing': 'best_fit'},
    'fim': {'task': 'fim', 'packing': 'best_fit'},
    'span_corruption': {'task': 'span_corruption', 'packing': 'pad', 'encoder_len': 32},
    'prefix_lm': {'task': 'prefix_lm', 'packing': 'pad'},
    'mixture': {'sources': {'a': (1.0, 3.0), 'b': (2.0, 0.0), 'c': (0.0, 1.0)}, 'weights_from': (0, 5)},
}
ROWS = 8


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
  """Three folders of documents of uneven lengths; no character occurs in two folders."""
  root = tmp_path_factory.mktemp('corpora')
  rng = np.random.default_rng(0)
  for i, name in enumerate('abc'):
    (root / name).mkdir()
    for number in range(30):
      text = ''.join(chr(0x4e00 + 2000 * i + int(c)) for c in rng.integers(0, 1000, rng.integers(1, 150)))
      (root / name / f'{number:02}.txt').write_text(text, encoding='utf-8')
  return root


def config_of(corpora, kind):
  options = dict(KINDS[kind])
  if 'sources' in options:
    options['sources'] = {name: SourceConfig(path=str(corpora / name), weight=weight)
                          for name, weight in options['sources'].items()}
  return DataConfig(**{'path': str(corpora / 'a'), 'tokenizer': 'char', 'seq_len': 24, 'split': 'tail',
                       'val_fraction': 0.1, 'shard_tokens': 500, 'cache_dir': str(corpora / 'cache'), **options})


def open_batches(corpora, kind, rows=range(ROWS), seed=3):
  config = config_of(corpora, kind)
  examples = mixed(config, train_sources(config, open_data(config)), lambda step: ROWS * step, seed)
  return train_batches(examples, lambda n: ROWS * n, np.asarray(rows))


def digest(batch):
  return hashlib.sha256(b''.join(name.encode() + str(x.dtype).encode() + x.tobytes()
                                 for name, x in sorted(batch.items()))).hexdigest()[:16]


@pytest.mark.parametrize('kind', KINDS)
def test_batch_n_is_the_same_on_all_hosts_and_after_a_restart(corpora, kind):
  numbers = [0, 1, 4, 5, 6, 57, 100_000]  # the mixture changes at 5
  whole = open_batches(corpora, kind)
  expected = {n: batch_at(whole, n) for n in reversed(numbers)}
  assert len({digest(batch) for batch in expected.values()}) == len(numbers)
  assert digest(batch_at(open_batches(corpora, kind, seed=4), 5)) != digest(expected[5])
  for num_hosts in (1, 2, 4):
    for host, rows in enumerate(np.arange(ROWS).reshape(num_hosts, -1)):
      batches = open_batches(corpora, kind, rows)
      for begin, count in ((0, 7), (57, 1), (100_000, 1)):
        with contextlib.closing(prefetched(batches, begin)) as iterator:
          for n in range(begin, begin + count):
            batch = next(iterator)
            if n in expected:
              assert_equal(batch, {name: x[rows] for name, x in expected[n].items()}), (num_hosts, host, n)


OTHER_PROCESS = """
import sys
from pathlib import Path
import test_batches
for kind in test_batches.KINDS:
  batches = test_batches.open_batches(Path(sys.argv[1]), kind)
  print(kind, *(test_batches.digest(test_batches.batch_at(batches, n)) for n in (3, 5, 1000)))
"""


def test_batch_n_is_the_same_in_another_process(corpora):
  expected = [' '.join([kind, *(digest(batch_at(open_batches(corpora, kind), n)) for n in (3, 5, 1000))])
              for kind in KINDS]
  folder = str(__file__).rsplit('/', 1)[0]
  done = subprocess.run([sys.executable, '-c', OTHER_PROCESS, corpora], text=True, capture_output=True, cwd=folder)
  assert done.returncode == 0, done.stderr
  assert [line for line in done.stdout.splitlines() if not line.startswith('data:')] == expected


def test_worker_processes_make_the_same_batches(corpora):
  whole = open_batches(corpora, 'fim', rows=[1, 5])
  with contextlib.closing(prefetched(open_batches(corpora, 'fim', rows=[1, 5]), 4, num_workers=2)) as iterator:
    for n in range(4, 11):
      assert_equal(next(iterator), batch_at(whole, n))


@pytest.mark.slow
def test_the_end_of_a_worker_process_is_an_error_that_a_restart_mends(corpora):
  with contextlib.closing(prefetched(open_batches(corpora, 'fim', rows=[1, 5]), 0, num_workers=1)) as iterator:
    next(iterator)
    [worker] = [p for p in psutil.Process().children() if 'spawn_main' in ' '.join(p.cmdline())]
    worker.kill()
    with pytest.raises(LostError, match='num_workers has died with exit code -9'):
      for _ in range(1000):
        next(iterator)


@pytest.mark.parametrize('kind', ['next_token', 'best_fit', 'mixture'])
def test_cached_rows_equal_rows_made_again(corpora, kind, monkeypatch):
  calls, make = [], Examples.make
  monkeypatch.setattr(Examples, 'make', lambda *args: calls.append(args) or make(*args))
  expected = [batch_at(open_batches(corpora, kind), n) for n in range(60)]  # several epochs, no cache
  calls.clear()
  kept = open_batches(corpora, kind)
  for n in range(60):
    assert_equal(batch_at(kept, n), expected[n])
  num_rows = {id(examples): len(examples) for examples, *_ in calls}
  assert sum(num_rows.values()) >= len(calls) - len(num_rows), 'a row was made twice'  # but row 0, for its shape

  monkeypatch.setattr(pipeline, 'KEPT_BYTES', 0)
  calls.clear()
  made = open_batches(corpora, kind)
  for n in range(60):
    assert_equal(batch_at(made, n), expected[n])
  assert len(calls) >= 60 * ROWS


# Tokens in the store = tokens in rows + dropped_tokens.

@pytest.mark.parametrize(('packing', 'truncate'), [('concat', 'auto'), *itertools.product(('best_fit', 'pad'),
                                                                                       ('split', 'left', 'right'))])
@pytest.mark.parametrize('tokenizer', ['char', 'word'])  # one special token; bos and eos
def test_stored_tokens_are_in_rows_or_counted_as_dropped(corpora, packing, truncate, tokenizer):
  config = dataclasses.replace(config_of(corpora, 'next_token'), packing=packing, truncate=truncate,
                               tokenizer=tokenizer, pattern=r'\S')
  data = open_data(config)
  tokens = np.asarray(data.train['data'].tokens[:])
  for train in (True, False):
    examples = open_examples(config, data, data.train['data'], train=train)
    targets = np.array(real(rows_of(examples), 'targets'))
    if packing == 'concat':  # the first token is no target
      if train:
        np.testing.assert_array_equal(targets, tokens[1:])
      else:  # what begins documents does not count, and the end of the last one does
        one_special = data.bos_id == data.eos_id
        expected = np.append(tokens[1:], data.eos_id) if one_special else tokens[tokens != data.bos_id]
        np.testing.assert_array_equal(targets, expected)
      assert examples.dropped_tokens == 0
    else:  # a document's first token is no target; the eos after its last one is, stored or not
      num_documents = len(data.train['data'].starts)
      ends = num_documents if data.bos_id == data.eos_id else 0
      assert len(targets) + examples.dropped_tokens == len(tokens) - num_documents + ends
      assert (examples.dropped_tokens > 0) == (truncate != 'split')
      if truncate == 'split':
        inner = np.delete(tokens, data.train['data'].starts)
        np.testing.assert_array_equal(np.sort(targets), np.sort(np.append(inner, [data.eos_id] * ends)))


@pytest.mark.parametrize('packing', ['concat', 'best_fit', 'pad'])
def test_an_epoch_of_batches_holds_every_target_once(corpora, packing):
  config = dataclasses.replace(config_of(corpora, 'next_token'), packing=packing)
  data = open_data(config)
  examples = open_examples(config, data, data.train['data'], train=True)
  mixture = mixed(config, train_sources(config, data), lambda step: step, seed=5)
  batches = train_batches(mixture, lambda n: n, np.arange(1))
  rows = [row for n in range(2 * len(examples)) for row in split(batch_at(batches, n))]
  for epoch in (rows[:len(examples)], rows[len(examples):]):
    assert sorted(real(epoch, 'targets')) == sorted(real(rows_of(examples), 'targets'))


def test_each_source_of_a_mixture_goes_through_its_own_epochs(corpora):
  config = config_of(corpora, 'mixture')
  data = open_data(config)
  batches = open_batches(corpora, 'mixture')
  rows = [row for n in range(150) for row in split(batch_at(batches, n))]
  owners = {}
  for name, store in data.train.items():
    owners |= dict.fromkeys(store.tokens[:].tolist(), name)
  special = data.bos_id
  by_source = {name: [] for name in data.train}
  for place, row in enumerate(rows):
    held = set(np.append(row['tokens'], row['targets'])[np.tile(row['loss_mask'] > 0, 2)].tolist()) - {special}
    [name] = {owners[token] for token in held}  # no row mixes sources
    by_source[name].append(row)
    assert name != 'c' or place >= 5 * ROWS, 'drawn in the stage where its weight is 0'
    assert name != 'b' or place < 5 * ROWS, 'drawn in the stage where its weight is 0'
  assert len(by_source['b']) == pytest.approx(5 * ROWS * 2 / 3, abs=1)
  assert len(by_source['c']) == pytest.approx(145 * ROWS / 4, abs=1)
  for name in 'ac':
    examples = open_examples(config, data, data.train[name], train=True)
    num_epochs = len(by_source[name]) // len(examples)
    assert num_epochs >= 2
    for epoch in range(num_epochs):
      found = by_source[name][epoch * len(examples):(epoch + 1) * len(examples)]
      assert sorted(real(found, 'targets')) == sorted(data.train[name].tokens[1:].tolist())
