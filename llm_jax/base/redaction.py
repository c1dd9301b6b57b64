"""Keeps passwords and tokens out of files and messages: they are replaced by REDACTED, and asked for again when needed.

Secret are the user, password and query of a URL, and values whose name says so, such as password or api_key.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from llm_jax.base.errors import ConfigError

REDACTED = 'REDACTED'
VARIABLE = 'LLM_JAX_URLS'  # an environment variable with whole URLs, separated by spaces
_NAME = re.compile(r'(?i)^(.*[._-])?(password|passwd|passphrase|secret|credentials?|'
                   r'(api|access|secret|private)[_-]?key|(auth|access|api|hf|bearer|refresh)[_-]?token)$|^(token|key|auth|authorization)$')
_USER = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*://)([^/?#]*)@')
# In other URLs than those of HTTP, a question mark without = is a wildcard.
_QUERY = re.compile(r'(?s)(https?://[^?]*\?|[A-Za-z][A-Za-z0-9+.-]*://[^?]*\?(?=[^?]*=))(.*)')
_IN_TEXT = re.compile(r"""[A-Za-z][A-Za-z0-9+.-]*://[^\s'"<>]+""")
_known: set[str] = set()  # secrets seen in this process, which are removed from any text


def is_secret_name(name: str) -> bool:
  """Whether a value of this name is secret: api_key, but not eos_token or tokenizer."""
  return _NAME.match(name.rpartition('.')[2]) is not None


def hide(value: str) -> str:
  """A value with REDACTED in place of user, password and query, if it is or contains a URL with them."""
  if '://' not in value:
    return value
  for found in _USER.findall(value):
    _remember(found[1], *found[1].split(':'))
  if found := _QUERY.search(value):
    _remember(found[2], *(part.partition('=')[2] for part in re.split('[&;#]', found[2])))
  return _QUERY.sub(rf'\g<1>{REDACTED}', _USER.sub(rf'\g<1>{REDACTED}@', value))


def public(values: Any, name: str = '') -> Any:
  """Nested dicts and lists without their secrets, to be written to a file or shown."""
  if isinstance(values, Mapping):
    return {key: public(value, key) for key, value in values.items()}
  if isinstance(values, list | tuple):
    return type(values)(public(value, name) for value in values)
  if not isinstance(values, str):
    return values
  if values and is_secret_name(name):
    _remember(values)
    return REDACTED
  before, equals, after = values.partition('=')  # such as the entries of stages.NAME.set
  if equals and after and re.fullmatch(r'[\w.-]+', before) and is_secret_name(before.lstrip('-')):
    _remember(after)
    return f'{before}={REDACTED}'
  return hide(values)


def public_command(words: Sequence[str]) -> list[str]:
  """The words of a command line without secrets."""
  return [public(word, before.lstrip('-') if before.startswith('--') and '=' not in before else '')
          for before, word in zip(['', *words], words, strict=False)]


def redact(text: str) -> str:
  """A message without the URLs' secrets, and without all secrets that this process has seen."""
  text = _IN_TEXT.sub(lambda found: hide(found[0]), text)
  for secret in sorted(_known, key=len, reverse=True):
    text = text.replace(secret, REDACTED)
  return text


def whole_url(url: str) -> str:
  """The URL with its secrets, which are in the environment if they are REDACTED. Raises ConfigError."""
  if REDACTED not in url:
    return url
  found = next((given for given in os.environ.get(VARIABLE, '').split() if hide(given) == url), None)
  if found is None:
    raise ConfigError(f'{url}: user, password and query of a URL are not stored with a run; set the environment '
                      f"variable {VARIABLE} to the whole URL (several: with spaces between), or give it again, as in "
                      "--config.data.path='https://USER:PASSWORD@...'")
  return found


def check_given(values: Any, path: str = 'config') -> None:
  """Raises ConfigError for a secret by name that was not stored with the run from whose config `values` come."""
  if isinstance(values, Mapping):
    for name, value in values.items():
      check_given(value, f'{path}.{name}')
  elif values == REDACTED:
    raise ConfigError(f'{path}: is secret, so it is not stored with a run; give it again: --{path}=VALUE')


def print_traceback(*error: Any) -> None:
  """An excepthook: prints the traceback without secrets."""
  print(redact(''.join(traceback.format_exception(*error))), end='', file=sys.stderr, flush=True)


def _remember(*secrets: str) -> None:
  # Shorter texts, such as an anonymous user or download=true, occur in any message.
  _known.update(text for secret in secrets for text in (secret, unquote(secret)) if len(text) > 5 and text != REDACTED)
