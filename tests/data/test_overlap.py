"""Validation documents that are in train too are counted, and normalized duplicates can be removed; warnings."""

import json
import random
import re

import numpy as np
import pytest
from test_store import config_of, jsonl, sides_of

from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources.documents import Document, SourceConfig
from llm_jax.data.sources.filters import FilterConfig
from llm_jax.data.sources.overlap import keys, normalized

WORDS = ['one', 'Two', 'THREE', 'vier', 'fünf', 'six\u00a0', 'seven']


@pytest.fixture
def corpus(tmp_path):
  """90 texts, of which each third is a copy of the one before and each other third one that nearly is."""
  rng = random.Random(0)
  texts = []
  for _ in range(30):
    text = ' '.join(rng.choices(WORDS, k=12))
    texts += [text, text, text.upper().replace(' ', '  ') + '\n']
  return jsonl(tmp_path / 'corpus/a.jsonl', [{'text': text} for text in texts]), texts


def counted(train, val):
  """(documents of val, exact, normalized) by the slow way."""
  def short(text):
    return ''.join(text.casefold().split())
  return len(val), sum(t in set(train) for t in val), sum(short(t) in set(map(short, train)) for t in val)


@pytest.mark.parametrize('split', ['document', 'count'])
def test_documents_of_val_that_are_in_train_are_counted(tmp_path, corpus, split, capfd):
  _, texts = corpus
  config = config_of(tmp_path, split=split, val_fraction=0.3, val_documents=21)
  train, val = sides_of(config, ('train', 'val'))
  num, exact, near = counted(train, val)
  assert exact == 0 < near
  line = f'val: of {num} documents, also in train: 0 exactly, {near} normalized (case, white space)'
  assert line in capfd.readouterr().out
  assert open_data(config).reports['data']['overlap']['val'] == {'documents': num, 'exact': 0, 'normalized': near}
  assert sorted(train + val) == sorted(texts)


def test_copies_in_val_path_are_counted(tmp_path, corpus):
  _, texts = corpus
  jsonl(tmp_path / 'val.jsonl', [{'text': text} for text in [*texts[:7], 'another text']])
  config = config_of(tmp_path, val_path=str(tmp_path / 'val.jsonl'))
  assert open_data(config).reports['data']['overlap'] == {'val': {'documents': 8, 'exact': 7, 'normalized': 7}}


@pytest.mark.parametrize('split', ['document', 'tail', 'count'])
def test_normalized_duplicates_can_be_removed(tmp_path, corpus, split):
  _, texts = corpus
  data = open_data(config_of(tmp_path, split=split, val_fraction=0.3, val_documents=9,
                             filters=FilterConfig(deduplicate_normalized=True)))
  report = data.reports['data']
  assert report['kept'] == len({''.join(text.casefold().split()) for text in texts}) == 30
  assert report['dropped'] == {'duplicate': 30, 'normalized duplicate': 30}
  assert report['overlap']['val']['exact'] == report['overlap']['val']['normalized'] == 0
  assert report['overlap']['val']['documents'] >= 5


def test_the_copy_in_train_is_dropped_before_that_in_val_path(tmp_path, corpus):
  _, texts = corpus
  jsonl(tmp_path / 'val.jsonl', [{'text': text} for text in texts[:3]])
  train, val = sides_of(config_of(tmp_path, val_path=str(tmp_path / 'val.jsonl'), filters=FilterConfig(
      deduplicate_normalized=True)), ('train', 'val'))
  assert val == texts[:1] and texts[0] not in train


def test_keys_tell_exact_and_normalized_copies_apart():
  same = [Document('', 'Ab c'), Document('x', 'Ab c'), Document('', 'ab  C\n')]
  found = keys([*same, Document('', 'abd'), Document('', 'Ab', 'c'), Document('', np.array([1, 2]))])
  near, exact = found.T
  assert len(set(near[:3])) == 1 and len(set(near)) == 4
  assert exact[0] == exact[1] and len(set(exact)) == 5
  assert normalized('Straße\u3000X') == normalized('STRASSE x') == b'strassex'


# Warnings.

@pytest.mark.parametrize('content, separator, meant', [
    (b'one\r\n\r\ntwo\r\n\r\nthree', '\n\n', r"'\r\n\r\n'"), (b'one\n\ntwo\n\nthree', '\\n\\n', r"'\n\n'"),
    (b'one\r\n\r\ntwo\r\n\r\nthree', '\\n\\n', r"'\r\n\r\n'"), (b'one\n---\ntwo', '---\r\n', r"'---\n'"),
    (b'one<end>two', '<END>', None), (b'one<end>two<end>', '<end>', False), (b'one two<end>', '<end>', False)])
def test_a_separator_that_never_occurs_is_told(tmp_path, capfd, content, separator, meant):
  (tmp_path / 'a.txt').write_bytes(content)
  open_data(DataConfig(path=str(tmp_path / 'a.txt'), separator=separator, tokenizer='byte',
                       val_fraction=0.3, cache_dir=str(tmp_path / 'cache')))
  out = capfd.readouterr().out
  assert ('occurs in no text file' in out) == (meant is not False)
  assert not meant or f'--config.data.separator=${meant}' in out


def test_a_validation_part_of_white_space_is_a_warning(tmp_path, capfd):
  (tmp_path / 'a.txt').write_text('one line\n')
  data = open_data(DataConfig(path=str(tmp_path / 'a.txt'), tokenizer='byte', cache_dir=str(tmp_path / 'cache'),
                              val_fraction=0.1))
  assert len(data.val['data'].tokens) == 2
  assert 'warning: the val part holds nothing but white space' in capfd.readouterr().out


@pytest.mark.parametrize('share, told', [(0.995, True), (0.9, False)])
@pytest.mark.parametrize('kind', ['jsonl', 'bin', 'text'])
def test_tokens_of_one_kind_are_a_warning(tmp_path, capfd, share, told, kind):
  ids = np.where(np.arange(20_000) % 1000 < share * 1000, 0, 5).astype(np.uint16)
  path = tmp_path / f'a.{kind}'
  if kind == 'bin':
    ids.tofile(path)
  else:
    path.write_text(json.dumps({'ids': ids.tolist()}) if kind == 'jsonl' else ''.join('ab'[int(i > 0)] for i in ids))
  open_data(DataConfig(path=str(path), tokenizer='byte' if kind == 'text' else 'none', split='tail',
                       cache_dir=str(tmp_path / 'cache')))
  assert ('of the tokens for train are' in capfd.readouterr().out) == told


def test_a_mixture_counts_what_one_source_holds_out_and_another_trains_on(tmp_path, capsys):
  lines = [json.dumps({'text': f'document {i}'}) + '\n' for i in range(100)]
  for name, part in (('a', lines), ('b', lines[::-1])):
    (tmp_path / f'{name}.jsonl').write_text(''.join(part))
  sources = {name: SourceConfig(path=str(tmp_path / f'{name}.jsonl')) for name in 'ab'}
  open_data(DataConfig(sources=sources, split='tail', tokenizer='byte', cache_dir=str(tmp_path / 'cache')))
  out = capsys.readouterr().out
  assert out.count('also in train: 0 exactly') == 2, 'each source alone'
  found = re.search(r'all sources together: val: of (\d+) documents, also in train: (\d+) exactly', out)
  assert int(found[2]) >= int(found[1]) - 2 > 5  # those that a border cuts are equal to none
