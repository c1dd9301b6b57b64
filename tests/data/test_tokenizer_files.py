"""Tokenizers by name and from files: identified without opening; one message for missing or damaged files."""

import json

import pytest
from test_tokenizers import TEXTS, fit, with_merges

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, decode, identity, load_tokenizer, open_tokenizer


def test_tokenizers_are_identified_without_opening_them(tmp_path):
  assert all(identity(name) == name for name in TOKENIZERS)
  path = tmp_path / 'tokenizer.json'
  path.write_text(fit('byte', []).to_json())
  first = identity(str(path))
  path.write_text(fit('char', ['a']).to_json())
  assert len(first) == 64 and identity(str(path)) != first
  assert str(path) not in TOKENIZERS and identity('tiktoken:gpt2') == 'tiktoken:gpt2'
  assert decode(open_tokenizer(str(path)), [0]) == 'a'


def test_an_unknown_name_lists_the_choices():
  with pytest.raises(ConfigError, match=r"tokenizer.json.*tiktoken:NAME.*did you mean 'word'\?"):
    open_tokenizer('words')


@pytest.mark.parametrize('name', ['tokenizer.json', 'some.model'])
def test_a_missing_file_is_named(name, tmp_path):
  for open_it in (open_tokenizer, identity):
    with pytest.raises(DataError, match=f'{name}: the tokenizer cannot be read: No such file'):
      open_it(str(tmp_path / name))


HUGE = with_merges([])
HUGE['model']['vocab']['ab'] = 4_000_000_000

DAMAGED = {
    'empty': '',
    'not json': 'hello',
    'list': '[1]',
    'null': 'null',
    'no type': '{}',
    'other type': '{"type": "nope"}',
    'type is a list': '{"type": []}',
    'char without chars': '{"type": "char"}',
    'words are numbers': '{"type": "word", "words": [1, 2], "pattern": "x"}',
    'wrong pattern': '{"type": "word", "words": [], "pattern": "("}',
    'model is null': '{"model": null}',
    'not a model': '{"type": "sentencepiece", "model": "eA=="}',
    'not base64': '{"type": "sentencepiece", "model": "!"}',
    'no bytes': '{"type": "tiktoken", "pattern": "x", "eot_id": 0, "ranks": {"YQ==": 1}}',
    'huge id': json.dumps(HUGE),
    'cut': fit('bpe', TEXTS, vocab_size=300).to_json()[:3000],
}


@pytest.mark.parametrize('text', DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_gives_one_message(text, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text(text)
  with pytest.raises((DataError, ConfigError)) as e:
    load_tokenizer(path)
  assert str(e.value).startswith(f'{path}: ') and '\n' not in str(e.value)
