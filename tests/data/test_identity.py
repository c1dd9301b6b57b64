"""Fingerprints of data: each change of the batches changes the fingerprint, and other data are rejected."""

import dataclasses
import json
import os

import numpy as np
import pytest

from llm_jax.base.builder import Sections
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import check_fingerprint, data_fingerprint, open_data
from llm_jax.data.rows.examples import make_examples
from llm_jax.data.sources.corpus import Corpus, key_of
from llm_jax.data.sources.documents import SourceConfig
from llm_jax.data.sources.files import open_source
from llm_jax.data.sources.filters import FilterConfig
from llm_jax.data.sources.splits import SplitConfig
from llm_jax.extras.tasks import SpanCorruption


def opened(tmp_path, path, **overrides):
  config = DataConfig(**{'path': str(path), 'tokenizer': 'byte', 'split': 'tail', 'val_fraction': 0.3,
                         'cache_dir': str(tmp_path / 'cache'), **overrides})
  return config, open_data(config)


def fingerprint(tmp_path, path, **overrides):
  return json.loads(json.dumps(data_fingerprint(*opened(tmp_path, path, **overrides), 8, 0)))


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


ROWS = [{'text': f'text {i}', 'a': i % 2, 'b': i % 3} for i in range(30)]


def test_fingerprint_covers_labels_answers_and_borders(tmp_path):
  rows = write(tmp_path / 'rows.jsonl', ROWS)
  early = write(tmp_path / 'early.jsonl', [{'text': 'ab', 'answer': f'cde{i}'} for i in range(9)])
  late = write(tmp_path / 'late.jsonl', [{'text': 'abc', 'answer': f'de{i}'} for i in range(9)])
  ids = np.arange(400, dtype=np.uint16) % 7
  ids.tofile(tmp_path / 'x.bin')
  pairs = {'field': 'text', 'answer_field': 'answer'}
  for one, other in (
      (fingerprint(tmp_path, rows, field='text', label_field='a'), fingerprint(tmp_path, rows, field='text',
                                                                               label_field='b')),
      (fingerprint(tmp_path, early, **pairs), fingerprint(tmp_path, late, **pairs)),
      (fingerprint(tmp_path, tmp_path / 'x.bin', eot_id=3), fingerprint(tmp_path, tmp_path / 'x.bin', eot_id=4))):
    check_fingerprint(one, one, 5)
    with pytest.raises(ConfigError, match='training data'):
      check_fingerprint(one, other, 5)


def test_fingerprint_covers_source_order_and_past_weights(tmp_path):
  paths = {name: str(write(tmp_path / f'{name}.jsonl', [{'text': name * i} for i in range(1, 30)])) for name in 'ab'}

  def mixture(names, weight, weights_from=(0, 10)):
    sources = {name: {'path': paths[name], 'weight': weight} for name in names}
    config = DataConfig(sources={n: type(DataConfig().named_sources['data'])(**s) for n, s in sources.items()},
                        weights_from=weights_from, tokenizer='byte', split='tail', val_fraction=0.3,
                        cache_dir=str(tmp_path / 'cache'))
    return json.loads(json.dumps(data_fingerprint(config, open_data(config), 8, 0)))

  now = mixture('ab', (1.0, 1.0))
  with pytest.raises(ConfigError, match='training data'):
    check_fingerprint(now, mixture('ba', (1.0, 1.0)), 5)
  check_fingerprint(now, mixture('ab', (1.0, 1.0), (0, 20)), 5)  # both stages lie ahead
  with pytest.raises(ConfigError, match='weights of the sources before step 15'):
    check_fingerprint(now, mixture('ab', (1.0, 1.0), (0, 12)), 15)


def test_equal_files_in_another_folder_are_another_store(tmp_path):
  for name, text in (('v1', 'one text here'), ('v2', 'two text here')):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'x.txt').write_text(text)
    os.utime(tmp_path / name / 'x.txt', (1e9, 1e9))
  first, second = (opened(tmp_path, tmp_path / name)[1].train['data'] for name in ('v1', 'v2'))
  assert first.tokens[:].tolist() != second.tokens[:].tolist()


