"""Callbacks by name: functions or objects that are called with each logged step of a training."""

from __future__ import annotations

import functools
from typing import Any

from llm_jax.base.registry import Registry, settings_from_signature


def adapt_callback(name: str, value: Any, settings: type | None) -> tuple[Any, type]:
  """Adapts a function (event, **settings), or a class with callable instances, to settings -> callback."""
  own = settings or settings_from_signature(value)
  if isinstance(value, type):
    return lambda section: value(**vars(section)), own
  return lambda section: functools.partial(value, **vars(section)), own


# CALLBACKS[name](settings) is called with a training.session.Event.
CALLBACKS = Registry('callback', adapt_callback)
