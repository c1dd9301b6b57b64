"""Separate tokenizers for prompts and answers: each is fitted to its side, and ids are never mixed up."""

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import pytest
from pair_runs import write_pair_config, write_pairs
from program import finish, start
from test_store import files_of

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.commands import evaluate, generate
from llm_jax.config import Config
from llm_jax.data.config import DataConfig
from llm_jax.data.open import Data, check_fingerprint, data_fingerprint, open_data, open_examples, tokenize
from llm_jax.data.rows.augment import Augment
from llm_jax.data.stores.store import read_manifest
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, ByteTokenizer, CharTokenizer, TokenizerConfig, decode
from llm_jax.extras.commands import data_inspect as inspect
from llm_jax.models.registry import MODELS
from llm_jax.training.log import read_metrics
from llm_jax.training.resolve import resolve

PROMPT_WORDS = ['red', 'wörter', '中文', 'x', 'mix', '=', '{', '(a\tb)', 'of', 'zzz']
ANSWER_WORDS = ['1', '2', 'add', ';', '\U0001F600', '\n', 'é', 'vec']


def pairs_of(seed, num=150, prompt_words=PROMPT_WORDS, answer_words=ANSWER_WORDS):
  rng = random.Random(seed)
  texts = [[' '.join(rng.choices(words, k=rng.randrange(1, 9))) for words in (prompt_words, answer_words)]
           for _ in range(num)]
  return [(f'{text} {i}', answer) for i, (text, answer) in enumerate(texts, 100)]  # all prompts are different


def config_of(tmp_path, **overrides):
  return DataConfig(**{
      'path': str(tmp_path / 'pairs.jsonl'), 'answer_field': 'answer', 'task': 'seq2seq', 'packing': 'pad',
      'seq_len': 200, 'encoder_len': 200, 'vocab_size': 300, 'tokenizer': 'bpe', 'encoder_tokenizer': 'word',
      'split': 'document', 'val_fraction': 0.3, 'cache_dir': str(tmp_path / 'cache'), **overrides})


def rows_of(config, data, store):
  """(ids of the encoder's input, ids of the targets) of each row."""
  examples = open_examples(config, data, store, train=False)
  rows = [examples.make(i, np.random.default_rng(i)) for i in range(len(examples))]
  return [(row['encoder_tokens'][row['encoder_segment_ids'] > 0].tolist(),
           row['targets'][row['loss_mask'] > 0].tolist()) for row in rows]


@pytest.mark.parametrize('encoder_tokenizer', TOKENIZERS)
@pytest.mark.parametrize('tokenizer', TOKENIZERS)
def test_both_sides_of_every_pair_can_be_decoded(tmp_path, tokenizer, encoder_tokenizer):
  pairs = pairs_of(0)
  write_pairs(tmp_path / 'pairs.jsonl', pairs)
  config = config_of(tmp_path, tokenizer=tokenizer, encoder_tokenizer=encoder_tokenizer)
  data = open_data(config)
  reader, writer = data.encoder_tokenizer, data.tokenizer
  found = Counter()
  for store in (data.train['data'], data.val['data']):
    for read, learnt in rows_of(config, data, store):
      assert (read[-1], learnt[-1]) == (reader.eos_id, writer.eos_id)
      found[decode(reader, read[:-1]), decode(writer, learnt[:-1])] += 1
    starts = np.append(store.starts, len(store.tokens))
    for begin, end, answer in zip(starts, starts[1:], store.answers, strict=False):
      bos, *ids = store.tokens[begin:end].tolist()
      ends = writer.eos_id != writer.bos_id
      assert bos == writer.bos_id and (not ends or ids.pop() == writer.eos_id)
      assert (decode(reader, ids[:answer - 1]), decode(writer, ids[answer - 1:])) in found
  assert found == Counter(pairs)
  assert (data.train['data'].bytes_scale, data.val['data'].bytes_scale) == (1, 1), 'all words are in the vocabulary'


