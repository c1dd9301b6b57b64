"""Requests of OpenAI's completions API: the JSON body is checked field by field and becomes a Request."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from typing import Any

from llm_jax.data.chat.records import is_messages, messages_of
from llm_jax.data.chat.template import Messages

MAX_SAMPLES = 16  # n; each new number of samples compiles once
MAX_TEXTS = 128  # of all prompts of a request together
GREEDY_BELOW = 1e-5  # lower temperatures would divide logits to infinity


class ApiError(Exception):
  """An answer with a status other than 200, in the form of OpenAI's errors."""

  def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
    super().__init__(message)
    self.status = status
    kind = 'invalid_request_error' if status < 500 else 'server_error'
    self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


@dataclasses.dataclass(frozen=True)
class Request:
  prompts: tuple[str | Messages, ...]
  max_tokens: int
  temperature: float
  top_p: float
  top_k: int
  n: int
  seed: int | None  # None: other texts for each request
  stop: tuple[str, ...]
  stream: bool
  include_usage: bool
  echo: bool


Check = Callable[[str, Any], Any]  # (name, value) -> the value to use; raises ApiError


def refuse(name: str, value: Any, legal: str) -> ApiError:
  shown = json.dumps(value)
  return ApiError(f'{name}: must be {legal}; got {shown if len(shown) <= 100 else shown[:100] + "..."}', name)


def integer(least: int | None = None, most: int | None = None) -> Check:
  span = '' if least is None else f' of at least {least}' if most is None else f' from {least} to {most}'

  def check(name: str, value: Any) -> int:
    if type(value) is not int or not (least is None or least <= value) or not (most is None or value <= most):
      raise refuse(name, value, f'an integer{span}')
    return value
  return check


def real(legal: str, accept: Callable[[float], bool]) -> Check:
  def check(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300 or not math.isfinite(value) or not accept(value):
      raise refuse(name, value, legal)
    return float(value)
  return check


def boolean(name: str, value: Any) -> bool:
  if type(value) is not bool:
    raise refuse(name, value, 'true or false')
  return value


def stop_strings(name: str, value: Any) -> tuple[str, ...]:
  found = [value] if isinstance(value, str) else value
  if not isinstance(found, list) or len(found) > 4 or not all(isinstance(text, str) and text for text in found):
    raise refuse(name, value, 'a string or a list of up to 4 strings, none of them empty')
  return tuple(found)


def prompts(name: str, value: Any) -> tuple[str, ...]:
  found = [value] if isinstance(value, str) else value
  if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
    raise refuse(name, value, 'a string or a list of strings (token ids are not supported)')
  return tuple(found)


def only_user_message(name: str, value: Any) -> tuple[str, ...]:
  """The one prompt of a chat, as a model that learned answers has seen neither instructions nor earlier messages."""
  legal = 'a list with one message, {"role": "user", "content": TEXT}, as this model learned answers to single prompts'
  if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict) or value[0].get('role') != 'user':
    raise refuse(name, value, legal)
  content = value[0].get('content')
  parts = [{'type': 'text', 'text': content}] if isinstance(content, str) else content
  if not isinstance(parts, list) or not all(
      isinstance(part, dict) and part.get('type') == 'text' and isinstance(part.get('text'), str) for part in parts):
    raise refuse(name, value, legal)
  return (''.join(part['text'] for part in parts),)


def messages(name: str, value: Any) -> tuple[Messages, ...]:
  """The conversation that the assistant is to go on with, as one prompt."""
  if not is_messages(value) or not value:
    raise refuse(name, value, 'a list of messages such as {"role": "user", "content": TEXT}')
  try:
    turns = messages_of(value, name)
  except ValueError as e:
    raise ApiError(f'{name}: {e}', name) from None
  if turns[-1][0] == 'assistant':
    raise ApiError(f'{name}: the last one must not be the assistant\'s', name)
  return (turns,)


def include_usage(name: str, value: Any) -> bool:
  if not isinstance(value, dict) or not set(value) <= {'include_usage', 'include_obfuscation'}:
    raise refuse(name, value, 'an object such as {"include_usage": true}')
  return boolean(f'{name}.include_usage', value.get('include_usage', False))