@pytest.mark.parametrize('path', ['stdlib', 'synthetic:50:2000'])
def test_sources_without_a_path_do_not_depend_on_the_folder(path, tmp_path, monkeypatch):
  def key():
    return key_of(Corpus('x', ((None, open_source(SourceConfig(path), tmp_path)),), SplitConfig(), FilterConfig(),
                         'fail', 0.0).fingerprint())

  keys = {key()}
  monkeypatch.chdir(tmp_path)
  assert keys == {key()}


def test_a_stream_of_copied_files_has_the_same_fingerprint(tmp_path):
  keys = set()
  for name, when in (('a', 1e9), ('b', 2e9)):
    path = write(tmp_path / name / 'x.jsonl', ROWS)
    os.utime(path, (when, when))
    keys.add(key_of(fingerprint(tmp_path, path, field='text', streaming=True, split='count', val_documents=5)))
  assert len(keys) == 1


def test_labels_are_numbers_or_sorted_names(tmp_path):
  (tmp_path / 'stars.csv').write_text('text,stars\n' + ''.join(f'review {i},{5.5 - i % 3}\n' for i in range(30)))
  _, data = opened(tmp_path, tmp_path / 'stars.csv', field='text', label_field='stars')
  assert sorted(set(data.train['data'].labels.tolist())) == [3.5, 4.5, 5.5]
  names = ['zebra', 'ant', 'cow']
  for order in (names, names[::-1]):
    path = write(tmp_path / f'{order[0]}.jsonl', [{'text': f'{i}', 'kind': order[i % 3]} for i in range(30)])
    _, data = opened(tmp_path, path, field='text', label_field='kind')
    store = data.train['data']
    assert store.classes == ('ant', 'cow', 'zebra')
    assert [store.classes[int(label)] for label in store.labels] == [order[i % 3] for i in range(len(store.labels))]


@pytest.mark.parametrize('kind', ['folder', 'mixture'])
def test_ids_cannot_be_mixed_with_a_fitted_tokenizer(kind, tmp_path):
  (tmp_path / 'both').mkdir()
  (tmp_path / 'both/a.txt').write_text('some text ' * 50)
  if kind == 'folder':
    np.save(tmp_path / 'both/b.npy', np.arange(50))
    with pytest.raises(DataError, match=r'b\.npy.*token ids, but the tokenizer was fitted to the texts'):
      opened(tmp_path, tmp_path / 'both', tokenizer='bpe', vocab_size=300)
  else:
    np.arange(50, dtype=np.uint16).tofile(tmp_path / 'b.bin')
    source = type(DataConfig().named_sources['data'])
    with pytest.raises(ConfigError, match=r'is for texts, but .*b\.bin holds token ids'):
      opened(tmp_path, 'stdlib', tokenizer='bpe', vocab_size=300, sources={
          'a': source(str(tmp_path / 'both')), 'b': source(str(tmp_path / 'b.bin'))})


def test_a_stream_of_ids_needs_a_tokenizer(tmp_path):
  path = write(tmp_path / 'ids.jsonl', [{'ids': list(range(i, i + 5))} for i in range(50)])
  with pytest.raises(ConfigError, match='vocabulary of a stream of token ids is unknown'):
    opened(tmp_path, path, tokenizer='none', streaming=True, split='count', val_documents=5)


def test_the_number_of_sentinels_is_configured(tmp_path):
  (tmp_path / 'x.txt').write_text('many words to corrupt ' * 500)
  config, data = opened(tmp_path, tmp_path / 'x.txt', task='span_corruption', packing='pad', seq_len=1024,
                        encoder_len=2048)
  config = dataclasses.replace(config, sections=Sections({'span_corruption': SpanCorruption(num_sentinels=200)}))
  task = config.task_settings
  assert task.num_sentinels == 200
  examples = make_examples(data.train['data'], task=task, seq_len=1024, encoder_len=2048, packing='pad',
                           vocab_size=data.vocab_size, bos_id=data.bos_id, eos_id=data.eos_id)
  highest = max(examples.make(i, np.random.default_rng(i))['encoder_tokens'].max() for i in range(len(examples)))
  assert data.vocab_size + 100 < highest < data.vocab_size + task.num_sentinels
