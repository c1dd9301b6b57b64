"""The callback export: writes the model for transformers while a run trains, by config.checkpoint.export_every."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.multihost import say
from llm_jax.base.registry import register
from llm_jax.hf.export import write_model
from llm_jax.hf.family import choose_family
from llm_jax.hf.tokenizer import tokenizer_files


class ExportModel:
  """Writes exported/step_N in the run's folder at logged steps that are a multiple of `every`.

  `where` names the field that asks for it, for messages. Raises ConfigError before the first step if transformers has
  no such model, at the first logged step if it has no such tokenizer. A full disk is a warning.
  """

  def __init__(self, every: int = 1000, dtype: str = 'bfloat16', model: Any = None,
               where: Any = None):
    self._every, self._dtype, self._checked = every, dtype, False
    self._where = where or 'config.log.callbacks'
    if model is not None:
      known = {'vocab_size': model.vocab_size or 1, 'max_len': model.max_len or 1}
      self._named(lambda: choose_family(dataclasses.replace(model, **known)))

  def __call__(self, event: Any) -> None:
    session = event.session
    if not self._checked:
      config, tokenizer = session.config, session.program.data.tokenizer
      if tokenizer is not None:
        self._named(lambda: tokenizer_files(tokenizer, config.model.max_len))
      self._checked = True
    if event.step % self._every:
      return
    workdir = session.checkpoints.workdir
    folder = workdir / 'exported' / f'step_{event.step}'
    if folder.exists():
      return  # of the run before it was resumed
    try:
      say(f'{folder}: ' + write_model(event.read(), folder, source=workdir, dtype=self._dtype, where=self._where))
    except StorageError as e:
      print(f'WARNING: the model of step {event.step} is not exported: {e}', file=sys.stderr, flush=True)

  def _named(self, check: Callable[[], Any]) -> None:
    """Runs a check whose ConfigErrors shall name the field."""
    try:
      check()
    except ConfigError as e:
      raise ConfigError(f'{self._where}: {e}') from None


register(CALLBACKS, 'export', ExportModel)
