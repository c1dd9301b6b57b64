"""llm_jax: a pure-function training stack for language models in JAX."""

from __future__ import annotations

from typing import Any

__version__ = '0.1.0'
__all__ = ['load', 'load_config', 'train']


def __getattr__(name: str) -> Any:
  """Imports load_config, train and load on first use, so that importing llm_jax does not start JAX."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from llm_jax.base import runtime
  runtime.prepare()
  from llm_jax import api
  return getattr(api, name)
