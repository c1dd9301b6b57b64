"""Training on conversations: from files of messages to rows, in which the right tokens are learnt."""

import json
import random

import numpy as np
import pytest
from conversations import conversation

from llm_jax.base.builder import build, to_dict
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.config import DataConfig
from llm_jax.data.given import write_documents
from llm_jax.data.open import data_fingerprint, open_data, open_examples
from llm_jax.data.sources.documents import Document
from llm_jax.data.tokenizers.tokenizer import decode

ASK = {'role': 'user', 'content': 'Say'}


def write(path, records):
  path.write_text(''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records))
  return str(path)


def as_record(turns):
  return {'messages': [{'role': role, 'content': content} for role, content in turns]}


def make(tmp_path, records, **settings):
  config = build(DataConfig, {
      'path': write(tmp_path / 'chat.jsonl', records), 'cache_dir': str(tmp_path / 'cache'), 'tokenizer': 'byte',
      'task': 'chat', 'packing': 'best_fit', 'seq_len': 64, 'split': 'count', 'val_documents': 1, **settings})
  data = open_data(config)
  return config, data, open_examples(config, data, data.train['data'], train=True)


def learnt(data, examples, index):
  """The learnt text of a row, with | for the end of a turn, and the number of its pieces."""
  features = examples.make(index, np.random.default_rng(0))
  targets = features['targets'][features['loss_mask'] > 0]
  text = '|'.join(decode(data.tokenizer, part) for part in np.split(targets, np.flatnonzero(
      targets == data.tokenizer.eos_id)))
  return text, int(features['segment_ids'].max())


def dialog(*answers):
  return as_record([turn for answer in answers for turn in (('user', 'Say'), ('assistant', answer))])


@pytest.mark.parametrize('learn, expected', [('assistant', 'one|two|'), ('last', 'two|'), ('all', None)])
def test_answers_and_the_ends_of_turns_are_learnt(tmp_path, learn, expected):
  _, data, examples = make(tmp_path, [dialog('val'), dialog('one', 'two')], seq_len=128, chat={'learn': learn})
  text, _ = learnt(data, examples, 0)
  assert text == (expected or 'user\nSay|\n' 'assistant\none|\n' 'user\nSay|\n' 'assistant\ntwo|\n')


def test_every_learnt_token_of_a_corpus_is_in_one_row(tmp_path):
  rng = random.Random(3)
  chats = [conversation(rng) for _ in range(60)]
  _, data, examples = make(tmp_path, map(as_record, chats), seq_len=2048, shard_tokens=1000)
  store = data.train['data']
  assert len(store.learnt) == len(store.tokens) and len(store.learnt.files) == len(store.tokens.files) > 3
  rows = [examples.make(i, np.random.default_rng(0)) for i in range(len(examples))]
  assert sum(row['loss_mask'].sum() for row in rows) == store.learnt[:].sum() > 0
  assert max(row['segment_ids'].max() for row in rows) > 3  # several in a row
  for index, turns in enumerate(chats[1:]):
    begin, end = store.starts[index], [*store.starts[1:], len(store.tokens)][index]
    ids, mask = store.tokens[begin:end], store.learnt[begin:end] > 0
    assert decode(data.tokenizer, ids[mask]) == ''.join(content for role, content in turns if role == 'assistant')


def test_long_conversations_end_after_the_last_turn_that_fits(tmp_path, capsys):
  records = [dialog('val'), dialog('one', 'two', 'three'), dialog('x' * 100), dialog('four')]
  _, data, examples = make(tmp_path, records, packing='pad', seq_len=70)
  assert [learnt(data, examples, i)[0] for i in range(len(examples))] == ['one|two|', 'four|']
  assert 'of 3 conversations, 1 are cut after the last turn of the assistant that fits' in capsys.readouterr().out
  assert examples.dropped_tokens > 100


def test_questions_and_answers_and_bpe_are_conversations_too(tmp_path, capsys):
  records = [{'question': f'What is {i} + 1?', 'answer': f'{i + 1}'} for i in range(40)]
  _, data, examples = make(tmp_path, records, tokenizer='bpe', vocab_size=300)
  assert learnt(data, examples, 0)[0].count('|') == learnt(data, examples, 0)[1]
  added = [i for i, b in enumerate(data.tokenizer.token_bytes) if not b][-2:]
  assert data.vocab_size == added[-1] + 1 and 'adds 2 token(s) to the vocabulary' in capsys.readouterr().out