@pytest.mark.parametrize('name', ['word', 'bpe'])
def test_each_tokenizer_is_fitted_to_its_own_training_texts(tmp_path, name):
  pairs = pairs_of(1)
  write_pairs(tmp_path / 'pairs.jsonl', pairs)
  held_out = write_pairs(tmp_path / 'held.jsonl', pairs_of(2, 20, ['unseen', 'reading'], ['unseen', 'writing']))
  data = open_data(config_of(tmp_path, tokenizer=name, encoder_tokenizer=name, val_path=str(held_out)))
  settings = TokenizerConfig(300)
  prompts, answers = zip(*pairs, strict=True)
  assert data.encoder_tokenizer.to_json() == TOKENIZERS[name].fit(prompts, settings).to_json()
  assert data.tokenizer.to_json() == TOKENIZERS[name].fit(answers, settings).to_json()


def test_bytes_scale_covers_the_answers_alone(tmp_path):
  write_pairs(tmp_path / 'pairs.jsonl', pairs_of(3))
  held = pairs_of(4, 20, ['unseen', 'red'], ['unseen', 'add'])
  held_path = write_pairs(tmp_path / 'held.jsonl', held)
  config = config_of(tmp_path, tokenizer='word', val_path=str(held_path))
  data = open_data(config)
  again = tokenize(str(held_path), config, data.tokenizer, data.encoder_tokenizer)
  num_bytes = sum(len(answer.encode()) for _, answer in held)
  for opened in (data, again):
    store = opened.val['data']
    known = sum(len(data.tokenizer.token_bytes[i]) for _, learnt in rows_of(config, opened, store) for i in learnt)
    assert 0 < known < num_bytes
    assert known * store.bytes_scale == pytest.approx(num_bytes)
    assert store.num_bytes == sum(len((text + answer).encode()) for text, answer in held)
  assert again.vocab_size == data.vocab_size == len(data.tokenizer.token_bytes), 'prompts have other ids'


def test_a_store_depends_on_both_tokenizers(tmp_path):
  write_pairs(tmp_path / 'pairs.jsonl', pairs_of(5))
  kinds = [('word', 'char'), ('word', 'byte'), ('word', None), ('char', 'word')]
  configs = [config_of(tmp_path, tokenizer=a, encoder_tokenizer=b) for a, b in kinds]
  fingerprints, before = [], set()
  for config in configs:
    data = open_data(config)
    fingerprints.append(data_fingerprint(config, data, 1, 0))
    folders = {path for path in (tmp_path / 'cache' / 'stores').iterdir() if path.is_dir()}
    [made], before = folders - before, folders
    two = config.encoder_tokenizer is not None
    assert ('encoder_tokenizer.json' in files_of(made)) == two
    assert ('encoder_tokenizer' in fingerprints[-1]) == two
    assert ('answer_bytes' in read_manifest(made)['splits']['train']) == two
    assert open_data(config).train['data'].sha256 == data.train['data'].sha256
  assert data.prompt_tokenizer is data.encoder_tokenizer
  other = CharTokenizer('another')
  changed = data_fingerprint(configs[-1], dataclasses.replace(data, encoder_tokenizer=other), 1, 0)
  with pytest.raises(ConfigError, match=r'the tokenizer of config\.data\.encoder_tokenizer has changed'):
    check_fingerprint(fingerprints[-1], changed, 1)


def test_ids_of_the_two_sides_are_kept_apart(tmp_path):
  """Prompt ids may be white space in the answers' tokenizer, or beyond its vocabulary."""
  path = write_pairs(tmp_path / 'pairs.jsonl', [(chr(ord('a') + i) * 3, ' \n'[i % 2] * (i + 1)) for i in range(26)])
  config = config_of(tmp_path, tokenizer='char', encoder_tokenizer='char')
  data = open_data(config)
  assert (data.vocab_size, len(data.encoder_tokenizer.token_bytes)) == (3, 27)
  write_pairs(path, [('\t' * (i + 1), ' \n'[i % 2] * 2) for i in range(26)])
  with pytest.raises(DataError, match='nothing but white space'):
    open_data(config)


