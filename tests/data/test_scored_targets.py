"""An evaluation scores each token of a text and one end for each document, whatever the packing and the tokenizer."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program import write_config

import llm_jax
from llm_jax.data.open import open_data, open_examples
from llm_jax.data.rows.examples import make_examples
from llm_jax.data.rows.tasks import NextToken
from llm_jax.data.stores.store import mapped_store
from llm_jax.data.stores.token_files import open_bin

BOS = 0
property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)
lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def make_store(lengths, eos):
  """Documents of so many different tokens, as the writer stores them."""
  first, documents = 2, []
  for length in lengths:
    documents.append([BOS, *range(first, first + length), *([] if eos == BOS else [eos])])
    first += length
  starts = np.cumsum([0, *map(len, documents[:-1])])
  return types.SimpleNamespace(tokens=np.concatenate(documents).astype(np.uint16), starts=starts, labels=None,
                               answers=None), range(2, first)


def scored(examples):
  """The targets that count, over all rows."""
  rows = [examples.make(i, np.random.default_rng(0)) for i in range(len(examples))]
  return np.concatenate([row['targets'][row['loss_mask'] > 0] for row in rows]).tolist()


@property_test
@given(lengths_lists, st.integers(1, 20), st.sampled_from([BOS, 1]), st.sampled_from(['concat', 'best_fit', 'pad']),
       st.data())
def test_each_token_and_one_end_per_document_count(lengths, seq_len, eos, packing, data):
  store, texts = make_store(lengths, eos)
  stride = data.draw(st.integers(1, seq_len)) if packing == 'concat' else None
  examples = make_examples(store, task=NextToken(), seq_len=seq_len, packing=packing, stride=stride, score_once=True,
                           vocab_size=1000, bos_id=BOS, eos_id=eos)
  assert sorted(scored(examples)) == sorted([*texts, *[eos] * len(lengths)])
  if packing == 'concat':
    assert scored(examples)[-1] == eos, 'the end of the last document'


@property_test
@given(lengths_lists, st.integers(1, 20))
def test_training_rows_are_as_before(lengths, seq_len):
  store, _ = make_store(lengths, BOS)
  examples = make_examples(store, task=NextToken(), seq_len=seq_len, vocab_size=1000, bos_id=BOS, eos_id=BOS)
  assert scored(examples) == store.tokens[1:].tolist() and len(examples) == -(-(len(store.tokens) - 1) // seq_len)


# Token files: 0 stands before documents, or after them, or nowhere.

@pytest.mark.parametrize(('ids', 'ends'), [
    ([0, 5, 6, 0, 7, 8], True), ([5, 6, 0, 7, 8, 0], False), ([0, 5, 6, 0], False), ([5, 6, 7], False)])
def test_a_token_file_gets_an_end_where_its_last_document_has_none(tmp_path, ids, ends):
  path = tmp_path / 'x.bin'
  np.array(ids, np.uint16).tofile(path)
  store = mapped_store(open_bin(path, 'uint16'), 0)
  examples = make_examples(store, task=NextToken(), seq_len=4, score_once=True, vocab_size=9, bos_id=0, eos_id=0)
  assert scored(examples) == ids[1:] + [0] * ends


def test_a_document_that_goes_on_in_the_next_split_has_no_end(tmp_path):
  ids = [0, *[1] * 9, 0, *[2] * 9]
  np.array(ids, np.uint16).tofile(tmp_path / 'x.bin')
  file = open_bin(tmp_path / 'x.bin', 'uint16')
  for begin, end, ends in ((0, 5, False), (0, 10, True), (0, 15, False), (10, 20, True)):
    store = mapped_store(file, 0, begin, end)
    examples = make_examples(store, task=NextToken(), seq_len=4, score_once=True, vocab_size=9, bos_id=0, eos_id=0)
    assert scored(examples) == ids[begin + 1:end] + [0] * ends, (begin, end)


@pytest.mark.parametrize('packing', ['concat', 'best_fit'])
def test_validation_and_evaluate_count_bytes_and_documents(tmp_path, packing, monkeypatch):
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'cache'))
  texts = [f'document {i} ' + 'ab' * i for i in range(40)]
  (tmp_path / 'texts').mkdir()
  for i, text in enumerate(texts):
    (tmp_path / 'texts' / f'{i:02}.txt').write_text(text)
  (tmp_path / 'other').mkdir()
  for i in range(3):
    (tmp_path / 'other' / f'{i}.txt').write_text(texts[i])
  config = llm_jax.load_config(write_config(tmp_path), **{
      'num_steps': 1, 'data.path': str(tmp_path / 'texts'), 'data.tokenizer': 'byte', 'data.packing': packing,
      'data.split': 'document', 'data.val_fraction': 0.3, 'model.vocab_size': None, 'eval.sample_tokens': 0})
  data = open_data(config.data)
  [val] = data.val.values()
  expected = val.num_bytes + len(val.starts)
  assert len(scored(open_examples(config.data, data, val, train=False))) == expected
  [event] = llm_jax.train(config, tmp_path / 'run')
  assert event['val/tokens'] == expected
  found = llm_jax.load(tmp_path / 'run').evaluate(data=str(tmp_path / 'other')).results
  assert found['tokens'] == sum(len(text) for text in texts[:3]) + 3
