"""Settings and labels that do not fit a task end in one message that names the field and the value."""

import numpy as np
import pytest
from test_rows import make_store
from test_tasks import make

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.rows.augment import Augment
from llm_jax.data.rows.tasks import NextToken, PromptAnswer
from llm_jax.extras.tasks import Classification, FillInTheMiddle, MaskedTokens, PrefixLM, Regression, SpanCorruption

REJECTED = {
    'packing of pairs': (PromptAnswer(), {'packing': 'concat'}, ['data.packing', 'concat', 'best_fit, pad']),
    'packing unknown': (NextToken(), {'packing': 'bins'}, ['data.packing', 'bins', 'concat, best_fit, pad']),
    'no answers': (PromptAnswer(), {}, ['data.task', 'prompt_answer', 'data.answer_field', 'next_token']),
    'no labels': (Regression(), {}, ['data.task', 'regression', 'data.label_field']),
    'windows cut': (NextToken(), {'truncate': 'left'}, ['data.truncate', 'left', 'auto, split']),
    'truncate unknown': (FillInTheMiddle(), {'truncate': 'up'}, ['data.truncate', 'up', 'auto, split, left']),
    'stride without windows': (NextToken(), {'stride': 4, 'packing': 'pad'}, ['data.stride', '4', 'None']),
    'stride too long': (NextToken(), {'stride': 17}, ['data.stride', '17', '[1, seq_len 16]']),
    'no room for fim': (FillInTheMiddle(), {'seq_len': 3}, ['data.seq_len', '3', 'fim', '4']),
    'no encoder': (SpanCorruption(), {'encoder_len': 0}, ['data.encoder_len', '0', 'span_corruption', '3']),
    'no room for spans': (SpanCorruption(), {'seq_len': 2}, ['data.seq_len', '2', 'the minimum is 3']),
    'too few sentinels': (SpanCorruption(num_sentinels=3), {'seq_len': 999, 'encoder_len': 900},
                      ['span_corruption.num_sentinels', '3', '50']),
    'no bos or eos to start with': (SpanCorruption(), {'bos_id': None, 'eos_id': None},
                              ['data.task', 'span_corruption', 'data.eot_id']),
    'prefix of the next document': (PrefixLM(), {'mask_documents': False}, ['data.mask_documents', 'pad']),
    'jitter without windows': (NextToken(), {'packing': 'pad', 'augment': Augment(jitter=True)},
                            ['augment.jitter', 'concat', 'pad']),
    'jitter in evaluation': (NextToken(), {'score_once': True, 'augment': Augment(jitter=True)},
                           ['augment.jitter', 'once']),
    'no bos or eos to drop to': (NextToken(), {'bos_id': None, 'eos_id': None, 'augment': Augment(token_dropout=0.5)},
                           ['augment.token_dropout', '0.5', 'data.eot_id']),
}


@pytest.mark.parametrize('case', REJECTED)
def test_incompatible_settings_are_rejected(case):
  task, options, words = REJECTED[case]
  store = make_store([5, 2, 60, 9], **({'answers': [1, 1, 9, 2]} if 'pairs' in case else {}))
  with pytest.raises(ConfigError) as e:
    make(store, task, **options)
  assert all(word in str(e.value) for word in words), e.value
  assert '\n' not in str(e.value)


def test_pairs_and_labels_are_never_split():
  for task, column in ((PromptAnswer(), {'answers': [1, 1]}), (Regression(), {'labels': np.zeros(2)})):
    with pytest.raises(ConfigError, match=r'data\.truncate: .split. does .*auto, (left, right|right, left)'):
      make(make_store([3, 3], **column), task, truncate='split')


@pytest.mark.parametrize(('labels', 'task', 'words'), [
    ([0, 1.5], Classification(), ['document 1', '1.5', 'whole numbers of 0 or more']),
    ([-1, 1], Classification(), ['document 0', '-1']),
    ([0, np.nan], Regression(), ['document 1', 'nan', 'finite']),
    ([[0, 1], [np.inf, 1]], Regression(), ['document 1', 'inf']),
    ([[0, 1], [1, 1]], Classification(), ['2 numbers', 'regression']),
])
def test_invalid_labels_are_a_data_error(labels, task, words):
  with pytest.raises(DataError) as e:
    make(make_store([3, 3], labels=np.array(labels, float)), task)
  assert all(word in str(e.value) for word in ['data.label_field', *words]), e.value


@pytest.mark.parametrize(('store', 'task', 'options'), [
    (make_store([1]), NextToken(), {}),
    (make_store([1, 1]), NextToken(), {'packing': 'best_fit', 'eos_id': 9999}),
    (make_store([90, 90], [50, 50]), PromptAnswer(), {'truncate': 'right'}),
], ids=['one token', 'only bos', 'all prompts too long'])
def test_a_store_without_rows_is_a_data_error(store, task, options):
  with pytest.raises(DataError, match=rf'data\.path: {len(store.tokens)} token.* {len(store.starts)} document'):
    make(store, task, **options)


@pytest.mark.parametrize('build', [
    lambda: FillInTheMiddle(rate=1.5), lambda: FillInTheMiddle(spm_rate=-0.1),
    lambda: SpanCorruption(noise_density=1.0), lambda: SpanCorruption(mean_span_length=0.5),
    lambda: SpanCorruption(num_sentinels=0), lambda: MaskedTokens(rate=0.0),
    lambda: Augment(token_dropout=0.6, token_replace=0.6),
    lambda: Augment(token_replace=-0.1)])
def test_settings_out_of_range_are_rejected(build):
  with pytest.raises(ValueError, match='got'):
    build()
