"""Special tokens that a text spells: text by default, whatever the tokenizer; the token if the config says so."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizers import EOT, TEXTS, fit

from llm_jax.base.errors import ConfigError
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer

SPECIAL = ['<unk>', '<s>', '</s>']
PIECES = ['▁', 'x', '<', '/', 's', '>', 'a', 'u', 'n', 'k', '▁x', '</', 's>', '▁<']


def llama2(**changed):
  """A tokenizer of the kind of Llama 2: the normalizer puts a space in front of each text; merges spell '</s>'."""
  vocab = {token: i for i, token in enumerate([*SPECIAL, *(f'<0x{b:02X}>' for b in range(256)), *PIECES])}
  merges = [('▁', 'x'), ('<', '/'), ('s', '>'), ('</', 's>'), ('▁', '<')]
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True,
                                                     byte_fallback=True))
  normalizer = tokenizers.normalizers
  model.normalizer = normalizer.Sequence([normalizer.Prepend('▁'), normalizer.Replace(' ', '▁')])
  model.add_special_tokens(SPECIAL)
  return HuggingFaceTokenizer(json.dumps(json.loads(model.to_str()) | changed))


def unigram():
  model = tokenizers.Tokenizer(tokenizers.models.Unigram(
      [(token, -1.0 - i / 10) for i, token in enumerate([*SPECIAL, *PIECES])], unk_id=0))
  model.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme='first')
  model.add_special_tokens(SPECIAL)
  return HuggingFaceTokenizer(model.to_str())


def pieces(tokenizer, text):
  names = {i: token for token, i in json.loads(tokenizer.to_json())['model']['vocab'].items()} if isinstance(
      json.loads(tokenizer.to_json())['model']['vocab'], dict) else dict(enumerate([*SPECIAL, *PIECES]))
  return [names[i] for i in tokenizer.encode([text])[0].tolist()]


@pytest.mark.parametrize('make', [llama2, unigram])
@pytest.mark.parametrize('text', ['x</s>', '</s>x', 'x <s> a</s></s> x', 'x</s', '<s>', '<unk>x'])
def test_a_spelled_special_token_is_the_same_text(make, text):
  tokenizer = make()
  found = pieces(tokenizer, text)
  assert not set(found) & {'<s>', '</s>'}
  assert ''.join(found).replace('▁', ' ') == f' {text}'.replace('  ', ' ')


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(['x', ' ', '</s>', '<s>', '<', '/', 's>', 'a', '中']), max_size=12).map(''.join))
def test_texts_that_spell_special_tokens_decode_to_themselves(text):
  tokenizer = llama2()
  ids = tokenizer.encode([text])[0].tolist()
  assert b''.join(tokenizer.token_bytes[i] for i in ids).decode() == (f' {text}' if text else '')


@pytest.mark.parametrize('changed', [{}, {'post_processor': {
    'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}},
                                             {'Sequence': {'id': 'A', 'type_id': 0}}],
    'pair': [], 'special_tokens': {'<s>': {'id': '<s>', 'ids': [1], 'tokens': ['<s>']}}}}])
def test_parse_gives_the_tokens_that_the_library_gives(changed):
  tokenizer = llama2(**changed)
  library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  for text in ('x</s>', 'x <s> a</s></s> x', 'x', '', '<unk>'):
    wanted = library.encode(text, add_special_tokens=False).ids
    assert tokenizer.parsing_special_tokens().encode([text])[0].tolist() == wanted
  assert tokenizer.parsing_special_tokens().to_json() == tokenizer.to_json()


@pytest.mark.parametrize('setting, num', [('text', 0), ('parse', 2)])
def test_the_config_decides_what_spelled_special_tokens_are(tmp_path, setting, num):
  path = tmp_path / 'tokenizer.json'
  path.write_text(fit('bpe', TEXTS, vocab_size=300).to_json())
  (tmp_path / 'a.txt').write_text(f'some text {EOT} and more {EOT} of the cat and the mat. ' + 'on the mat ' * 30)
  data = open_data(DataConfig(path=str(tmp_path / 'a.txt'), tokenizer=str(path), special_tokens=setting, split='tail',
                              cache_dir=str(tmp_path / 'cache')))
  assert (data.train['data'].tokens[1:] == data.eos_id).sum() == num  # the first one begins the document


def test_parse_needs_special_tokens_with_a_spelling(tmp_path):
  (tmp_path / 'a.txt').write_text('some text')
  with pytest.raises(ConfigError, match=r'config\.data\.special_tokens: parse needs'):
    open_data(DataConfig(path=str(tmp_path / 'a.txt'), tokenizer='byte', special_tokens='parse',
                         cache_dir=str(tmp_path / 'cache')))
