"""Is a text well-formed? By a parser that is named here, or by a command of the user's."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable

from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, Registry, register

Validator = Callable[[str], bool]
SECONDS = 60  # that a command may take for one text


def python() -> Validator:
  return lambda text: _accepts(ast.parse, text)


def json_text() -> Validator:
  return lambda text: _accepts(json.loads, text)


# Functions that return a validator.
VALIDATORS = Registry('validator')
register(VALIDATORS, 'python', python, NoSettings)
register(VALIDATORS, 'json', json_text, NoSettings)
UNTRUSTED = '(a command in a config.json)'  # which is never executed, unless the folder is trusted


def make_validator(name: str) -> Validator | None:
  """One of VALIDATORS, or a command that reads the text and exits with 0 if it is valid; '': none.

  Raises ConfigError for what is neither.
  """
  if not name:
    return None
  if name == UNTRUSTED:
    raise ConfigError("config.eval.validator: the run's config.json names a command, and commands from a run's folder "
                      "are not executed; name it again (--validator=... or --config.eval.validator=...), leave it out "
                      "(--validator=), or run the folder's with --trust")
  if name in VALIDATORS:
    return VALIDATORS[name]()
  try:
    command = shlex.split(name)
  except ValueError as e:
    raise ConfigError(f'config.eval.validator: {name!r} is no command: {e}') from None
  if not command or shutil.which(command[0]) is None:
    raise ConfigError(f'config.eval.validator: {name!r} is neither a command here nor one of {", ".join(VALIDATORS)}')

  def accepts(text: str) -> bool:
    try:
      return subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
      return False
    except OSError as e:
      raise ConfigError(f'config.eval.validator: {command[0]} cannot be run: {e.strerror}') from None

  return accepts


def _accepts(parse: Callable[[str], object], text: str) -> bool:
  try:
    with warnings.catch_warnings(action='ignore'):  # such as an invalid escape in a string
      parse(text)
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return False
  return True