def test_a_system_prompt_is_a_message_and_roles_tell_duplicates_apart(tmp_path):
  records = [{'system': 'be kind', 'prompt': 'q', 'completion': 'r'}, as_record([('user', 'q'), ('assistant', 'r')]),
             as_record([('system', 'q'), ('assistant', 'r')]), as_record([('user', 'q'), ('assistant', 'r')])]
  _, data, _ = make(tmp_path, records, val_documents=0, val_fraction=0.0, filters={'deduplicate': True})
  store = data.train['data']
  text = decode(data.tokenizer, store.tokens[:store.starts[1]])
  assert 'system\nbe kind' in text and 'user\nq' in text
  assert len(store.starts) == 3


def test_text_beside_a_conversation_from_python_is_refused(tmp_path):
  turns = [ASK, {'role': 'assistant', 'content': 'one'}]
  for number, extra in enumerate(({'context': 'c'}, {'answer': 'a'})):
    fields = write_documents([{'messages': turns} | extra], tmp_path / str(number))
    config = build(DataConfig, {**fields, 'cache_dir': str(tmp_path / 'cache'), 'tokenizer': 'byte', 'task': 'chat',
                                'packing': 'pad', 'seq_len': 128})
    with pytest.raises(DataError, match=f'{next(iter(extra))} would be left out'):
      open_data(config)


def test_the_template_is_part_of_the_identity(tmp_path):
  records = [dialog(f'answer {i}') for i in range(5)]
  prints, folders = set(), set()
  for template in ('chatml', 'llama3', 'plain'):
    config, data, _ = make(tmp_path, records, chat={'template': template})
    prints.add(json.dumps(data_fingerprint(config, data, 1, 0), sort_keys=True))
    folders.add(str(data.train['data'].tokens.files[0].path))
  assert len(prints) == len(folders) == 3


def test_preferences_hold_both_conversations_in_a_row(tmp_path, capsys):
  pairs = [{'prompt': [ASK], 'chosen': [{'role': 'assistant', 'content': f'good {i}'}],
            'rejected': [{'role': 'assistant', 'content': f'bad {i}'}]} for i in range(4)]
  pairs.append({'prompt': 'x' * 200, 'chosen': 'a', 'rejected': 'b'})
  _, data, examples = make(tmp_path, pairs, task='preference', packing='pad', seq_len=100)
  assert len(examples) == 3 and 'of 4 pairs, 1 are left out' in capsys.readouterr().out
  features = examples.make(0, np.random.default_rng(0))
  for segment, answer in ((1, 'good 1'), (2, 'bad 1')):
    inside = features['segment_ids'] == segment
    assert decode(data.tokenizer, features['targets'][inside & (features['loss_mask'] > 0)]) == answer
    assert features['positions'][inside].tolist() == list(range(inside.sum()))
  first, second = (features['tokens'][features['segment_ids'] == s] for s in (1, 2))
  shared = len(data.tokenizer.prompt([('user', 'Say')]))
  assert first[:shared].tolist() == second[:shared].tolist() == data.tokenizer.prompt([('user', 'Say')])


@pytest.mark.parametrize('records, settings, message', [
    ([dialog('a')], {'task': 'next_token', 'packing': 'concat'}, 'holds conversations.*set it to chat'),
    ([{'text': 'a'}], {}, 'needs conversations.*holds text'),
    ([dialog('a')], {'task': 'preference', 'packing': 'pad'}, 'needs the fields chosen and rejected'),
    ([{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}], {}, 'set the task to preference'),
    ([dialog('a')], {'packing': 'concat'}, 'best_fit'),
    ([dialog('a') | {'kind': 'x'}], {'field': 'messages', 'label_field': 'kind'}, 'label_field: chat uses no labels'),
    ([{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}], {'task': 'preference', 'packing': 'pad',
                                                         'mask_documents': False}, 'would attend to the chosen one'),
    ([dialog('a')], {'chat': {'template': 'lama3'}}, "config.data.chat.template: 'lama3'.*did you mean 'llama3'"),
])
def test_data_and_task_must_fit(tmp_path, records, settings, message):
  with pytest.raises(ConfigError, match=message):
    make(tmp_path, records * 3, **({'val_documents': 0, 'val_fraction': 0.0} | settings))


