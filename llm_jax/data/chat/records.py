"""Conversations in records: messages, ShareGPT's conversations, prompts and completions, chosen and rejected ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llm_jax.base.errors import DataError
from llm_jax.data.chat.template import PRIVATE, ROLES, Messages
from llm_jax.data.sources.documents import BadRecord, Document, SourceConfig

Turns = tuple[tuple[str, str], ...]

LISTS = ('messages', 'conversations', 'conversation')  # keys of lists of messages
NAMES = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'bot': 'assistant', 'bard': 'assistant',
         'model': 'assistant', 'ai': 'assistant', 'function': 'tool', 'observation': 'tool', 'ipython': 'tool',
         'function_response': 'tool'}  # other names of roles
_PRIVATE = re.compile(f'[{chr(PRIVATE)}-\U0010fffd]')
_HUMAN = re.compile(r'\n\nHuman: ?|\n\nAssistant: ?')  # the turns of Anthropic's pairs


def conversation_fields(record: Mapping[str, Any], config: SourceConfig) -> tuple[str, ...]:
  """The fields of the record that hold a conversation, or a chosen and a rejected one; () for other records."""
  has = {name for name, value in record.items() if is_messages(value)}
  if config.field is not None:
    other = config.answer_field if config.answer_field in has else None
    return ((config.field, other) if other else (config.field,)) if config.field in has else ()
  if config.answer_field is not None or config.label_field is not None:
    return ()
  if {'chosen', 'rejected'} <= record.keys() and (
      {'chosen', 'rejected'} <= has or all(isinstance(record[name], str | bytes) for name in ('chosen', 'rejected'))):
    prompt = next((name for name in ('prompt', 'question', 'input', 'instruction') if name in record), None)
    return ('chosen', 'rejected', *([prompt] if prompt else []))
  for name in LISTS:
    if name in has:
      return (name, *(['system'] if isinstance(record.get('system'), str) else []))
  return ('prompt', 'completion') if {'prompt', 'completion'} <= has else ()


def is_messages(value: Any) -> bool:
  return isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value)


def to_conversation(record: Mapping[str, Any], fields: tuple[str, ...], name: str, where: str,
                    max_bytes: int) -> Document | BadRecord:
  """The document of a record's conversation, or a BadRecord with the reason."""
  try:
    if fields[:2] == ('chosen', 'rejected'):
      messages, rejected = _pair(record, fields)
    else:
      messages, rejected = (), None
      for field in fields:
        messages += messages_of(record[field], field) if is_messages(record[field]) else ()
      if (system := record.get('system')) and fields[1:] == ('system',) and messages[0][0] != 'system':
        messages = (('system', _text(system, "field 'system'")), *messages)
    for turns in (messages, rejected or messages):
      if all(role != 'assistant' for role, _ in turns):
        raise ValueError(f'field {fields[0]!r} holds no turn of an assistant, so nothing of it can be learnt')
    text = '\n\n'.join(content for _, content in (*messages, *(rejected or ())[shared(messages, rejected or ()):]))
    if (size := len(text.encode())) > max_bytes:
      raise ValueError(f'the conversation takes {size} bytes; config.data.max_record_bytes is {max_bytes}')
  except ValueError as e:
    return BadRecord(where, str(e))
  return Document(name, text, messages=messages, rejected=rejected)


def messages_of(value: Any, field: str) -> Turns:
  """The (role, content) of each message. Raises ValueError."""
  if not value:
    raise ValueError(f'field {field!r} holds an empty list of messages')
  return tuple(_message(turn, f'message {number} of field {field!r}') for number, turn in enumerate(value, 1))


def conversations_of(document: Document) -> list[Messages]:
  """The conversation of a document, or the chosen and the rejected one; of a pair of texts, a question and its answer.

  Raises DataError for other documents.
  """
  if document.messages is not None:
    return [document.messages, *([] if document.rejected is None else [document.rejected])]
  if isinstance(document.text, str) and isinstance(document.answer, str):
    return [(('user', document.text), ('assistant', document.answer))]
  raise DataError(f'{document.name}: holds no conversation')


def shared(messages: Messages, others: Messages) -> int:
  """The number of equal turns at the beginning of two conversations."""
  return next((i for i, (a, b) in enumerate(zip(messages, others, strict=False)) if a != b),
              min(len(messages), len(others)))


def _message(turn: Mapping[str, Any], what: str) -> tuple[str, str]:
  role = turn.get('role', turn.get('from'))
  content = turn.get('content') if 'content' in turn else turn.get('value')
  role = NAMES.get(role, role) if isinstance(role, str) else role
  if role not in ROLES:
    raise ValueError(f'{what} has the role {role!r}; known roles are {", ".join((*ROLES, *NAMES))}')
  if turn.get('tool_calls') or turn.get('function_call'):
    raise ValueError(f'{what} calls a tool in a field of its own, which is not supported; write the call into content')
  if isinstance(content, list | tuple):
    content = ''.join(_part(part, what) for part in content)
  return role, _text(content, what)


def _part(part: Any, what: str) -> str:
  if isinstance(part, str):
    return part
  kind = part.get('type') if isinstance(part, Mapping) else type(part).__name__
  if kind != 'text' or not isinstance(part.get('text'), str):
    raise ValueError(f'{what} holds a part of type {kind!r}; only text can be read')
  return part['text']


def _text(content: Any, what: str) -> str:
  if isinstance(content, bytes):
    content = content.decode()  # a UnicodeDecodeError is a ValueError
  if not isinstance(content, str):
    raise ValueError(f'{what} holds {content!r:.60} as content; it must be text')
  if (found := _PRIVATE.search(content)) is not None:
    raise ValueError(f'{what} holds the private character U+{ord(found[0]):X}, which chat templates need; remove it')
  content.encode()  # a UnicodeEncodeError, for half of a surrogate pair, is a ValueError
  return content


def _pair(record: Mapping[str, Any], fields: tuple[str, ...]) -> tuple[Turns, Turns]:
  """The chosen and the rejected conversation, each with the prompt. Raises ValueError."""
  prompt = (record.get(fields[2]) or None) if len(fields) > 2 else None
  before = () if prompt is None else messages_of(prompt, fields[2]) if is_messages(prompt) else (
      ('user', _text(prompt, f'field {fields[2]!r}')),)
  chosen, rejected = (_answer(record[field], before, field) for field in ('chosen', 'rejected'))
  same = shared(chosen, rejected)
  if chosen == rejected:
    raise ValueError("fields 'chosen' and 'rejected' are equal")
  if not all(any(role == 'assistant' for role, _ in turns[same:]) for turns in (chosen, rejected)):
    raise ValueError("fields 'chosen' and 'rejected' must each end in an answer of the assistant of their own")
  return chosen, rejected


def _answer(value: Any, before: Turns, field: str) -> Turns:
  """A whole conversation: `value` if it begins with the prompt already, else after the turns before it."""
  if is_messages(value):
    turns = messages_of(value, field)
    return (*before, *turns) if turns[0][0] == 'assistant' else turns
  text = _text(value, f'field {field!r}')
  if before:
    return (*before, ('assistant', text))
  parts, marks = _HUMAN.split(text), _HUMAN.findall(text)
  if parts[0] or not marks:
    raise ValueError(f'field {field!r} holds text, and there is no field with the prompt: prompt, question, input or '
                     'instruction')
  return tuple(('user' if 'Human' in mark else 'assistant', part) for mark, part in zip(marks, parts[1:], strict=True))
