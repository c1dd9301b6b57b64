"""Fills in config values that depend on data and device, and rejects combinations that cannot train."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.base.batch import Batch, Params
from llm_jax.base.builder import Sections
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.fields import DTYPES
from llm_jax.base.multihost import gather, say
from llm_jax.config import Config, replace
from llm_jax.data import pipeline
from llm_jax.data.open import Data
from llm_jax.infer.answers import answer_metrics
from llm_jax.infer.text import encode_prompts
from llm_jax.infer.validators import make_validator
from llm_jax.losses.objective import Objective
from llm_jax.losses.term import Constants
from llm_jax.models.blocks import activation_dtype
from llm_jax.models.protocol import LanguageModel, too_few_logits
from llm_jax.training.state import eval_step


def resolve(config: Config, data: Data) -> Config:
  """The config with values filled in from data and device: vocabulary, lengths, dtype, classes. Raises ConfigError."""
  if getattr(config.model, 'einsum', '') == 'packed':
    raise ConfigError('config.model.einsum: packed is inference-only (exported models); train with einsum=bitnet')
  needed = data.vocab_size + config.data.task_settings.num_sentinels
  vocab_size = config.model.vocab_size or needed
  if vocab_size < needed:
    raise ConfigError(config.model.too_small(needed))
  known: dict[str, Any] = {'max_len': config.data.seq_len, 'encoder_len': config.data.encoder_len,
                           'start_id': data.eos_id if data.bos_id is None else data.bos_id}
  if data.encoder_tokenizer is not None:
    known['encoder_vocab_size'] = len(data.encoder_tokenizer.token_bytes)
  unset = {name: value for name, value in known.items() if getattr(config.model, name, 0) is None}
  unset |= dtypes_of(config.model)
  if len(set(gather(str(unset)))) > 1:
    raise ConfigError('config.model.dtype: auto means different dtypes on these machines; set bfloat16 or float32')
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size, **unset))
  check_encoder_vocabulary(config, data, needed)
  config = with_labels(config, data)
  check_generation(config, data)
  return with_num_steps(config, data)


def dtypes_of(model: Any) -> dict[str, str]:
  """The dtypes that the fields of a model's config mean on these devices."""
  operands = {'dtype': model.operand_dtype.name} if hasattr(model, 'dtype') else {}
  return operands | {name: activation_dtype(model, name).name for name in DTYPES[1:] if hasattr(model, name)}


def with_labels(config: Config, data: Data) -> Config:
  """The config with the classes, or means and standard deviations, of the training part's labels."""
  reads_labels = any('labels' in term.reads for term in config.loss.sections.values())
  labels, classes = all_labels(data) if reads_labels else (None, ())
  try:
    config = dataclasses.replace(config, loss=config.loss.with_labels(labels, classes))
  except ValueError as e:
    raise ConfigError(f'config.loss.{e}') from None
  check_labels(config, data)
  return config


def check_labels(config: Config, data: Data) -> None:
  """Raises DataError for labels that the loss terms do not support."""
  for term in config.loss.sections.values():
    for split, stores in data.splits.items():
      for store in stores.values():
        if store.labels is not None:
          term.check_labels(split, store.labels)


def with_constants(config: Config, data: Data, mesh: Mesh) -> tuple[Config, dict[str, Constants]]:
  """(the config, the frozen arrays of loss terms by name), with fields filled in from the arrays. Raises UserErrors."""
  found = {name: term.constants(config, data, mesh) for name, term in config.loss.sections.items()}
  constants = {name: constant for name, constant in found.items() if constant is not None}
  if constants:
    sections = Sections({**config.loss.sections, **{name: constant.term for name, constant in constants.items()}})
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, sections=sections))
  return config, constants


def with_num_steps(config: Config, data: Data) -> Config:
  """The config with num_steps computed from num_epochs."""
  if not config.num_epochs:
    return config
  [rows_of_all] = map(len, pipeline.train_sources(config.data, data).values())
  return replace(config, num_steps=math.ceil(config.num_epochs * rows_of_all / config.rows_per_batch), num_epochs=0.0)


def check_generation(config: Config, data: Data) -> None:
  """Raises ConfigError for an invalid validator, metric or number of answers, or an invalid prompt."""
  make_validator(config.eval.validator)
  answer_metrics(config.eval)
  if config.eval.answers and (data.tokenizer is None or not config.answers):
    raise ConfigError(f'config.eval.answers: {config.eval.answers} needs a tokenizer and a task with answers; the task '
                      f'is {config.data.task}; set 0')
  if config.eval.answer_metrics and not config.answers:
    raise ConfigError(f'config.eval.answer_metrics: {", ".join(config.eval.answer_metrics)} needs a task with answers; '
                      f'the task is {config.data.task}; set ()')
  if data.prompt_tokenizer is not None and config.eval.sample_tokens and config.writes:
    encode_prompts(config, data.prompt_tokenizer)


def check_encoder_vocabulary(config: Config, data: Data, vocab_size: int) -> None:
  """Raises ConfigError if the encoder's embedding table is missing or too small."""
  size, other = getattr(config.model, 'encoder_vocab_size', None), data.encoder_tokenizer
  if other is not None and size is None:
    raise ConfigError(f'config.data.encoder_tokenizer: {config.data.encoder_tokenizer} needs a model whose encoder has '
                      f'its own embedding table (encoder_vocab_size), but {config.model.name} has none; leave it None')
  needed = vocab_size if other is None else len(other.token_bytes)
  if size is not None and size < needed:
    raise ConfigError(f'config.model.encoder_vocab_size: {size} is less than the {needed} tokens of the encoder input; '
                      f'leave it None or set it to {needed} or more')


