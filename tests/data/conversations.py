"""Random conversations, a small tokenizer, and chat templates in the manner of published ones, for tests."""

import functools
import random

from llm_jax.data.chat.find import BUILTIN, find_template
from llm_jax.data.chat.template import Template
from llm_jax.data.tokenizers.huggingface import Bpe, HuggingFaceTokenizer

WORDS = ['What', 'does', 'os.path', 'join', 'do', '?', 'It', 'joins', 'a\nlist', '  two  spaces', '\n\n', '\t', '42',
         'é', '日本', '🙂👍', 'e\u0301', '<b>', '&amp;', '"quoted"', "it's", '{{ x }}', '{% if %}', '\\n',
         'def f(x):\n  return x', ' ', '', '\u200b', 'ß', '#', '<think>', '</s', 'assistant']
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {{- '[INST] ' + message['content'] + ' [/INST]' }}
  {%- elif message['role'] == 'assistant' %}
    {%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}
  {%- else %}
    {{- '[INST] ' + message['role'] + ': ' + message['content'] + ' [/INST]' }}
  {%- endif %}
{%- endfor %}"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>' }}
{% generation %}{{ message['content'] + eos_token }}
{% endgeneration %}{% else %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}"""
COMMAND = """{{ bos_token }}{% for message in messages %}{% set turn = loop.index0 %}{{ '<|turn|>' }}
{%- if message['role'] == 'assistant' %}
{{- '<|chatbot|>' }}{% generation %}{{ message['content'].strip() }}{{ '<|end|>' }}{% endgeneration %}
{%- else %}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'].strip() ~ '<|end|>' }}
{%- endif %}
{%- if turn > 99 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn|><|chatbot|>' }}{% endif %}"""
OTHERS = {
    'mistral': Template('mistral', MISTRAL, ('<s>', '</s>', '[INST]', '[/INST]'), '<s>', '</s>'),
    'zephyr': Template('zephyr', ZEPHYR, ('<|user|>', '<|system|>', '<|assistant|>', '</s>'), None, '</s>'),
    'command': Template('command', COMMAND, ('<|turn|>', '<|chatbot|>', '<|end|>'), None, '<|end|>'),
}
TEMPLATES = {**{name: find_template(name, '') for name in BUILTIN}, **OTHERS}


def conversation(rng: random.Random, roles: tuple[str, ...] = ('system', 'user', 'assistant', 'tool')) -> tuple:
  """Turns in a usual order, and at times in an odd one; at least one of the assistant."""
  turns = ['system'] if rng.random() < 0.4 and 'system' in roles else []
  for _ in range(rng.randint(1, 4)):
    turns += ['user', *(['tool'] * rng.randint(0, 2) if 'tool' in roles and rng.random() < 0.2 else []), 'assistant']
  turns += ['user'] * (rng.random() < 0.2)
  return tuple((role, text(rng)) for role in turns)


def text(rng: random.Random) -> str:
  return ' '.join(rng.choice(WORDS) for _ in range(rng.randint(0, 12)))


@functools.cache
def small_bpe() -> HuggingFaceTokenizer:
  rng = random.Random(0)
  texts = [f'user\nassistant\nSystem {text(rng)}' for _ in range(200)]
  return Bpe.fit(texts, 600, 1)
