"""Chat templates give the ids and masks of transformers, and contents never become special tokens."""

import dataclasses
import json
import random

import numpy as np
import pytest
import tokenizers
from conversations import MISTRAL, TEMPLATES, conversation, small_bpe

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.chat.find import BUILTIN, TEMPLATE_FILE, find_template
from llm_jax.data.chat.template import Template
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.sources.documents import Document
from llm_jax.data.tokenizers.huggingface import HuggingFaceTokenizer
from llm_jax.data.tokenizers.tokenizer import ByteTokenizer, CharTokenizer, decode, load_tokenizer

ROLES = {'gemma': ('system', 'user', 'assistant')}
# In the manner of Llama 2: spaces as U+2581, a space before the text, bytes for what is unknown.
SPACES = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [
    {'id': i, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': i == 2, 'normalized': False,
     'special': True} for i, token in enumerate(('<unk>', '<s>', '</s>'))],
    'normalizer': {'type': 'Sequence', 'normalizers': [
        {'type': 'Prepend', 'prepend': '▁'}, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}]},
    'pre_tokenizer': None, 'post_processor': None, 'decoder': None,
    'model': {'type': 'BPE', 'dropout': None, 'unk_token': '<unk>', 'continuing_subword_prefix': None,
              'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': True, 'ignore_merges': False,
              'vocab': {token: i for i, token in enumerate([
                  '<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', *'abcdefghijklmnopqrstuvwxyz',
                  '▁a', 'in'])},
              'merges': [['▁', 'a'], ['i', 'n']]}}


def trimmed() -> HuggingFaceTokenizer:
  """As Llama 3's: the characters of a token are without the spaces around it."""
  model = tokenizers.Tokenizer.from_str(small_bpe().to_json())
  model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  return HuggingFaceTokenizer(model.to_str())


MODELS = {'bpe': small_bpe, 'trimmed': trimmed, 'spaces': lambda: HuggingFaceTokenizer(json.dumps(SPACES))}


def encoded(chat, messages, rejected=None):
  [found] = chat.conversations([Document('d', '', messages=messages, rejected=rejected)])
  return found


def learnt_text(chat, found):
  return decode(chat, found.ids[found.learnt])


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('name', TEMPLATES)
def test_ids_and_masks_equal_those_of_transformers(name, model):
  transformers = pytest.importorskip('transformers')
  chat = ChatTokenizer(MODELS[model](), TEMPLATES[name])
  oracle = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer.from_str(chat.to_json()), bos_token=chat.template.bos_token,
      eos_token=chat.template.eos_token, chat_template=chat.template.source)
  rng = random.Random(seed := np.random.SeedSequence().entropy % 2**32)
  print('seed', seed)
  for _ in range(40):
    messages = conversation(rng, ROLES.get(name, ('system', 'user', 'assistant', 'tool')))
    expected = oracle.apply_chat_template([{'role': role, 'content': content} for role, content in messages],
                                          return_assistant_tokens_mask=True, return_dict=True)
    found = encoded(chat, messages)
    assert found.ids.tolist() == expected['input_ids'], messages
    assert found.learnt.astype(int).tolist() == expected['assistant_masks'], messages
    assert found.learnt.any() or not any(content.strip() for role, content in messages if role == 'assistant')


@pytest.mark.parametrize('name', TEMPLATES)
def test_part_by_part_gives_the_same_ids_and_masks_as_the_library(name):
  """The way of texts that spell special tokens, and of tokenizers that are not Hugging Face's."""
  chat, rng = ChatTokenizer(small_bpe(), TEMPLATES[name]), random.Random(1)
  for _ in range(20):
    messages = conversation(rng, ROLES.get(name, ('system', 'user', 'assistant', 'tool')))
    rendered, spans = chat.template.render(messages)
    ids, places = chat._parse_parts(rendered, spans)
    [(expected, expected_places)] = chat._parse([rendered])
    assert ids.tolist() == expected.tolist() and places.tolist() == expected_places.tolist()


@pytest.mark.parametrize('name', BUILTIN)
@pytest.mark.parametrize('base', [small_bpe(), ByteTokenizer(), HuggingFaceTokenizer(json.dumps(SPACES))])
def test_special_tokens_in_contents_stay_text(name, base):
  chat = ChatTokenizer(base, TEMPLATES[name])
  special = np.array(list(chat.special_tokens.values()))
  plain = encoded(chat, (('user', 'a'), ('assistant', 'in')))
  spelled = ' and '.join(chat.special_tokens)
  found = encoded(chat, (('user', f'a{spelled}'), ('assistant', f'in{spelled}')))
  assert np.isin(found.ids, special).sum() == np.isin(plain.ids, special).sum()
  text = decode(chat, found.ids)
  assert text.count(spelled) == 2 and spelled in learnt_text(chat, found)


@pytest.mark.parametrize('base', [ByteTokenizer(), CharTokenizer('abcd \n#seruistantgm'), small_bpe()])
def test_the_assistant_s_turns_and_their_ends_are_learnt(base):
  chat = ChatTokenizer(base, find_template('chatml', ''))
  found = encoded(chat, (('user', 'a b'), ('assistant', 'c'), ('user', 'd'), ('assistant', 'a d')))
  assert learnt_text(chat, found) == 'ca d'
  assert (found.ids[found.learnt] == chat.eos_id).sum() == 2
  assert chat.prompt([('user', 'a b')]) == found.ids[:len(chat.prompt([('user', 'a b')]))].tolist()


