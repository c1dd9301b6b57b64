"""Validators, which check whether a text is well-formed: parsers by name, or a command of the user."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable

from llm_jax.base.builder import known_names
from llm_jax.base.errors import ConfigError
from llm_jax.base.registry import NoSettings, Registry, register

Validator = Callable[[str], bool]
SECONDS = 60  # time limit of a command for one text


class TimedOut(Exception):
  """A command has not ended within SECONDS, so that it has neither accepted nor refused the text."""


def python() -> Validator:
  return lambda text: _accepts(ast.parse, text)


def json_text() -> Validator:
  return lambda text: _accepts(json.loads, text)


# Functions that return a validator.
VALIDATORS = Registry('validator')
register(VALIDATORS, 'python', python, NoSettings)
register(VALIDATORS, 'json', json_text, NoSettings)
UNTRUSTED = '(a command in a config.json)'  # replaces a command that may not be executed, as its folder is not trusted


def make_validator(name: str) -> Validator | None:
  """One of VALIDATORS, or a command that reads the text from stdin and exits with 0 if it is valid; None for ''.

  Raises ConfigError for other names. The validator of a command raises TimedOut.
  """
  if not name:
    return None
  if name == UNTRUSTED:
    raise ConfigError("config.eval.validator: the run's config.json has a command, and commands from a run's folder "
                      "are not executed; pass the command again (--validator=... or --config.eval.validator=...), "
                      "disable it (--validator=), or, in commands on a run, allow it with --trust")
  if name in VALIDATORS:
    return VALIDATORS[name]()
  try:
    command = shlex.split(name)
  except ValueError as e:
    raise ConfigError(f'config.eval.validator: {name!r} is not a valid command line: {e}') from None
  if not command or shutil.which(command[0]) is None:
    raise ConfigError(f'config.eval.validator: {name!r} is not a command on this machine, nor a validator; '
                      f'{known_names(name, VALIDATORS)}')

  def accepts(text: str) -> bool:
    try:
      return subprocess.run(command, input=text.encode(), capture_output=True, timeout=SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
      raise TimedOut(f'{name} timed out after {SECONDS} s') from None
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
