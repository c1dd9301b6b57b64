"""Tokenizers of this package in files of transformers: the same ids, the same texts, bos at the beginning."""

import io
import json
import random

import pytest
import tokenizers
import transformers

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.chat.find import find_template
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.tokenizers.huggingface import Bpe, HuggingFaceTokenizer
from llm_jax.data.tokenizers.tokenizer import (
  ByteTokenizer,
  CharTokenizer,
  ExtendedTokenizer,
  decode,
  identity,
  load_tokenizer,
  open_tokenizer,
)
from llm_jax.extras.word_tokenizer import WordTokenizer
from llm_jax.hf.pieces import library_of
from llm_jax.hf.tokenizer import tokenizer_files

CORPUS = ['def f(x):\n  return x + 1  # caf\u00e9\n', 'The quick brown fox\n\tjumps: 3.14!', '\u4e2d\u6587 \U0001f600']
KINDS = {'byte': lambda: ByteTokenizer(), 'char': lambda: CharTokenizer.fit(CORPUS),
         'word': lambda: WordTokenizer.fit(CORPUS, 100, 1, None), 'bpe': lambda: Bpe.fit(CORPUS, 300, 1),
         'extended': lambda: ExtendedTokenizer(CharTokenizer.fit(CORPUS), ['<|user|>', '<|end|>'])}


def write(folder, tokenizer):
  for name, content in tokenizer_files(tokenizer, 128).items():
    (folder / name).write_text(content)
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize('kind', KINDS)
def test_ids_and_texts_are_equal_in_transformers(kind, tmp_path):
  tokenizer = KINDS[kind]()
  theirs = write(tmp_path, tokenizer)
  seed = random.randrange(10**6)
  print('seed', seed)
  rng, letters = random.Random(seed), sorted(set(''.join(CORPUS)))
  for text in (*CORPUS, ''.join(rng.choice(letters) for _ in range(200))):
    mine = tokenizer.encode([text])[0].tolist()
    assert theirs(text, add_special_tokens=False)['input_ids'] == mine
    assert theirs(text)['input_ids'] == [tokenizer.bos_id, *mine]
    assert theirs.decode(mine, skip_special_tokens=True) == decode(tokenizer, mine)
  assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
  assert len(theirs) == len(tokenizer.token_bytes)


def test_a_chat_template_goes_with_the_tokenizer(tmp_path):
  tokenizer = ChatTokenizer(Bpe.fit(CORPUS, 300, 1), find_template('chatml', 'bpe'))
  theirs = write(tmp_path, tokenizer)
  messages = [{'role': 'user', 'content': 'The quick?'}]
  ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
  assert ids == tokenizer.prompt([('user', 'The quick?')])


def test_bos_and_eos_are_those_of_tokenizer_config(tmp_path):
  """The vocabulary has <|endoftext|>, which would be taken for both."""
  spec = json.loads(ExtendedTokenizer(Bpe.fit(CORPUS, 300, 1), []).base.with_special_tokens(['<s>', '</s>']).to_json())
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(spec))
  plain = identity(str(path))
  usual = load_tokenizer(path)
  assert usual.bos_id == usual.eos_id
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': {'content': '<s>'}, 'eos_token': '</s>'}))
  tokenizer = load_tokenizer(path)
  assert [tokenizer.name_of(i) for i in (tokenizer.bos_id, tokenizer.eos_id)] == ['<s>', '</s>']
  assert identity(str(path)) != plain
  (tmp_path / 'saved.json').write_text(tokenizer.to_json())  # as a run keeps it, without tokenizer_config.json
  again = load_tokenizer(tmp_path / 'saved.json')
  assert isinstance(again, HuggingFaceTokenizer)
  assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
  assert again.to_json() == tokenizer.to_json()


def sentencepiece_model(**options):
  sentencepiece = pytest.importorskip('sentencepiece')
  model = io.BytesIO()
  options = {'vocab_size': 400, 'minloglevel': 2, 'byte_fallback': True, 'hard_vocab_limit': False} | options
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([text * 4 for text in CORPUS]), model_writer=model,
                                           **options)
  return model.getvalue()


@pytest.mark.parametrize('options', [
    {}, {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False, 'add_dummy_prefix': False},
    {'user_defined_symbols': ['<tool>']}], ids=str)
@pytest.mark.parametrize('kind', ['unigram', 'bpe'])
def test_a_sentencepiece_model_becomes_a_tokenizer_json_with_its_ids(kind, options, tmp_path):
  more = {'vocab_size': 302, 'hard_vocab_limit': True} if kind == 'bpe' else {}
  (tmp_path / 'some.model').write_bytes(sentencepiece_model(model_type=kind, **options, **more))
  tokenizer = open_tokenizer(str(tmp_path / 'some.model'))
  theirs = write(tmp_path, tokenizer)
  again = load_tokenizer(tmp_path / 'tokenizer.json')
  for text in (*CORPUS, '  two  spaces ', 'x <tool> y', '\U0001f600\u2581', ' '):
    mine = tokenizer.encode([text])[0].tolist()
    assert theirs(text, add_special_tokens=False)['input_ids'] == mine == again.encode([text])[0].tolist()
    assert theirs(text)['input_ids'] == [tokenizer.bos_id, *mine]
    if '\u2581' not in text and not text.startswith(' '):
      assert theirs.decode(mine) == decode(tokenizer, mine).removeprefix(' ')
  assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
  assert len(theirs) == len(tokenizer.token_bytes)


