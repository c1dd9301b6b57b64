"""Tokenizers of this package in files of transformers: the same ids, the same texts, bos at the beginning."""

import json
import random

import pytest
import transformers

from llm_jax.base.errors import ConfigError
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
)
from llm_jax.extras.word_tokenizer import WordTokenizer
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


def test_a_tokenizer_without_such_a_form_is_refused():
  class Own:
    bos_id = eos_id = 0
    token_bytes = (b'',)

    def to_json(self):
      return '{"type": "own"}'

  with pytest.raises(ConfigError, match='type own'):
    tokenizer_files(Own(), 8)