def all_labels(data: Data) -> tuple[np.ndarray | None, tuple[str, ...]]:
  """(labels, class names if there are any) of the training part.

  Raises DataError if sources have different class names.
  """
  stores = [store for store in data.splits.get('train', {}).values() if store.labels is not None]
  if len({store.classes for store in stores}) > 1:
    raise DataError('config.data.sources: the sources have different classes: '
                    + '; '.join(f'{name} has {", ".join(store.classes)}' for name, store in data.train.items()))
  if not stores:
    return None, ()
  if len(widths := {np.asarray(store.labels).shape[1:] for store in stores}) > 1:
    raise DataError(f'config.data.sources: the sources have different numbers of labels per document: {sorted(widths)}')
  return np.concatenate([np.asarray(store.labels) for store in stores]), stores[0].classes


def check_features(config: Config, model: LanguageModel, objective: Objective, features: dict[str, Any]) -> None:
  """Raises ConfigError if the task lacks features that model or losses need, or has features that neither uses."""
  terms, given = ', '.join(config.loss.terms), features.keys()
  for who, needs in ((config.model.title, model.needs), (f'config.loss.terms={terms}', objective.reads)):
    if missing := needs - given:
      raise ConfigError(f'config.data.task: {config.data.task} does not provide {", ".join(sorted(missing))}, which '
                        f'{who} needs; set another task')
  if 'encoder_tokens' in model.reads and objective.num_readouts > 1:
    raise ConfigError(f'config.model.name: {config.model.name} reads both texts of a row at once, but '
                      f'config.loss.terms={terms} needs them separately; set decoder or byte_patch')
  if ignored := given - model.reads - objective.reads:
    hint = '; set config.data.mask_documents=False' if ignored <= {'segment_ids', 'positions'} else ''
    raise ConfigError(f'config.data.task: {config.data.task} provides {", ".join(sorted(ignored))}, which '
                      f'{config.model.title} does not read, nor does config.loss.terms={terms}{hint}')


def without_masks(config: Config, model: LanguageModel) -> Config:
  """The config with mask_documents=False for a plain module without a segment_ids parameter; prints a line."""
  if not config.data.mask_documents or 'segment_ids' in model.reads or getattr(model, 'hidden_states', True):
    return config
  say(f'{config.model.title} has no segment_ids parameter, so config.data.mask_documents is set to False: '
      'documents in one row attend to each other')
  return dataclasses.replace(config, data=dataclasses.replace(config.data, mask_documents=False))


def with_logits(config: Config, data: Data, model: LanguageModel, example: Batch) -> Config:
  """The config with the vocabulary size of a plain module's logits. Raises ConfigError if the data's is larger."""
  if getattr(model, 'hidden_states', True):
    return config
  logits = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), example)[0])  # type: ignore[attr-defined]
  if logits.shape[:-1] != example.tokens.shape:
    raise ConfigError(f'{config.model.title} returns logits of shape {logits.shape} for tokens of shape '
                      f'{example.tokens.shape}; they must be [B, T, V] with V {data.vocab_size} or more')
  if logits.shape[-1] < (needed := data.vocab_size + config.data.task_settings.num_sentinels):
    raise ConfigError(too_few_logits(config.model, logits.shape[-1], needed))
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=logits.shape[-1]))


def check_microbatches(config: Config, objective: Objective, num_microbatches: int, num_shards: int) -> None:
  """Raises ConfigError for an objective that compares rows of different microbatches."""
  if num_microbatches > 1 and not objective.row_wise:
    size = config.rows_per_batch // num_shards * config.data.seq_len
    raise ConfigError(f'config.tokens_per_device: {config.tokens_per_device} splits a batch into {num_microbatches} '
                      f'microbatches, but config.loss (terms={", ".join(config.loss.terms)}, '
                      f'balance={config.loss.balance}) needs all of its rows at once; set {size}, or a smaller '
                      'config.batch_tokens')


def check_results(config: Config, data: Data, model: LanguageModel, objective: Objective, params: Params,
                  batch: Batch) -> None:
  """Raises ConfigError for a required result that evaluations do not compute; params and batch are abstract.

  The config itself has checked what is known without data and model. The loss, which most runs need alone, is always
  computed, so that these runs start without tracing an evaluation.
  """
  required = {name for names in config.required_results.values() for name in names} - {'val/loss'}
  # Metrics of answers depend on the validator.
  if not required or config.eval.answers or not data.val or not config.eval.every:
    return
  eval_objective, size = objective.eval_objective(), np.zeros(model.cfg.vocab_size, np.int32)
  sums = jax.eval_shape(partial(eval_step, model=model, token_bytes=size, objective=eval_objective), params, batch)
  results = eval_objective.summarize({name: np.ones(x.shape) for name, x in sums.items()})
  known = {f'val/{name}' for name in results}
  known |= {f'val/{name}/{key}' for name in data.val if len(data.val) > 1 for key in ('loss', 'bits_per_byte')}
  if missing := [f'config.{field} {name}' for field, names in config.required_results.items() for name in names
                 if name not in known]:
    raise ConfigError(f'{", ".join(missing)} is not a result of evaluations in this run; '
                      f'known: {", ".join(sorted(known))}')
