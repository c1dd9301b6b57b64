"""Conversations in records: messages, ShareGPT's conversations, prompts and completions, chosen and rejected ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llm_jax.base.errors import DataError
from llm_jax.base.notes import print_once
from llm_jax.data.chat.template import PRIVATE, ROLES, Messages, Template
from llm_jax.data.formats.fields import ABOUT, SYSTEM, join_text, with_text
from llm_jax.data.sources.documents import BadRecord, Document, SourceConfig, shown

Turns = tuple[tuple[str, str], ...]

# Keys of lists of messages, which follow each other.
LISTS = (('messages',), ('conversations',), ('conversation',), ('prompt', 'completion'))
PROMPTS = (('prompt',), ('question',), ('instruction', 'input'))  # keys of what chosen and rejected texts answer
NAMES = {'human': 'user', 'gpt': 'assistant', 'chatgpt': 'assistant', 'bot': 'assistant', 'bard': 'assistant',
         'model': 'assistant', 'ai': 'assistant', 'function': 'tool', 'observation': 'tool', 'ipython': 'tool',
         'function_response': 'tool'}  # other names of roles
# Text in these fields of a record or a message is about it, and is left out.
_ABOUT = ABOUT | {'conversation_hash', 'conversation_id', 'hash', 'message_id', 'model', 'name', 'prompt_id', 'source',
                  'split', 'timestamp', 'tool_call_id'}
_ROLE = ('role', 'from')
_PRIVATE = re.compile(f'[{chr(PRIVATE)}-\U0010fffd]')
_HUMAN = re.compile(r'\n\nHuman: ?|\n\nAssistant: ?')  # the turns of Anthropic's pairs


def conversation_fields(record: Mapping[str, Any], config: SourceConfig) -> tuple[str, ...]:
  """The fields to read of a record that holds a conversation: its turns, and all text beside them; () for others."""
  turns = turn_fields(record, config)
  beside = _system_fields(record) if config.field is not None else with_text(record, _ABOUT)
  return tuple(dict.fromkeys([*turns, *_system_fields(record), *beside])) if turns else ()


def turn_fields(record: Mapping[str, Any], config: SourceConfig) -> tuple[str, ...]:
  """The fields with turns: of a conversation, or of chosen and rejected, then of their prompt; () for other records.

  Fields that the config names leave out the others.
  """
  if config.field is not None:
    named = [config.field] if config.field in record else config.field.split('+')
    turns = [name for name in named if name not in SYSTEM]  # which are always used
    if {'chosen', 'rejected'} <= {*turns} <= record.keys():
      return _pair_fields(record, [name for name in turns if name not in ('chosen', 'rejected')])
    if config.answer_field is not None and is_messages(record.get(config.answer_field)):
      turns.append(config.answer_field)
    return tuple(turns) if all(is_messages(record.get(name)) for name in turns) else ()
  if config.answer_field is not None or config.label_field is not None:
    return ()
  prompts = ([name for name in names if name in record] for names in PROMPTS)
  fields = _pair_fields(record, next(filter(None, prompts), [])) or next(
      (names for names in LISTS if all(is_messages(record.get(name)) for name in names)), ())
  if fields and (about := sorted(_ABOUT & record.keys())):
    print_once(f'data: {shown(config.path)}: conversations in {" + ".join(fields)}; not used: {", ".join(about)}')
  return fields


def _pair_fields(record: Mapping[str, Any], prompts: list[str]) -> tuple[str, ...]:
  both = [record.get(name) for name in ('chosen', 'rejected')]
  if not (all(map(is_messages, both)) or all(isinstance(value, str | bytes) for value in both)):
    return ()
  return 'chosen', 'rejected', *prompts


def _system_fields(record: Mapping[str, Any]) -> list[str]:
  return [name for name in SYSTEM if record.get(name)]


def is_messages(value: Any) -> bool:
  return isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value)


def to_conversation(record: Mapping[str, Any], fields: tuple[str, ...], name: str, where: str,
                    config: SourceConfig) -> Document | BadRecord:
  """The document of the conversation in `turn_fields` of a record, or a BadRecord with the reason."""
  try:
    system = join_text(config).join(_text(record[key], f'field {key!r}') for key in _system_fields(record))
    if fields[:2] == ('chosen', 'rejected'):
      messages, rejected = (_with_system(turns, system) for turns in _pair(record, fields, join_text(config)))
    else:
      turns = tuple(turn for field in fields for turn in messages_of(record[field], field))
      messages, rejected = _with_system(turns, system), None
    for turns in (messages, rejected or messages):
      if all(role != 'assistant' for role, _ in turns):
        raise ValueError(f'field {fields[0]!r} holds no turn of an assistant, so nothing of it can be learnt')
    if config.field is None:
      _check_left_over(record, fields, _contents((*messages, *(rejected or ()))))
    text = '\n\n'.join(content for _, content in (*messages, *(rejected or ())[shared(messages, rejected or ()):]))
    if (size := len(text.encode())) > config.max_record_bytes:
      raise ValueError(f'the conversation takes {size} bytes; config.data.max_record_bytes is '
                       f'{config.max_record_bytes}')
  except ValueError as e:
    return BadRecord(where, str(e))
  return Document(name, text, messages=messages, rejected=rejected)


def _with_system(turns: Turns, system: str) -> Turns:
  """The turns after the text of the fields of SYSTEM. Raises ValueError."""
  if not system or turns[0] == ('system', system):
    return turns
  if turns[0][0] in ('system', 'developer'):
    raise ValueError(f'field {SYSTEM[0]!r} and the first message, of the role {turns[0][0]!r}, differ; write one of '
                     'them')
  return ('system', system), *turns


def _check_left_over(record: Mapping[str, Any], fields: tuple[str, ...], contents: set[str]) -> None:
  """Raises ValueError if a text beside the conversation is none of its contents."""
  known = _ABOUT.union(SYSTEM, fields)
  names = [name for name in with_text(record, known) if not contents.issuperset(_texts(record[name]))]
  if names:
    raise ValueError(f'{", ".join(names)} would be left out: the conversation is in {" + ".join(fields)}; set '
                     f'config.data.field={"+".join(fields)} to leave out the rest, or write it into a message')


def _contents(turns: Turns) -> set[str]:
  return {content for _, content in turns}


def _texts(value: Any) -> Iterator[str]:
  """The texts in a value, but for the roles of messages."""
  if isinstance(value, str | bytes):
    yield value if isinstance(value, str) else value.decode(errors='replace')
  elif isinstance(value, Mapping):
    for key, item in value.items():
      yield from () if key in _ROLE else _texts(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _texts(item)


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
    system, question = document.asked or ('', document.text)
    return [(*((('system', system),) if system else ()), ('user', question), ('assistant', document.answer))]
  raise DataError(f'{document.name}: holds no conversation')


def shared(messages: Messages, others: Messages) -> int:
  """The number of equal turns at the beginning of two conversations."""
  return next((i for i, (a, b) in enumerate(zip(messages, others, strict=False)) if a != b),
              min(len(messages), len(others)))


def _message(turn: Mapping[str, Any], what: str) -> tuple[str, str]:
  role = turn.get('role', turn.get('from'))
  key = 'content' if 'content' in turn else 'value'
  content = turn.get(key)
  role = NAMES.get(role, role) if isinstance(role, str) else role
  if role not in ROLES:
    raise ValueError(f'{what} has the role {role!r}; known roles are {", ".join((*ROLES, *NAMES))}')
  if turn.get('tool_calls') or turn.get('function_call'):
    raise ValueError(f'{what} calls a tool in a field of its own, which is not supported; write the call into content')
  if names := with_text(turn, _ABOUT.union(_ROLE, [key])):
    raise ValueError(f'{what} holds text in {", ".join(names)}, which would be left out; write it into {key}, or '
                     'remove it')
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


def _pair(record: Mapping[str, Any], fields: tuple[str, ...], join: str) -> tuple[Turns, Turns]:
  """The chosen and the rejected conversation, each with the prompt. Raises ValueError."""
  prompts = [field for field in fields[2:] if record[field]]
  if len(prompts) == 1 and is_messages(record[prompts[0]]):
    before = messages_of(record[prompts[0]], prompts[0])
  else:
    prompt = join.join(_text(record[field], f'field {field!r}') for field in prompts)
    before = (('user', prompt),) if prompt else ()
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
    if turns[0][0] == 'assistant':
      return (*before, *turns)
    if not _contents(before) <= _contents(turns):
      raise ValueError(f'the prompt would be left out, as field {field!r} is a conversation without it; set '
                       'config.data.field=chosen+rejected to leave it out')
    return turns
  text = _text(value, f'field {field!r}')
  if before:
    return (*before, ('assistant', text))
  parts, marks = _HUMAN.split(text), _HUMAN.findall(text)
  if parts[0] or not marks:
    raise ValueError(f'field {field!r} holds text, and there is no field with the prompt: prompt, question, input or '
                     'instruction')
  return tuple(('user' if 'Human' in mark else 'assistant', part) for mark, part in zip(marks, parts[1:], strict=True))


def rendered(document: Document, template: Template) -> Document | BadRecord:
  """The document, or a BadRecord if the template refuses its conversation."""
  try:
    for messages in conversations_of(document):
      template.render(messages)
  except DataError as e:
    return BadRecord(document.name, str(e))
  return document