def test_augmentation_uses_the_ids_of_each_side(tmp_path):
  write_pairs(tmp_path / 'pairs.jsonl', pairs_of(6))
  config = config_of(tmp_path, tokenizer='bpe', encoder_tokenizer='char', val_fraction=0.5,
                     augment=Augment(token_dropout=0.3, token_replace=0.3))
  data = open_data(config)
  reader = data.encoder_tokenizer
  examples = open_examples(config, data, data.train['data'], train=True)
  rows = [examples.make(i, np.random.default_rng(i)) for i in range(len(examples))]
  read = np.concatenate([row['encoder_tokens'][row['encoder_segment_ids'] > 0] for row in rows])
  tokens = np.concatenate([row['tokens'][row['segment_ids'] > 0] for row in rows])
  assert np.unique(read).tolist() == list(range(len(reader.token_bytes)))
  assert np.mean(read == reader.bos_id) > 0.25 and np.mean(tokens == data.tokenizer.bos_id) > 0.25
  assert tokens.max() >= len(reader.token_bytes)


def test_inspect_shows_the_tokens_of_each_side(tmp_path, capsys):
  write_pairs(tmp_path / 'pairs.jsonl', [(f'read {"abcdefgh"[i % 8]} {i}', 'xyz') for i in range(40)])
  inspect.main([f'--path={tmp_path}/pairs.jsonl', '--answer_field=answer', '--task=seq2seq', '--packing=pad',
                '--tokenizer=char', '--encoder_tokenizer=word', f'--cache_dir={tmp_path}/cache', '--rows=1'])
  output = capsys.readouterr().out
  assert 'encoder reads' in output and ': read| ' in output and '|<eos>' in output
  assert 'reads   <eot>|x|y|z' in output and 'learns  x|y|z|<eot>' in output
  assert 'vocabulary: 4 tokens, ' in output


@pytest.mark.parametrize(('overrides', 'message'), [
    ({'task': 'next_token', 'packing': 'concat'}, "encoder_tokenizer 'word' is for task seq2seq.* 'next_token'"),
    ({'encoder_tokenizer': 'wrod'},
     "encoder_tokenizer 'wrod' is unknown, .*known: byte, char, bpe, word .did you mean 'word'"),
    ({'encoder_tokenizer': 'none'}, "encoder_tokenizer 'none' is unknown"),
    ({'tokenizer': 'none'}, "encoder_tokenizer 'word' needs a tokenizer for the answers"),
    ({'tokenizer': 'byte', 'encoder_tokenizer': 'bpe', 'vocab_size': 200}, 'vocab_size must be at least 257'),
    ({'streaming': True, 'split': 'count', 'val_documents': 3}, 'streaming: only task next_token'),
])
def test_invalid_configs_are_rejected(tmp_path, overrides, message):
  with pytest.raises(ValueError, match=message):
    config_of(tmp_path, **overrides)


def test_data_without_text_pairs_is_rejected(tmp_path):
  pairs = write_pairs(tmp_path / 'pairs.jsonl', pairs_of(7, 20))
  with pytest.raises(ConfigError, match=r'config\.data\.encoder_tokenizer: word .* no pairs .*answer_field'):
    open_data(config_of(tmp_path, answer_field=None, field='text'))
  np.arange(99, dtype=np.uint16).tofile(tmp_path / 'ids.bin')
  with pytest.raises(ConfigError, match=r'config\.data\.encoder_tokenizer: byte .*ids\.bin holds no pairs'):
    open_data(config_of(tmp_path, path=str(tmp_path / 'ids.bin'), tokenizer='byte', encoder_tokenizer='byte'))
  pairs.write_text(''.join(json.dumps({'text': [1, 2, i], 'answer': [3]}) + '\n' for i in range(20)))
  with pytest.raises(ConfigError, match=r'config\.data\.encoder_tokenizer: word is for texts, .* holds token ids'):
    open_data(config_of(tmp_path))


