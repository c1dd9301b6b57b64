"""Chat templates: the text of a conversation by a Jinja template, with the spans of it that an assistant wrote.

A template may mark what the assistant writes by {% generation %} ... {% endgeneration %}. For one that does not, the
spans follow from prefixes: the conversation up to a turn, with the prompt for an answer, must be a prefix of the
conversation up to and with that turn. Templates are data from elsewhere and run in Jinja's sandbox alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_jax.base.errors import ConfigError, DataError

Messages = Sequence[tuple[str, str]]  # (role, content) of each turn
Span = tuple[int, int]

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
# Contents hold no character from PRIVATE on: the first two mark what an assistant writes, the others stand for
# spellings of special tokens in contents.
PRIVATE = 0x100000
_OPEN, _CLOSE, _FIRST_SPELLING = chr(PRIVATE), chr(PRIVATE + 1), PRIVATE + 16
FOLDER = Path(__file__).parent / 'templates'
_TODAY = datetime(2024, 7, 26)  # for templates that write the date, as ids must not change from day to day


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template, and the special tokens that it writes."""

  name: str  # how the config names it, for messages
  source: str
  special_tokens: tuple[str, ...] = ()
  bos_token: str | None = None  # None: the tokenizer's
  eos_token: str | None = None

  @property
  def identity(self) -> list[Any]:
    """Everything that determines what it writes."""
    return [self.source, list(self.special_tokens), self.bos_token, self.eos_token]

  @functools.cached_property
  def compiled(self) -> Any:
    """The Jinja template. Raises ConfigError."""
    return _compile(self.source, self.name)

  @functools.cached_property
  def _spelling(self) -> re.Pattern[str]:
    return re.compile('|'.join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))) or r'(?!)')

  def render(self, messages: Messages) -> tuple[str, list[Span]]:
    """(the text, the spans that the assistant wrote); see `restore`. Raises DataError, ConfigError."""
    safe = self._safe(messages)
    text = self._write(safe)
    if _OPEN in text:
      return _without_marks(text)
    spans = []
    for i, (role, _) in enumerate(safe):
      if role == 'assistant':
        head, body = self._write(safe[:i], prompt=True), self._write(safe[:i + 1])
        if not (body.startswith(head) and text.startswith(body)):
          raise ConfigError(
              f'the chat template {self.name} writes a turn in another way once other turns follow it, and has no '
              '{% generation %} that marks what the assistant writes, so what is to be learnt is unknown; set the '
              f'template to one of {", ".join(path.stem for path in sorted(FOLDER.iterdir()))}, or to a file with '
              '{% generation %} ... {% endgeneration %} around the assistant\'s text')
        spans.append((len(head), len(body)))
    return text, spans

  def prompt(self, messages: Messages) -> str:
    """The text after which the model writes the next turn of the assistant; see `restore`."""
    return _without_marks(self._write(self._safe(messages), prompt=True))[0]

  def restore(self, text: str) -> str:
    """A part of a rendered text without special tokens, with the spellings of special tokens that contents hold."""
    if text.isascii():
      return text
    return re.sub(f'[{chr(_FIRST_SPELLING)}-\U0010fffd]',
                  lambda match: self.special_tokens[ord(match[0]) - _FIRST_SPELLING], text)

  def plain_text(self, messages: Messages) -> str:
    """The text without special tokens, to which tokenizers are fitted."""
    return self.restore(self._spelling.sub('', self.render(messages)[0]))

  def _safe(self, messages: Messages) -> list[tuple[str, str]]:
    """The messages with private characters instead of spellings of special tokens."""
    def hide(match: re.Match[str]) -> str:
      return chr(_FIRST_SPELLING + self.special_tokens.index(match[0]))
    return [(role, self._spelling.sub(hide, content)) for role, content in messages]

  def _write(self, messages: Messages, prompt: bool = False) -> str:
    template = self.compiled
    import jinja2  # which `compiled` has found
    settings: dict[str, Any] = {'enable_thinking': False} if prompt else {}
    try:
      return template.render(
          messages=[{'role': role, 'content': content} for role, content in messages], add_generation_prompt=prompt,
          bos_token=self.bos_token or '', eos_token=self.eos_token or '', **settings)
    except jinja2.TemplateError as e:
      raise DataError(f'the chat template {self.name} refuses the conversation: {e}') from None
    except Exception as e:  # any error of the template's own expressions
      raise DataError(f'the chat template {self.name} fails: {type(e).__name__}: {e}') from None


def _without_marks(text: str) -> tuple[str, list[Span]]:
  """The text without the marks of {% generation %}, and the spans that they enclosed."""
  parts, spans, length, begin = [], [], 0, 0
  for part in re.split(f'([{_OPEN}{_CLOSE}])', text):
    if part == _OPEN:
      begin = length
    elif part == _CLOSE:
      spans.append((begin, length))
    else:
      parts.append(part)
      length += len(part)
  return ''.join(parts), spans


@functools.cache
def _compile(source: str, name: str) -> Any:
  try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
  except ImportError:
    raise ConfigError('chat templates need the package jinja2: pip install jinja2') from None

  class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: encloses what is written inside in marks."""

    tags = {'generation'}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method('_enclose'), [], [], body).set_lineno(line)

    def _enclose(self, caller: Any) -> str:
      return f'{_OPEN}{caller()}{_CLOSE}'

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
             sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  environment.filters['tojson'] = tojson
  environment.globals |= {'raise_exception': raise_exception, 'strftime_now': _TODAY.strftime}
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as e:
    raise ConfigError(f'the chat template {name} is not a Jinja template: line {e.lineno}: {e.message}') from None
