"""llm_jax: a pure-function training stack for language models in JAX."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from llm_jax.api import load, load_config, train

__version__ = '0.1.0'
__all__ = ['load', 'load_config', 'train']

if sys.version_info < (3, 11):  # noqa: UP036
  message = 'llm_jax needs Python 3.11 or later; this is ' + sys.version.split()[0] + ' (' + sys.executable + ')'
  raise SystemExit('error: ' + message) if sys.argv[:1] == ['-m'] else ImportError(message)


def __getattr__(name: str) -> Any:
  """Imports load_config, train and load on first use, so that importing llm_jax does not start JAX."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from llm_jax.base import runtime
  runtime.prepare()
  from llm_jax import api
  return getattr(api, name)


def __dir__() -> list[str]:
  return ['__version__', *__all__]