@pytest.mark.parametrize('name', ['chatml', 'llama3', 'mistral', 'command', 'plain'])
def test_a_template_without_marks_learns_by_prefixes_what_marks_say(name):
  template = TEMPLATES[name]
  bare = dataclasses.replace(template, source=template.source.replace('{%- generation %}', '').replace(
      '{%- endgeneration %}', '').replace('{% generation %}', '').replace('{% endgeneration %}', ''))
  messages = (('user', 'a'), ('assistant', 'b c'), ('user', 'd'), ('assistant', 'e'))
  text, spans = ChatTokenizer(small_bpe(), template).template.render(messages)
  other, found = ChatTokenizer(small_bpe(), bare).template.render(messages)
  assert other == text
  assert [text[a:b].strip() for a, b in found] == [text[a:b].strip() for a, b in spans]


def test_built_in_templates_write_the_known_formats():
  plain = (('system', 'Be brief.'), ('user', 'Hi'), ('assistant', 'Hello'), ('user', 'Bye'), ('assistant', 'Ciao'))
  turns = ''.join(f'<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>' for role, text in plain)
  chatml = '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello' \
           '<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n'
  expected = {
      'chatml': f'{chatml}Ciao<|im_end|>\n', 'qwen3': f'{chatml}<think>\n\n</think>\n\nCiao<|im_end|>\n',
      'llama3': f'<|begin_of_text|>{turns}',
      'gemma': '<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n'
               '<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nCiao<end_of_turn>\n',
      'plain': '### System\nBe brief.\n\n### User\nHi\n\n### Assistant\nHello<|endoftext|>\n\n### User\nBye\n\n'
               '### Assistant\nCiao<|endoftext|>\n\n'}
  for name in BUILTIN:
    assert ChatTokenizer(ByteTokenizer(), TEMPLATES[name]).template.render(plain)[0] == expected[name], name
  prompt = ChatTokenizer(ByteTokenizer(), TEMPLATES['qwen3']).template.prompt(plain[:-1])
  assert expected['qwen3'].startswith(prompt) and prompt.endswith('</think>\n\n')


def test_a_template_that_rewrites_history_is_refused_by_name():
  source = ('{% for m in messages %}{% if loop.last %}{{ "LAST " }}{% endif %}{{ m.role + m.content }}{% endfor %}'
            '{% if add_generation_prompt %}assistant{% endif %}')
  with pytest.raises(ConfigError, match=r'odd.jinja.*another way once other turns follow.*chatml.*generation'):
    Template('odd.jinja', source).render((('user', 'a'), ('assistant', 'b')))


def test_templates_run_in_a_sandbox():
  with pytest.raises(DataError, match='unsafe'):
    Template('x', '{{ messages.__class__.__mro__ }}').render((('user', 'a'),))
  with pytest.raises(DataError, match='refuses the conversation: no tools'):
    Template('x', '{{ raise_exception("no tools") }}').render((('user', 'a'),))
  with pytest.raises(ConfigError, match='line 1'):
    Template('x', '{% for %}').render((('user', 'a'),))


def test_a_pair_learns_the_answers_after_the_shared_prompt():
  chat = ChatTokenizer(ByteTokenizer(), find_template('chatml', ''))
  before = (('user', 'a'), ('assistant', 'shared'), ('user', 'b'))
  found = encoded(chat, (*before, ('assistant', 'good')), (*before, ('assistant', 'bad')))
  chosen, rejected = found.ids[:found.second], found.ids[found.second:]
  assert decode(chat, chosen[found.learnt[:found.second]]) == 'good'
  assert decode(chat, rejected[found.learnt[found.second:]]) == 'bad'
  assert encoded(chat, (*before, ('assistant', 'bad'))).ids.tolist() == rejected.tolist()


@pytest.mark.parametrize('base', [ByteTokenizer(), CharTokenizer('abusertin\n'), small_bpe()])
def test_added_tokens_and_the_template_come_back_from_files(base, tmp_path):
  chat = ChatTokenizer(base, find_template('llama3', ''))
  assert chat.added and len(chat.token_bytes) == len(base.token_bytes) + len(chat.added)
  assert chat.token_bytes[:len(base.token_bytes)] == base.token_bytes
  (tmp_path / 'tokenizer.json').write_text(chat.to_json())
  for name, content in chat.files.items():
    (tmp_path / name).write_text(content)
  again = ChatTokenizer(load_tokenizer(tmp_path / 'tokenizer.json'), find_template(None, f'{tmp_path}/tokenizer.json'))
  assert not again.added and again.special_tokens == chat.special_tokens and again.eos_id == chat.eos_id
  assert again.prompt([('user', 'ab')]) == chat.prompt([('user', 'ab')])


def test_templates_are_found_in_tokenizer_folders_and_files(tmp_path):
  config = {'chat_template': [{'name': 'tools', 'template': 'no'}, {'name': 'default', 'template': MISTRAL}],
            'bos_token': {'content': '<s>'}, 'eos_token': '</s>', 'additional_special_tokens': ['[INST]', '[/INST]']}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  found = find_template(None, str(tmp_path / 'tokenizer.json'))
  assert (found.source, found.bos_token, found.eos_token) == (MISTRAL, '<s>', '</s>')
  assert found.special_tokens == ('<s>', '</s>', '[INST]', '[/INST]')
  (tmp_path / TEMPLATE_FILE).write_text('{{ messages }}')
  assert find_template(str(tmp_path), '').source == '{{ messages }}'
  assert find_template(str(tmp_path / TEMPLATE_FILE), '', ('<x>',)).special_tokens == ('<x>',)
  with pytest.raises(ConfigError, match=r"config.data.chat.template: 'chatmll' cannot be read.*chatml"):
    find_template('chatmll', '')