def test_conversations_that_the_template_refuses_are_bad_records(tmp_path, capsys):
  refused = as_record([('user', 'a'), ('tool', 'b'), ('assistant', 'c')])
  records = [dialog('val'), dialog('one'), refused, dialog('two')]
  settings = {'chat': {'template': 'gemma'}, 'seq_len': 128, 'max_bad_fraction': 0.5}
  with pytest.raises(DataError, match=r'chat.jsonl:3: the chat template gemma refuses the conversation: .* role tool'):
    make(tmp_path, records, **settings)
  _, data, examples = make(tmp_path, records, on_bad_record='skip', **settings)
  assert learnt(data, examples, 0)[0] == 'one|\ntwo|\n' and len(examples) == 1
  assert 'the first bad record: chat.jsonl:3: the chat template gemma refuses' in capsys.readouterr().out


def test_plain_text_among_conversations_is_refused(tmp_path):
  with pytest.raises(DataError, match=r'chat.jsonl:2: holds no conversation'):
    make(tmp_path, [dialog('a'), {'text': 'b'}, dialog('c')])


def test_conversations_passed_from_python_are_kept(tmp_path):
  turns, other = (('user', 'Say'), ('assistant', 'one')), (('user', 'Say'), ('assistant', 'two'))
  for given, learnt in (([dialog('one'), Document('d', '', messages=turns)], 'chat'),
                        ([Document('d', '', messages=turns, rejected=other)] * 2, 'preference')):
    fields = write_documents(given, tmp_path / learnt)
    config = build(DataConfig, {**fields, 'cache_dir': str(tmp_path / 'cache'), 'tokenizer': 'byte', 'task': learnt,
                                'packing': 'pad', 'seq_len': 128, 'split': 'count', 'val_fraction': 0.0})
    store = open_data(config).train['data']
    assert decode(open_data(config).tokenizer, store.tokens[:][store.learnt[:] > 0]) == (
        'oneone' if learnt == 'chat' else 'onetwoonetwo')


def test_a_border_between_splits_cuts_no_conversation(tmp_path):
  _, data, _ = make(tmp_path, [dialog(f'answer {i}') for i in range(9)], split='tail', val_fraction=0.25)
  counts = {split: len(stores['data'].starts) for split, stores in data.splits.items() if stores}
  assert counts['train'] + counts['val'] == 9 and counts['val'] in (2, 3)


def test_tokenizers_are_fitted_to_what_the_template_writes(tmp_path):
  config, _, _ = make(tmp_path, [dialog('aye')] * 3, tokenizer='char', chat={'template': 'chatml'}, val_documents=0,
                      val_fraction=0.0)
  plain = build(DataConfig, to_dict(config) | {'chat': {'template': 'plain'}})  # writes # and U, which contents lack
  assert open_data(plain).tokenizer.prompt([('user', 'aye')])


def test_a_prepared_store_brings_its_template_and_fits_its_task_alone(tmp_path):
  path = write(tmp_path / 'chat.jsonl', [dialog(f'answer {i}') for i in range(9)])
  values = {'path': path, 'cache_dir': str(tmp_path / 'cache'), 'tokenizer': 'byte', 'task': 'chat',
            'packing': 'pad', 'chat': {'template': 'gemma'}, 'val_fraction': 0.0}
  config = build(DataConfig, values)
  data = open_data(config)
  [folder] = [store.parent for store in (tmp_path / 'cache' / 'stores').glob('*/manifest.json')]
  again = open_data(build(DataConfig, values | {'path': str(folder), 'chat': {}, 'tokenizer': 'bpe'}))
  assert again.train['data'].sha256 == data.train['data'].sha256
  assert again.tokenizer.prompt([('user', 'a')]) == data.tokenizer.prompt([('user', 'a')])
  for task in ('next_token', 'preference'):
    with pytest.raises(ConfigError, match='which holds conversations for task chat'):
      open_data(build(DataConfig, values | {'path': str(folder), 'task': task, 'chat': {}}))


def test_contents_cannot_be_parsed_for_special_tokens():
  with pytest.raises(ConfigError, match='special_tokens must be text for task chat'):
    build(DataConfig, {'task': 'chat', 'packing': 'pad', 'special_tokens': 'parse'})
