"""The chat template and tokenizer of a config whose task reads conversations."""

from __future__ import annotations

from collections.abc import Mapping

from llm_jax.base.errors import ConfigError
from llm_jax.data.chat.find import find_template
from llm_jax.data.chat.template import Template
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.config import DataConfig
from llm_jax.data.sources.corpus import Corpus
from llm_jax.data.tokenizers.tokenizer import Tokenizer


def template_of(config: DataConfig) -> Template | None:
  """The template of the config's task; None: it does not read conversations. Raises ConfigError."""
  task = config.task_settings
  if not task.chats:
    return None
  return find_template(task.template, config.tokenizer, task.special_tokens,  # type: ignore[attr-defined]
                       f'config.data.{config.task}.template')


def check_conversations(config: DataConfig, corpora: Mapping[str, Corpus], field: str = 'config.data.path') -> None:
  """Raises ConfigError if the first document of a corpus is a conversation, and the task reads none, or vice versa."""
  for corpus in corpora.values():
    first = corpus.first()
    if first is None:
      continue
    has_answer = isinstance(first.text, str) and isinstance(first.answer, str)
    if config.task_settings.chats and any(source.config.label_field for _, source in corpus.sides):
      raise ConfigError(f'config.data.label_field: {config.task} uses no labels; set it to None, or set another task')
    if first.messages is not None and not config.task_settings.chats:
      pairs = ', or to preference for the pairs of chosen and rejected ones' if first.rejected else ''
      raise ConfigError(f'{field}: {corpus.name} holds conversations, but config.data.task is {config.task}; set it to '
                        f'chat{pairs}; or set config.data.field to a field with text')
    if config.task_settings.chats and first.messages is None and not has_answer:
      holds = 'text' if isinstance(first.text, str) else 'token ids'
      raise ConfigError(f'config.data.task: {config.task} needs conversations, such as a list of messages with role '
                        f'and content, but {corpus.name} holds {holds}; set another task')
    if config.task_settings.needs == 'seconds' and first.rejected is None:
      raise ConfigError(f'config.data.task: {config.task} needs the fields chosen and rejected, but {corpus.name} has '
                        'none; set the task to chat')
    if config.task_settings.needs == 'learnt' and first.rejected is not None:
      raise ConfigError(f'config.data.task: {config.task} would leave out the rejected answers of {corpus.name}; set '
                        'the task to preference; or, to learn the chosen ones alone, config.data.field to chosen, or '
                        'to prompt and config.data.answer_field to chosen')


def chat_tokenizer(config: DataConfig, tokenizer: Tokenizer | None, template: Template) -> ChatTokenizer:
  """The tokenizer with the template; prints which tokens the template adds. Raises ConfigError without a tokenizer."""
  if tokenizer is None:
    raise ConfigError(f'config.data.task: {config.task} needs texts and a tokenizer, but the data are token ids; set '
                      'another task')
  chat = ChatTokenizer(tokenizer, template)
  if chat.added:
    first = len(chat.original.token_bytes)
    print(f'data: the chat template {template.name} adds {len(chat.added)} token(s) to the vocabulary, from id '
          f'{first}: {", ".join(chat.added)}', flush=True)
  return chat