def test_a_sentencepiece_model_without_such_a_form_is_refused():
  for options in ({'model_type': 'char'}, {'treat_whitespace_as_suffix': True}):
    with pytest.raises(ConfigError, match=r'no form as tokenizer\.json'):
      library_of(sentencepiece_model(**options))


def test_a_difference_of_ids_is_found(monkeypatch):
  monkeypatch.setattr('llm_jax.hf.pieces._normalizer', lambda spec: tokenizers.normalizers.Lowercase())
  with pytest.raises(ConfigError, match='the same ids'):
    library_of(sentencepiece_model())


def write_bpe_files(folder, config, vocab_size=300):
  """vocab.json and merges.txt of a small BPE, with these values in tokenizer_config.json; returns the next id."""
  model = json.loads(Bpe.fit([text * 3 for text in CORPUS], vocab_size, 1).to_json())['model']
  (folder / 'vocab.json').write_text(json.dumps(model['vocab']))
  merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in model['merges']]
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]) + '\n')
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return len(model['vocab'])


@pytest.mark.parametrize('config', [
    {'tokenizer_class': 'GPT2Tokenizer'}, {'tokenizer_class': 'GPT2TokenizerFast', 'add_prefix_space': True},
    {'tokenizer_class': 'GPT2Tokenizer', 'add_bos_token': True}, {'tokenizer_class': 'Qwen2Tokenizer'},
    {'tokenizer_class': 'Qwen2Tokenizer', 'eos_token': '<|im_end|>', 'added': True},
    {'tokenizer_class': 'GPT2Tokenizer', 'added': True,
     'eos_token': {'__type': 'AddedToken', 'content': '<|im_end|>'}}], ids=str)
def test_vocab_and_merges_have_the_ids_of_transformers(config, tmp_path):
  config = dict(config)
  added = config.pop('added', False)
  first = write_bpe_files(tmp_path, config)
  if added:
    own = {str(first + i): {'content': token, 'special': i < 2, 'lstrip': False, 'rstrip': False, 'single_word': False,
                            'normalized': False} for i, token in enumerate(('<|im_start|>', '<|im_end|>', '<tool>'))}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config | {'added_tokens_decoder': own}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  mine = load_tokenizer(tmp_path / 'vocab.json')
  seed = random.randrange(10**6)
  print('seed', seed)
  rng, letters = random.Random(seed), sorted(set(''.join(CORPUS)) | set(" 0123'se\n\u0301"))
  for text in (*CORPUS, *(''.join(rng.choice(letters) for _ in range(60)) for _ in range(20)), 'a <tool> b'):
    assert theirs(text, add_special_tokens=False)['input_ids'] == mine.encode([text])[0].tolist(), repr(text)
  assert len(mine.token_bytes) == len(theirs) and mine.eos_id == theirs.eos_token_id
  assert mine.bos_id == (theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id)
  assert mine.begins_with_bos() == bool(config.get('add_bos_token'))
  (tmp_path / 'out').mkdir()
  assert write(tmp_path / 'out', mine)(CORPUS[0])['input_ids'][-5:] == theirs(CORPUS[0])['input_ids'][-5:]


def test_what_vocab_and_merges_depend_on_is_in_their_identity(tmp_path):
  first = write_bpe_files(tmp_path, {})
  path = tmp_path / 'vocab.json'
  with pytest.raises(ConfigError, match='unknown class'):
    load_tokenizer(path)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
  found = [identity(str(path))]
  assert load_tokenizer(path).encode(['12'])[0].tolist() == [*load_tokenizer(path).encode(['1', '2'])[0].tolist(),
                                                             *load_tokenizer(path).encode(['2'])[0].tolist()]
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'qwen3'}))
  found.append(identity(str(path)))
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'<x>': first, '<y>': first + 1}))
  found.append(identity(str(path)))
  assert load_tokenizer(path).encode(['<y>'])[0].tolist() == [first + 1]
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'<x>': first + 5}))
  with pytest.raises(DataError, match='<x>'):
    load_tokenizer(path)
  (tmp_path / 'merges.txt').write_text('#version: 0.2\nnot merges of these tokens\n')
  found.append(identity(str(path)))
  with pytest.raises(DataError, match='merges'):
    load_tokenizer(path)
  assert len(set(found)) == 4
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'RobertaTokenizer'}))
  with pytest.raises(ConfigError, match='RobertaTokenizer'):
    load_tokenizer(path)


def test_a_tokenizer_without_such_a_form_is_refused():
  class Own:
    bos_id = eos_id = 0
    token_bytes = (b'',)

    def to_json(self):
      return '{"type": "own"}'

  with pytest.raises(ConfigError, match='type own'):
    tokenizer_files(Own(), 8)
