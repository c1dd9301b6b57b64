"""The callback export: writes the model for transformers while a run trains, by config.checkpoint.export_every."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.errors import StorageError
from llm_jax.base.multihost import say
from llm_jax.base.registry import register
from llm_jax.hf.export import write_model
from llm_jax.hf.family import choose_family
from llm_jax.hf.tokenizer import tokenizer_files


class ExportModel:
  """Writes exported/step_N in the run's folder at logged steps that are a multiple of `every`.

  Raises ConfigError before the first step if transformers has no such model, at the first logged step if it has no such
  tokenizer. A full disk is a warning.
  """

  def __init__(self, every: int = 1000, dtype: str = 'bfloat16', model: Any = None):
    self._every, self._dtype, self._checked = every, dtype, False
    if model is not None:
      known = {'vocab_size': model.vocab_size or 1, 'max_len': model.max_len or 1}
      choose_family(dataclasses.replace(model, **known))

  def __call__(self, event: Any) -> None:
    session = event.session
    if not self._checked:
      config, tokenizer = session.config, session.program.data.tokenizer
      if tokenizer is not None:
        tokenizer_files(tokenizer, config.model.max_len)
      self._checked = True
    if event.step % self._every:
      return
    workdir = session.checkpoints.workdir
    folder = workdir / 'exported' / f'step_{event.step}'
    if folder.exists():
      return  # of the run before it was resumed
    try:
      say(f'{folder}: ' + write_model(event.read(), folder, source=workdir, dtype=self._dtype))
    except StorageError as e:
      print(f'WARNING: the model of step {event.step} is not exported: {e}', file=sys.stderr, flush=True)


register(CALLBACKS, 'export', ExportModel)
