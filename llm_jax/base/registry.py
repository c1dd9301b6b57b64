"""Registries: the parts that a config can name. A plug-in adds one with register(MODELS, 'foo', Foo).

A config is checked against the registries when it is built, so parts must be registered before. The parts in
llm_jax/extras are listed in extras/table.py and imported when a config first names them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.base.errors import ConfigError

PLAIN = (bool, int, float, str, tuple)


_registries: list[Any] = []


class Entry(NamedTuple):
  value: Any  # what registry[name] returns
  settings: type  # a frozen dataclass: the config section with the entry's name
  origin: str  # the module that registered it
  listed: bool = True  # whether messages list it


class Registry(Mapping[str, Any]):
  """Parts of one kind by name. `adapt(name, value, settings)` returns (value, settings) as they are stored."""

  def __init__(self, kind: str, adapt: Callable[[str, Any, type | None], tuple[Any, type]] | None = None):
    self.kind = kind
    self._adapt = adapt or (lambda name, value, settings: (value, settings or settings_of(value)))
    self._entries: dict[str, Entry] = {}
    _registries.append(self)

  def __getitem__(self, name: str) -> Any:
    return self._find(name).value

  def __iter__(self) -> Iterator[str]:
    extras = self._extras()  # last, in the table's order, whichever are imported already
    own = [name for name, entry in self._entries.items() if name not in extras and entry.listed]
    return iter([*own, *extras])

  def __len__(self) -> int:
    return len(list(iter(self)))

  def __contains__(self, name: object) -> bool:
    return name in self._entries or name in self._extras()

  def __hash__(self) -> int:
    return id(self)

  def loaded(self) -> list[str]:
    """The names that messages list, without those of extras that have not been imported."""
    return [name for name, entry in self._entries.items() if entry.listed]

  def settings(self, name: str) -> type:
    """The class of the config section with the entry's name."""
    return self._find(name).settings

  def section(self, name: str, sections: Mapping[str, Any]) -> Any:
    """The entry's settings in the sections of a config; its defaults if they have none."""
    return sections[name] if name in sections else self.settings(name)()

  def name_of(self, value: Any) -> str:
    """The name of a registered value."""
    return next(name for name, entry in self._entries.items() if entry.value is value)

  def origin(self, name: str) -> str:
    """The module that registered the entry."""
    return self._find(name).origin

  def code(self, name: str) -> list[str]:
    """[sha256] of the file that registered the entry; [] for the package's own entries.

    It belongs in the key of what is cached, as a plug-in's file is edited between two runs.
    """
    path = getattr(sys.modules.get(self.origin(name)), '__file__', None)
    if path is None or self.origin(name).startswith('llm_jax.'):
      return []
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest()]

  def add(self, name: str, value: Any, settings: type | None, origin: str, listed: bool = True) -> None:
    """Adds an entry. Raises ConfigError for a name that another module has registered."""
    if not name.isidentifier():
      raise ConfigError(f'{self.kind} {name!r}: the name must be a Python identifier, as it becomes a config section')
    taken = self._entries.get(name)
    by = taken.origin if taken else self._extras().get(name, origin)
    if by != origin:
      raise ConfigError(f'{self.kind} {name!r} is already registered by {by}; choose another name')
    self._entries[name] = Entry(*self._adapt(name, value, settings), origin, listed)

  def _find(self, name: str) -> Entry:
    if name not in self._entries and name in self._extras():
      importlib.import_module(self._extras()[name])
    return self._entries[name]

  def _extras(self) -> dict[str, str]:
    table = _extras_table().get(self.kind, {})
    return {name: place if place.startswith('llm_jax.') else f'llm_jax.extras.{place}' for name, place in table.items()}


def register(registry: Registry, name: str, value: Any, settings: type | None = None, *, listed: bool = True) -> None:
  """Adds `value` to a registry under `name`; its settings become the config section with that name.

  `settings` is a frozen dataclass. Without one, the settings are the value's fields or parameters that have a plain
  default (bool, int, float, str, tuple). `listed` False keeps the name out of messages. Raises ConfigError
  for a name that is taken.
  """
  registry.add(name, value, settings, sys._getframe(1).f_globals['__name__'], listed)


def has_registered(origin: str) -> bool:
  """Whether the module of this name has registered anything."""
  return any(entry.origin == origin for registry in _registries for entry in registry._entries.values())


def settings_of(value: Any) -> type:
  """`value` itself if it is a frozen dataclass, else a dataclass made from its parameters with plain defaults."""
  return value if is_frozen(value) else settings_from_signature(value)


def is_frozen(value: Any) -> bool:
  """Whether it is a frozen dataclass."""
  return dataclasses.is_dataclass(value) and getattr(value, '__dataclass_params__').frozen  # noqa: B009


def settings_from_signature(value: Any, ignored: tuple[str, ...] = ()) -> type:
  """A frozen dataclass with a field for each parameter with a plain default, except the `ignored` ones."""
  target = value.func if hasattr(value, 'func') else value  # a functools.partial
  fixed = set(value.keywords) if hasattr(value, 'keywords') else set()
  try:
    hints = typing.get_type_hints(vars(target)['__init__'] if isinstance(target, type) else target)
  except (NameError, TypeError, AttributeError):
    hints = {}
  fields: list[Any] = []
  for name, parameter in inspect.signature(target).parameters.items():
    if name in ('parent', 'name', *ignored) or name in fixed:
      continue
    hint, default = hints.get(name), parameter.default
    if type(default) in PLAIN:
      kind: Any = hint if _is_plain(hint) else type(default)
      if kind is tuple:
        kind = types.GenericAlias(tuple, (type(default[0]) if default else str, ...))
      fields.append((name, kind, dataclasses.field(default=default)))
    elif default is None and _is_plain(hint):
      fields.append((name, hint, dataclasses.field(default=None)))
  return dataclasses.make_dataclass(f'{getattr(target, "__name__", "Part")}Settings', fields, frozen=True)


@dataclasses.dataclass(frozen=True)
class NoSettings:
  """The settings of an entry that has none."""


def bind_settings(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """Adapts a function (x, **settings), or a class with callable instances, to settings -> function of x."""
  bind = value if isinstance(value, type) else functools.partial(functools.partial, value)
  return lambda section: bind(**vars(section)), settings or settings_from_signature(value)


def factory_of(*ignored: str) -> Callable[[str, Any, type | None], tuple[Any, type]]:
  """Adapts Flax modules: their settings are the fields with plain defaults, but the `ignored` ones that callers set.

  The registry stores a function of the settings that returns the module's class with these filled in.
  """
  def adapt(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
    if settings is not None:
      return value, settings
    return lambda section: functools.partial(value, **vars(section)), settings_from_signature(value, ignored)

  return adapt


def _is_plain(hint: Any) -> bool:
  """Whether the strict builder can check values of this type."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (types.UnionType, typing.Union):
    return len(args) == 2 and type(None) in args and all(_is_plain(a) for a in args if a is not type(None))
  if origin is tuple:
    return len(args) == 2 and args[1] is Ellipsis and args[0] in PLAIN
  return hint in (bool, int, float, str) or origin is typing.Literal


def _extras_table() -> dict[str, dict[str, str]]:
  """{kind: {name: module below llm_jax.extras}}; empty where the package has no extras."""
  try:
    return importlib.import_module('llm_jax.extras.table').TABLE
  except ModuleNotFoundError:
    return {}
