"""The teacher of a distillation: a trained run whose logits or hidden states the student learns to match."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from llm_jax.base.builder import Sections
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.config import Config
from llm_jax.data.open import Data
from llm_jax.infer.load import Loaded, load_run


def load_teacher(config: Config, data: Data, mesh: Mesh) -> Loaded | None:
  """The teacher's run, if the config has one. Raises UserErrors if it cannot be read or does not fit the data."""
  if 'distillation' not in config.loss.terms:
    return None
  settings, path = config.loss.sections['distillation'], 'config.loss.distillation.teacher'
  try:
    teacher = load_run(Path(settings.teacher).expanduser(), mesh, settings.checkpoint)
  except StorageError as e:
    raise ConfigError(str(e).replace('--workdir', path)) from None
  except ConfigError as e:
    raise ConfigError(str(e).replace('--checkpoint', 'config.loss.distillation.checkpoint')) from None
  ours, theirs = tokenizers_of(data), tokenizers_of(teacher)
  if ours != theirs or (config.model.vocab_size != teacher.config.model.vocab_size):
    with_encoder = ' (and encoder_tokenizer to its encoder_tokenizer.json)' if ours[1:] != theirs[1:] else ''
    raise ConfigError(f'{path}: {settings.teacher} was trained with another tokenizer or vocabulary; set '
                      f'config.data.tokenizer to its tokenizer.json{with_encoder}, and config.model.vocab_size to '
                      f'{teacher.config.model.vocab_size}')
  if missing := teacher.model.needs - ({'encoder_tokens'} if config.data.task_settings.encodes else set()):
    raise ConfigError(f'{path}: {settings.teacher} needs {", ".join(sorted(missing))}, which config.data.task='
                      f'{config.data.task} does not provide; set another teacher or task')
  if teacher.config.model.max_len < config.data.seq_len:
    raise ConfigError(f'{path}: {settings.teacher} reads rows of up to {teacher.config.model.max_len} tokens, but '
                      f'config.data.seq_len is {config.data.seq_len}; set it to {teacher.config.model.max_len} or less')
  return teacher


def with_teacher(config: Config, teacher: Loaded | None) -> Config:
  """The config with the teacher's hidden size and the step of its checkpoint filled in."""
  if teacher is None:
    return config
  learns = dataclasses.replace(config.loss.sections['distillation'], hidden_dim=teacher.config.model.embed_dim,
                               checkpoint=str(teacher.meta['step']))
  sections = Sections({**config.loss.sections, 'distillation': learns})
  return dataclasses.replace(config, loss=dataclasses.replace(config.loss, sections=sections))


def tokenizers_of(source: Data | Loaded) -> list[str | None]:
  """The tokenizer and the prompt tokenizer, as JSON."""
  return [None if t is None else t.to_json() for t in (source.tokenizer, source.prompt_tokenizer)]
