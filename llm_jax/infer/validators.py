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

Validator = Callable[[str], bool]
SECONDS = 60  # that a command may take for one text


def python() -> Validator:
  return lambda text: _accepts(ast.parse, text)


def json_text() -> Validator:
  return lambda text: _accepts(json.loads, text)


def wgsl() -> Validator:
  """By tree-sitter's grammar; types and names are not checked."""
  try:
    import tree_sitter
    import tree_sitter_wgsl_bevy
  except ImportError:
    raise ConfigError("config.eval.validator: wgsl needs a parser: pip install 'llm_jax[wgsl]'") from None
  parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_wgsl_bevy.language()))

  def accepts(text: str) -> bool:
    root = parser.parse(text.encode()).root_node
    return root.child_count > 0 and not root.has_error

  return accepts


VALIDATORS: dict[str, Callable[[], Validator]] = {'python': python, 'json': json_text, 'wgsl': wgsl}


def make_validator(name: str) -> Validator | None:
  """One of VALIDATORS, or a command that reads the text and exits with 0 if it is valid; '': none.

  Raises ConfigError for what is neither.
  """
  if not name:
    return None
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