def test_the_model_has_an_embedding_for_each_tokenizer():
  chars, eos = CharTokenizer('abc'), ByteTokenizer()
  two = Data({}, eos, 257, 256, 256, encoder_tokenizer=chars)
  one = Data({}, eos, 257, 256, 256)

  def completed(data, model='encdec', **fields):
    config = Config(model=MODELS.settings(model)(**fields), data=DataConfig(
        task='seq2seq', packing='pad', tokenizer='byte', encoder_tokenizer='char' if data is two else None))
    return resolve(dataclasses.replace(config, eval=dataclasses.replace(config.eval, prompts=('ab',))), data).model

  assert (completed(two).vocab_size, completed(two).encoder_vocab_size) == (257, 4)
  assert completed(two, encoder_vocab_size=9).encoder_vocab_size == 9
  assert completed(one).encoder_vocab_size is None
  assert completed(one, encoder_vocab_size=257).encoder_vocab_size == 257, 'one tokenizer may have two tables'
  for data, fields, told in ((two, {'encoder_vocab_size': 3}, '3 is less than the 4 tokens'),
                             (one, {'encoder_vocab_size': 256}, '256 is less than the 257 tokens')):
    with pytest.raises(ConfigError, match=r'config\.model\.encoder_vocab_size: ' + told):
      completed(data, **fields)
  with pytest.raises(ConfigError, match=r'config\.data\.encoder_tokenizer: char needs a model .* decoder has none'):
    completed(two, 'decoder')


SETTINGS = {
    'num_steps': 60, 'batch_tokens': 128, 'tokens_per_device': 128, 'data.tokenizer': 'char',
    'data.encoder_tokenizer': 'word', 'data.task': 'seq2seq', 'data.seq_len': 8, 'data.encoder_len': 8,
    'data.test_fraction': 0.2, 'optim.learning_rate': 1e-2, 'eval.every': 60, 'eval.prompts': ('b b b m',),
    'checkpoint.every': 1000, 'checkpoint.keep_best': 0}


@pytest.mark.slow
def test_a_run_uses_both_tokenizers(tmp_path, capsys):
  pairs = [(f'{a} {a} {a} {b}', f'{ord(a) - 96}' * 2) for a in 'abcdefgh' for b in 'ijklmnop']
  path = write_pairs(tmp_path / 'pairs.jsonl', pairs)
  write_pair_config(tmp_path / 'signs.py', path, 'encdec', SETTINGS)
  output = finish(start(tmp_path, 'main', '--config=signs.py', '--workdir=run', '--config.log.samples=always'))
  run = tmp_path / 'run'
  assert '  | b b b m\n  | 22' in output, 'the sample'
  assert json.loads((run / 'tokenizer.json').read_text())['chars'] == '12345678'
  assert set(json.loads((run / 'encoder_tokenizer.json').read_text())['words']) == {
      *'abcdefgh', *(f' {letter}' for letter in 'abcdefghijklmnop')}
  saved = json.loads((run / 'config.json').read_text())['model']
  assert (saved['vocab_size'], saved['encoder_vocab_size']) == (9, 28)
  last = read_metrics(run / 'metrics.jsonl')[-1]
  assert last['val/bits_per_byte'] == pytest.approx(last['val/loss'] / np.log(2) * 3 / 2), 'two bytes, and eos'

  evaluate.main([f'--workdir={run}', '--split=test', '--answers=0', f'--out={tmp_path}/result.json'])
  evaluate.main([f'--workdir={run}', f'--data={path}', f'--out={tmp_path}/result.json'])
  answers = [json.loads(line) for line in (tmp_path / 'answers.jsonl').read_text().splitlines()]
  assert sorted((a['prompt'], a['expected']) for a in answers) == pairs
  assert all(set(a['given']) <= set('12345678') and a['exact'] == (a['given'] == a['expected']) for a in answers)
  assert np.mean([a['exact'] for a in answers]) > 0.9, 'it has learnt what the signs mean'

  capsys.readouterr()
  generate.main([f'--workdir={run}', '--prompt=c c c m', '--num_beams=2', '--num_tokens=4'])
  assert capsys.readouterr().out.strip() == '33'
