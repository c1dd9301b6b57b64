"""Tasks turn a stretch of a token store into the features of a Batch: what to read, what to predict, what counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llm_jax.data.store import TokenStore

Features = dict[str, np.ndarray]


def next_token(store: TokenStore, begin: int, seq_len: int, mask_documents: bool) -> Features:
  """Row of `seq_len` tokens from `begin`, each predicting the one after it; the store's end is padded, unlearnt.

  With `mask_documents`, segment ids count the documents in the row from 1 (0: padding) and positions restart in each.
  """
  window = np.asarray(store.tokens[begin:begin + seq_len + 1], np.int32)
  num_targets = len(window) - 1
  window = np.pad(window, (0, seq_len + 1 - len(window)))
  features = {'tokens': window[:-1], 'targets': window[1:],
              'loss_mask': (np.arange(seq_len) < num_targets).astype(np.float32)}
  if mask_documents:
    starts = store.starts[slice(*np.searchsorted(store.starts, [begin, begin + num_targets]))] - begin
    is_start = np.zeros(seq_len, np.int32)
    is_start[starts] = 1
    is_start[0] = 1
    index = np.arange(seq_len, dtype=np.int32)
    features['segment_ids'] = np.where(index < num_targets, np.cumsum(is_start, dtype=np.int32), 0)
    features['positions'] = index - np.maximum.accumulate(np.where(is_start, index, 0))
  return features


TASKS: dict[str, Callable[[TokenStore, int, int, bool], Features]] = {
    'next_token': next_token,
}