def neutral(*values: str) -> Check:
  """For a parameter that is not supported: its values without effect, as JSON."""
  def check(name: str, value: Any) -> None:
    if json.dumps(value) not in values:
      raise ApiError(f'{name} is not supported by this server; leave it out', name)
  return check


# Field: (check, default). Null counts as absent.
COMMON: dict[str, tuple[Check, Any]] = {
    'temperature': (real('a finite number of at least 0', lambda x: x >= 0), 1.0),
    'top_p': (real('a number in (0, 1]', lambda x: 0 < x <= 1), 1.0),
    'top_k': (integer(0), 0),  # beyond OpenAI's parameters
    'n': (integer(1, MAX_SAMPLES), 1),
    'seed': (integer(), None),
    'stop': (stop_strings, ()),
    'stream': (boolean, False),
    'stream_options': (include_usage, False),
    'presence_penalty': (neutral('0', '0.0'), None),
    'frequency_penalty': (neutral('0', '0.0'), None),
    'logit_bias': (neutral('{}'), None),
    'user': (lambda name, value: value, None),  # ignored
}
COMPLETION = COMMON | {
    'prompt': (prompts, ('',)),  # '': a new document
    'max_tokens': (integer(1), 16),
    'echo': (boolean, False),
    'logprobs': (neutral(), None),
    'best_of': (neutral('1'), None),
    'suffix': (neutral('""'), None),
}
CHAT = COMMON | {
    'messages': (only_user_message, None),
    'max_tokens': (integer(1), None),
    'max_completion_tokens': (integer(1), None),
    'logprobs': (neutral('false'), None),
    'top_logprobs': (neutral(), None),
    'response_format': (neutral('{"type": "text"}'), None),
    'tools': (neutral('[]'), None),
    'tool_choice': (neutral('"none"'), None),
}
CONVERSATION = CHAT | {'messages': (messages, None)}  # for a model with a chat template


def parse(body: bytes, fields: dict[str, tuple[Check, Any]], model: str, max_len: int) -> Request:
  """The request in a JSON body. Raises ApiError for the first field that is unknown, malformed or unsupported."""
  values = read_json(body)
  name = values.pop('model', None)
  if name not in (None, model):
    raise ApiError(f'model: must be {model!r}, the only one that is served; got {name!r}', 'model', status=404,
                   code='model_not_found')
  for name in values:
    if name not in fields:
      near = difflib.get_close_matches(name, fields, 1)
      raise ApiError(f'unknown parameter {name!r}; ' + (
          f'did you mean {near[0]!r}?' if near else f'known: model, {", ".join(fields)}'), name)
  read = {name: default if values.get(name) is None else check(name, values[name])
          for name, (check, default) in fields.items()}
  if 'messages' in fields and read['messages'] is None:
    raise ApiError('messages: is missing', 'messages')
  asked = read.get('messages') or read['prompt']
  if len(asked) * read['n'] > MAX_TEXTS:
    raise ApiError(f'prompt: {len(asked)} prompts with n={read["n"]} are more than {MAX_TEXTS} texts; send several '
                   'requests', 'prompt')
  return Request(
      prompts=asked, max_tokens=min(read.get('max_completion_tokens') or read['max_tokens'] or max_len, max_len),
      temperature=read['temperature'] if read['temperature'] >= GREEDY_BELOW else 0.0, top_p=read['top_p'],
      top_k=read['top_k'], n=read['n'], seed=None if read['seed'] is None else read['seed'] % (1 << 32),
      stop=read['stop'], stream=read['stream'], include_usage=read['stream_options'], echo=read.get('echo', False))


def read_json(body: bytes) -> dict[str, Any]:
  def constant(name: str) -> None:
    raise ValueError(f'{name} is not a JSON value')
  try:
    values = json.loads(body, parse_constant=constant)
  except (ValueError, RecursionError) as e:
    raise ApiError(f'the body is not JSON: {e}') from None
  if not isinstance(values, dict):
    raise ApiError('the body must be a JSON object, such as {"prompt": "def "}')
  return values
