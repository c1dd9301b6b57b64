"""Which fields of a record hold the text, the answer and the label; dotted paths reach into objects."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.base.notes import print_once
from llm_jax.data.sources.documents import SourceConfig, shown, unescaped

# Known pairs: (parts of the prompt in their order, answer). The first part and the answer identify the pair; the other
# parts, and a system prompt before them, are used by the records that have them.
PAIRS = ((('instruction', 'input'), 'output'), (('instruction', 'context'), 'response'), (('input',), 'output'),
         (('prompt',), 'completion'), (('question',), 'answer'), (('source',), 'target'))
SYSTEM = ('system', 'system_prompt')
# Text in fields of these names is about the record. Beside a known pair it is left out, which is printed.
ABOUT = {'category', 'categories', 'dataset', 'date', 'id', 'idx', 'index', 'lang', 'language', 'license', 'meta',
         'metadata', 'subset', 'tags', 'topic', 'type', 'url', 'uuid'}
_NO_TEXT = {int, float, bool, type(None)}  # types; a quick test


@dataclasses.dataclass(frozen=True)
class Fields:
  """The fields of a record that make up a document."""

  text: tuple[str, ...]  # joined
  optional: frozenset[str] = frozenset()  # those of `text` that a record may lack
  answer: str | None = None
  label: str | None = None
  found: bool = False  # whether the fields were found, and not named by the config: then no text may be left over

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys([*self.text, self.answer, self.label]) if name is not None)

  @functools.cached_property
  def required(self) -> tuple[str, ...]:
    return tuple(name for name in self.text if name not in self.optional)

  @functools.cached_property
  def known(self) -> frozenset[str]:
    """Names of fields that are used, or left out on purpose."""
    return frozenset(self.names) | ABOUT


def choose_fields(record: Mapping[str, Any], config: SourceConfig, where: str) -> Fields | None:
  """The fields that the config names, else those of a known pair, else the only one with text, or with ids.

  None: no field of this record fits; one of the next record may. Raises DataError when several fields fit.
  """
  if config.field is not None:
    parts = (config.field,) if has(record, config.field) else tuple(config.field.split('+'))
    return Fields(parts, frozenset(), config.answer_field, config.label_field)
  if config.answer_field is None and (pair := _known_pair(record, config)) is not None:
    return pair
  taken = (config.answer_field, config.label_field)
  for holds in (is_text, _is_ids):
    names = [name for name, value in record.items() if name not in taken and holds(value, config.join)]
    if len(names) == 1:
      return Fields((names[0],), frozenset(), config.answer_field, config.label_field, found=True)
    if names:
      raise DataError(f'{where}: several fields could be the text; set config.data.field to one of {", ".join(names)}, '
                      f'or join them with config.data.field={"+".join(names[:2])}')
  return None


def _known_pair(record: Mapping[str, Any], config: SourceConfig) -> Fields | None:
  for (first, *more), answer in PAIRS:
    if first in record and answer in record and config.label_field not in (first, answer):
      text = tuple(name for name in (*SYSTEM, first, *more) if name != config.label_field)
      fields = Fields(text, frozenset(text) - {first}, answer, config.label_field, found=True)
      joined, about = [name for name in text if name in record], sorted(ABOUT & record.keys() - set(fields.names))
      if len(joined) > 1 or about:
        print_once(f'data: {shown(config.path)}: prompt {" + ".join(joined)}, answer {answer}'
             + (f'; not used: {", ".join(about)}' if about else ''))
      return fields
  return None


def left_over(record: Mapping[str, Any], fields: Fields) -> str | None:
  """The message for text in fields beside those that were found."""
  if not fields.found or len(record) == 1 or not (names := with_text(record, fields.known)):
    return None
  used = [name for name in fields.text if name in record]
  setting = f'config.data.field={"+".join(used)}'
  pair = f' and config.data.answer_field={fields.answer}' if fields.answer else ''
  return (f'{", ".join(names)} would be left out: the text is {" + ".join(used)}'
          + (f', the answer {fields.answer}' if fields.answer else '')
          + f'; set {setting}{pair} to leave out the rest, or {setting}+{names[0]}{pair} to join it')


def with_text(record: Mapping[str, Any], known: Container[str]) -> list[str]:
  """The fields that hold text, but for the known ones."""
  return [name for name, value in record.items()
          if name not in known and type(value) not in _NO_TEXT and _holds_text(value)]


def has(record: Mapping[str, Any], path: str) -> bool:
  try:
    lookup(record, path)
  except KeyError:
    return False
  return True


def lookup(record: Mapping[str, Any], path: str) -> Any:
  """The value at a key, or at a dotted path into objects; of a list of objects, the list of their values there.

  Raises KeyError.
  """
  if path in record:
    return record[path]
  for head, rest in _cuts(path):
    value = record.get(head)
    if isinstance(value, Mapping):
      return lookup(value, rest)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
      return [lookup(item, rest) for item in value]
    if head in record and value is None:
      return None
  raise KeyError(path)


def missing(record: Mapping[str, Any], path: str) -> str:
  """The message for a path that the record lacks."""
  known = list(_paths(record))
  near = difflib.get_close_matches(path, known, 1)
  return f'field {path!r} is missing; the record has {names_of(record)}' + (
      f'; did you mean {near[0]!r}?' if near else '')


def names_of(record: Mapping[str, Any]) -> str:
  names = list(_paths(record))
  return ', '.join(names[:12]) + (' ...' if len(names) > 12 else '') if names else 'no fields'


def no_text(record: Mapping[str, Any]) -> str:
  """The message for a record in which no field can be the text."""
  return f'no field holds text or a list of token ids; the record has {names_of(record)}{of_lists(record)}'


def of_lists(record: Mapping[str, Any]) -> str:
  """The hint for a record with a list of texts."""
  lists = [name for name in _paths(record) if is_texts(lookup(record, name))]
  return f'; {lists[0]} holds a list of texts: set config.data.join to the text between them' if lists else ''


def is_text(value: Any, join: str | None) -> bool:
  return isinstance(value, str | bytes) or (join is not None and is_texts(value))


def is_texts(value: Any) -> bool:
  return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str | bytes) for item in value)


def join_text(config: SourceConfig) -> str:
  """The text between the parts of a prompt."""
  return '\n' if config.join is None else unescaped(config.join)


def _is_ids(value: Any, join: str | None) -> bool:
  if isinstance(value, np.ndarray):
    return value.ndim == 1 and value.dtype.kind in 'iu'
  return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


def _holds_text(value: Any) -> bool:
  if isinstance(value, str | bytes):
    return bool(value) and not value.isspace()
  if isinstance(value, dict):
    value = list(value.values())
  return isinstance(value, list | tuple) and any(map(_holds_text, value))


def _cuts(path: str) -> Iterator[tuple[str, str]]:
  """(before, after) each dot."""
  return ((path[:at], path[at + 1:]) for at, char in enumerate(path) if char == '.')


def _paths(record: Mapping[str, Any], before: str = '') -> Iterator[str]:
  for name, value in record.items():
    if isinstance(value, Mapping) and value and before.count('.') < 3:
      yield from _paths(value, f'{before}{name}.')
    else:
      yield f'{before}{name}'
