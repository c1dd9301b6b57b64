"""The fields of a config with their values, types and comments, for documentation.

A comment may refer to a mapping of names, such as a registry: 'one of optim.chain.SCHEDULES', a variable of a module of
llm_jax, or 'one of SCHEDULES', a variable of the module of the config. It is replaced by the names that are legal now.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llm_jax.base.builder import registries_of

# Fields of models' configs that name dtypes: of matrix operands, and those that models may have besides.
DTYPES = ('dtype', 'product_dtype', 'gradient_dtype', 'stream_dtype')


class Field(NamedTuple):
  path: str
  value: Any
  default: Any  # dataclasses.MISSING if it has none
  kind: str  # the type, as in the source
  comment: str


def fields_of(config: Any, path: str = '') -> Iterator[Field]:
  """All fields of a config's tree that are not sections, in the order of the source, with the settings of entries."""
  cls: type = type(config)
  comments = comments_of(cls)
  for field in dataclasses.fields(config):
    value, name = getattr(config, field.name), f'{path}{field.name}'
    if field.name == 'sections' and registries_of(cls):
      for entry, settings in value.items():
        yield from fields_of(settings, f'{path}{entry}.')
    elif dataclasses.is_dataclass(value):
      yield from fields_of(value, f'{name}.')
    elif isinstance(value, dict) and value:
      for entry, part in value.items():
        yield from fields_of(part, f'{name}.{entry}.')
    else:
      default = field.default_factory() if callable(field.default_factory) else field.default
      yield Field(name, value, default, type_name(typing.get_type_hints(cls)[field.name]),
                  comments.get(field.name, ''))


def type_name(hint: Any) -> str:
  """The type as one writes it: int, str | None, 'min' | 'max', tuple[float, ...]."""
  if typing.get_origin(hint) is typing.Literal:
    return ' | '.join(map(repr, typing.get_args(hint)))
  if isinstance(hint, type) and not typing.get_args(hint):
    return hint.__name__
  return re.sub(r'\w+\.(?=\w)', '', str(hint))


def comments_of(cls: type) -> dict[str, str]:
  """{field: the comment behind it, or above it, or that of a base class}; {} for classes made at run time."""
  comments: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    comments |= {field: with_names(text, base.__module__) for field, text in source_comments(base).items() if text}
  return comments


@functools.cache
def source_comments(cls: type) -> dict[str, str]:
  """The comments of the fields that the class itself declares, as in its source."""
  try:
    lines = inspect.getsource(cls).splitlines()
  except (OSError, TypeError):
    return {}
  lines = inspect.cleandoc('\n'.join(['#', *lines])).splitlines()[1:]
  comments = {}
  for node in typing.cast(ast.ClassDef, ast.parse('\n'.join(lines)).body[0]).body:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      assert node.end_lineno is not None
      behind = lines[node.end_lineno - 1][node.end_col_offset:].partition('#')[2].strip()
      above = lines[node.lineno - 2].strip()
      comments[node.target.id] = behind or (above.lstrip('# ') if above.startswith('#') else '')
  return comments


def with_names(comment: str, module: str) -> str:
  """The comment with the names of the mappings that it refers to, seen from a module."""
  def names(reference: re.Match[str]) -> str:
    where, _, variable = reference[0].rpartition('.')
    try:
      owner = importlib.import_module(f'llm_jax.{where}') if where else sys.modules.get(module)
    except ModuleNotFoundError:
      return reference[0]
    found = getattr(owner, variable, None)
    if not isinstance(found, Mapping):
      return reference[0]
    return ', '.join(found) or f'{variable} (empty until a plug-in adds one)'
  return re.sub(r'\b(?:[a-z_]+\.)*[A-Z][A-Z_]+\b', names, comment)
