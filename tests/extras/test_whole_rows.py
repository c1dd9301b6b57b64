"""Tasks on whole documents: labels, pairs of texts, masked tokens."""

import numpy as np
import pytest
from test_rows import BOS, documents_of, make_store
from test_tasks import VOCAB, make, rows_of

from llm_jax.extras.tasks import Classification, MaskedTokens, Pairs, Regression

# Labels.

@pytest.mark.parametrize(('task', 'labels', 'dtype', 'shape'), [
    (Classification(), np.array([3.0, 0, 1, 2]), np.int32, ()),
    (Regression(), np.array([0.5, -1, 2, 1e9]), np.float32, ()),
    (Regression(), np.arange(12.0).reshape(4, 3) / 7, np.float32, (3,)),
])
@pytest.mark.parametrize('mask_documents', [False, True])
def test_every_labelled_document_gives_one_row(task, labels, dtype, shape, mask_documents):
  store = make_store([5, 1, 30, 2], labels=labels)
  examples = make(store, task, seq_len=8, mask_documents=mask_documents)
  rows = rows_of(examples)
  assert len(rows) == 4
  for row, ids, label in zip(rows, documents_of(store, True), labels, strict=True):
    assert (row['labels'].dtype, row['labels'].shape) == (dtype, shape)
    np.testing.assert_allclose(row['labels'], label, rtol=1e-6)
    real = row['segment_ids'] == 1
    assert row['tokens'][real].tolist() == ids[:8]
    assert not row['tokens'][~real].any()
    assert np.flatnonzero(row['loss_mask']).tolist() == list(range(real.sum() - 1))
    assert row['targets'][row['loss_mask'] > 0].tolist() == row['tokens'][real][1:].tolist()
  assert examples.dropped_tokens == 30 - 7


def test_a_labelled_document_of_one_token_gives_a_row():
  store = make_store([1, 3, 1], labels=np.arange(3.0))
  rows = rows_of(make(store, Regression(), bos_id=None, eos_id=None))
  assert [(row['labels'].item(), row['tokens'][:3].tolist(), row['segment_ids'].sum()) for row in rows] == [
      (0, [BOS, 0, 0], 1), (1, [BOS, 3, 4], 3), (2, [BOS, 0, 0], 1)]


# Pairs of texts, and masked tokens.

@pytest.mark.parametrize('truncate', ['left', 'right'])
def test_both_texts_of_a_pair_are_separate_documents(truncate):
  store = make_store([6, 30], [3, 25])
  examples = make(store, Pairs(), seq_len=12, encoder_len=8, truncate=truncate)
  for row, ids, point in zip(rows_of(examples), documents_of(store, True), [3, 25], strict=True):
    first, second = [*ids[:point], BOS], [BOS, *ids[point:]]  # with eos, which is bos here
    keep = (lambda x, n: x[-n:]) if truncate == 'left' else (lambda x, n: x[:n])
    assert row['tokens'][row['segment_ids'] > 0].tolist() == keep(first, 12)
    assert row['encoder_tokens'][row['encoder_segment_ids'] > 0].tolist() == keep(second, 8)
  assert examples.dropped_tokens == 26 - 12


def test_masked_tokens_are_predicted_at_their_positions():
  """About 80% of them are replaced by the sentinel and 10% stay; all other tokens stay."""
  store = make_store([400] * 20)
  rows = rows_of(make(store, MaskedTokens(rate=0.2), seq_len=402))
  hidden = np.concatenate([row['loss_mask'] > 0 for row in rows])
  shown, truth = (np.concatenate([row[name] for row in rows]) for name in ('tokens', 'targets'))
  for row, ids in zip(rows, documents_of(store, True), strict=True):
    assert row['targets'][:len(ids)].tolist() == ids
    assert row['loss_mask'].sum() == round(0.2 * (len(ids) - 1)) and row['loss_mask'][0] == 0
    np.testing.assert_array_equal(row['prefix_mask'], row['segment_ids'] > 0)
  np.testing.assert_array_equal(shown[~hidden], truth[~hidden])
  assert np.mean(shown[hidden] == VOCAB) == pytest.approx(0.8, abs=0.05)
  assert np.mean(shown[hidden] == truth[hidden]) == pytest.approx(0.1, abs=0.05)
