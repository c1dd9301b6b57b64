"""What a config leaves open, from data and device, and what of it they do not allow: told before the first step."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.base.batch import Batch, Params
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.config import Config
from llm_jax.data.open import Data, task_of
from llm_jax.data.rows.examples import Examples
from llm_jax.infer.load import encode_prompts
from llm_jax.infer.validators import make_validator
from llm_jax.losses.config import make_objective
from llm_jax.training.state import eval_step


def complete(config: Config, data: Data) -> Config:
  """The config with what data and device decide: vocabulary, longest rows, dtype. Raises ConfigError."""
  if getattr(config.model, 'einsum', '') == 'packed':
    raise ConfigError('config.model.einsum: packed is of exported models, for reading only; bitnet is trained')
  needed = data.vocab_size + task_of(config.data).num_sentinels
  vocab_size = config.model.vocab_size or needed
  if vocab_size < needed:
    raise ConfigError(f'config.model.vocab_size: {vocab_size} is less than the {needed} tokens of the data; '
                      f'leave it None or set it to {needed} or more')
  known = {'max_len': config.data.seq_len, 'encoder_len': config.data.encoder_len,
           'start_id': data.eos_id if data.bos_id is None else data.bos_id}
  if data.encoder_tokenizer is not None:
    known['encoder_vocab_size'] = len(data.encoder_tokenizer.token_bytes)
  left_open = {name: value for name, value in known.items() if getattr(config.model, name, 0) is None}
  config = dataclasses.replace(config, model=dataclasses.replace(
      config.model, vocab_size=vocab_size, dtype=config.model.operand_dtype.name, **left_open))
  check_encoder_vocabulary(config, data, needed)
  labels, classes = all_labels(data) if 'labels' in make_objective(config.loss).reads else (None, ())
  try:
    config = dataclasses.replace(config, loss=config.loss.fitted(labels, classes))
  except ValueError as e:
    raise ConfigError(f'config.loss.{e}') from None
  check_classes(config, data)
  make_validator(config.eval.validator)  # better told now than at the first evaluation
  if config.eval.answers and (data.tokenizer is None or not config.answers):
    raise ConfigError(f'config.eval.answers: {config.eval.answers} needs a task with answers, and a tokenizer; the '
                      f'task is {config.data.task}')
  if data.prompt_tokenizer is not None and config.eval.sample_tokens and config.writes:
    encode_prompts(config, data.prompt_tokenizer)
  return config


def check_encoder_vocabulary(config: Config, data: Data, vocab_size: int) -> None:
  """Raises ConfigError where the model has no table, or too small a one, for what its encoder reads."""
  size, other = getattr(config.model, 'encoder_vocab_size', None), data.encoder_tokenizer
  if other is not None and size is None:
    raise ConfigError(f'config.data.encoder_tokenizer: {config.data.encoder_tokenizer} needs a model whose encoder has '
                      f'a table of its own (encoder_vocab_size), and {config.model.name} has none; leave it None')
  needed = vocab_size if other is None else len(other.token_bytes)
  if size is not None and size < needed:
    raise ConfigError(f'config.model.encoder_vocab_size: {size} is less than the {needed} tokens that the encoder may '
                      f'read; leave it None or set it to {needed} or more')


def all_labels(data: Data) -> tuple[np.ndarray | None, tuple[str, ...]]:
  """(labels, their names if they have any) of the training part.

  Raises DataError where sources name their classes differently.
  """
  stores = [store for store in data.splits.get('train', {}).values() if store.labels is not None]
  if len({store.classes for store in stores}) > 1:
    raise DataError('config.data.sources: their labels are not the same classes: '
                    + '; '.join(f'{name} has {", ".join(store.classes)}' for name, store in data.train.items()))
  if not stores:
    return None, ()
  if len(widths := {np.asarray(store.labels).shape[1:] for store in stores}) > 1:
    raise DataError(f'config.data.sources: their documents have different numbers of labels: {sorted(widths)}')
  return np.concatenate([np.asarray(store.labels) for store in stores]), stores[0].classes


def check_classes(config: Config, data: Data) -> None:
  """Raises DataError for a class that is not among those that are learnt."""
  num_classes = config.loss.classification.num_classes
  if 'classification' not in config.loss.terms or num_classes is None:
    return
  for split, stores in data.splits.items():
    for store in stores.values():
      if store.labels is not None and (most := int(np.max(store.labels, initial=0))) >= num_classes:
        raise DataError(f'config.data.label_field: the {split} part has class {most}, and those that are learnt are 0 '
                        f'to {num_classes - 1}; set config.loss.classification.num_classes to {most + 1} or more')


def check_features(config: Config, model: Any, examples: Examples) -> None:
  """Raises ConfigError when the task gives what neither model nor losses look at, or not what they need."""
  given = examples.make(0, np.random.default_rng(0)).keys()
  objective = make_objective(config.loss)
  terms = ', '.join(config.loss.terms)
  for who, needs in ((f'the model {config.model.name}', model.needs), (f'config.loss.terms={terms}', objective.reads)):
    if missing := needs - given:
      raise ConfigError(f'config.data.task: {config.data.task} does not give {", ".join(sorted(missing))}, which {who} '
                        'needs')
  if 'encoder_tokens' in model.reads and objective.num_readouts > 1:
    raise ConfigError(f'config.model.name: {config.model.name} reads both texts of a row at once, and '
                      f'config.loss.terms={terms} compares what is read of each; take another one: decoder, byte_patch')
  if ignored := given - model.reads - objective.reads:
    hint = '; set config.data.mask_documents=False' if ignored <= {'segment_ids', 'positions'} else ''
    raise ConfigError(f'config.data.task: {config.data.task} gives {", ".join(sorted(ignored))}, which the model '
                      f'{config.model.name} does not read, nor does config.loss.terms={terms}{hint}')


def check_results(config: Config, data: Data, model: Any, params: Params, batch: Batch, asked: tuple[str, ...]) -> None:
  """Raises ConfigError for a metric that no evaluation will give; params and batch are abstract."""
  if config.eval.answers:  # whose metrics the validator decides
    return
  judge, size = make_objective(config.loss).judge(), jnp.zeros(model.cfg.vocab_size, jnp.int32)
  sums = jax.eval_shape(partial(eval_step, model=model, token_bytes=size, objective=judge), params, batch)
  results = judge.summarize({name: np.ones(x.shape) for name, x in sums.items()})
  known = {f'val/{name}' for name in results}
  known |= {f'val/{name}/{key}' for name in data.val if len(data.val) > 1 for key in ('loss', 'bits_per_byte')}
  if missing := sorted(set(asked) - known):
    raise ConfigError(f'{", ".join(missing)} is no result of an evaluation of this run (config.eval.monitor, '
                      f'capabilities and goal, config.optim); there are: {", ".join(sorted(known))}')
