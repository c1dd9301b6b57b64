"""From config and data to model, evaluation and samples: what train, evaluate and generate share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax import sampling
from llm_jax.checkpoint import Checkpoints
from llm_jax.config import Config, build
from llm_jax.data import Data, pipeline
from llm_jax.data.store import TokenStore
from llm_jax.data.tokenizers import Tokenizer, decode, load_tokenizer
from llm_jax.errors import ConfigError, DataError, Interrupted, StorageError
from llm_jax.evaluation import evaluate
from llm_jax.models import make_model
from llm_jax.sharding import local_rows, num_batch_shards, put_batch
from llm_jax.step import eval_step, param_shardings
from llm_jax.types import Batch, Params


def complete(config: Config, data: Data) -> Config:
  """The config with what the data decides: vocabulary and longest row. Raises ConfigError when they do not fit."""
  vocab_size = config.model.vocab_size or data.vocab_size
  if vocab_size < data.vocab_size:
    raise ConfigError(f'config.model.vocab_size: {vocab_size} is less than the {data.vocab_size} tokens of the data; '
                      f'leave it None or set it to {data.vocab_size} or more')
  config = dataclasses.replace(config, model=dataclasses.replace(
      config.model, vocab_size=vocab_size, max_len=config.model.max_len or config.data.seq_len))
  if data.tokenizer is not None and config.eval.sample_tokens:
    encode_prompts(config, data.tokenizer)  # better told now than at the first evaluation
  return config


def example_batch(config: Config) -> Batch:
  """One row, for its shapes."""
  blank = jnp.zeros((1, config.data.seq_len), jnp.int32)
  return Batch(tokens=blank, targets=blank, loss_mask=blank.astype(jnp.float32))


def windows(config: Config, store: TokenStore) -> pipeline.Windows:
  return pipeline.Windows(store, config.data.task, config.data.seq_len, config.data.mask_documents)


def make_evaluator(config: Config, tokenizer: Tokenizer | None, model: Any, mesh: Mesh) -> Callable[..., dict]:
  """evaluator(params, store, max_tokens, interrupted) -> {'loss': ...}: a fixed pass over a store, compiled once.

  It raises Interrupted as soon as interrupted() is true.
  """
  lengths = [len(b) for b in tokenizer.token_bytes] if tokenizer else []
  token_bytes = np.zeros(model.cfg.vocab_size, np.int32)
  token_bytes[:len(lengths)] = lengths
  eval_fn = jax.jit(partial(eval_step, model=model, token_bytes=jnp.asarray(token_bytes)))
  num_rows = num_batch_shards(mesh) * (config.tokens_per_device // config.data.seq_len)
  rows = local_rows(mesh, num_rows)

  def evaluator(params: Params, store: TokenStore, max_tokens: int | None,
                interrupted: Callable[[], bool] = lambda: False) -> dict[str, float]:
    def batches() -> Iterator[Batch]:
      max_rows = max_tokens and max(1, max_tokens // config.data.seq_len)
      for features in pipeline.eval_batches(windows(config, store), num_rows, rows, max_rows):
        if interrupted():
          raise Interrupted
        yield put_batch(features, rows, num_rows, mesh)

    return evaluate(eval_fn, params, batches())

  return evaluator


def encode_prompts(config: Config, tokenizer: Tokenizer) -> list[list[int]]:
  """The ids of config.eval.prompts. Raises ConfigError for one that has no ids or leaves no room for an answer."""
  try:
    prompts = [[tokenizer.eot_id, *map(int, ids)] for ids in tokenizer.encode(list(config.eval.prompts))]
  except DataError as e:
    raise ConfigError(f'config.eval.prompts: {e}; set others, for example --config.eval.prompts=') from None
  for prompt, ids in zip(config.eval.prompts, prompts, strict=True):
    if len(ids) >= config.model.max_len:
      raise ConfigError(f'config.eval.prompts: {prompt!r} is {len(ids)} tokens of the {config.model.max_len} that a '
                        'row holds; shorten it')
  return prompts


def samples(config: Config, tokenizer: Tokenizer | None, model: Any, params: Params) -> list[tuple[str, str]]:
  """(prompt, what the model makes of it) for each prompt of config.eval; none where ids have no text."""
  if tokenizer is None or not config.eval.sample_tokens:
    return []
  prompts = encode_prompts(config, tokenizer)
  columns = sampling.generate(
      model, params, prompts, max_len=config.model.max_len, num_tokens=config.eval.sample_tokens, seed=config.seed,
      temperature=config.eval.temperature, top_k=config.eval.top_k,
      num_ids=len(tokenizer.token_bytes))
  texts = []
  for row in np.stack(list(columns), axis=1).tolist():
    texts.append(decode(tokenizer, row[:row.index(tokenizer.eot_id)] if tokenizer.eot_id in row else row))
  return list(zip(config.eval.prompts, texts, strict=True))


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained run, read back from its workdir."""

  config: Config
  tokenizer: Tokenizer | None
  model: Any
  params: Params
  meta: dict  # of the checkpoint: step, data fingerprint, ...


def load_run(workdir: Path, mesh: Mesh, checkpoint: str = 'latest') -> Run:
  """The run in `workdir` at 'latest', 'best' or a step. Nothing there is executed. Raises UserErrors."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise StorageError(f'--workdir: {workdir} holds no run (no config.json)')
  try:
    config = build(Config, json.loads(path.read_text()))
  except ValueError as e:
    raise StorageError(f'{path}: damaged: {e}') from None
  tokenizer = load_tokenizer(workdir / 'tokenizer.json') if (workdir / 'tokenizer.json').exists() else None
  model = make_model(config.model)
  abstract, shardings = param_shardings(example_batch(config), mesh, model=model)
  abstract = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings)
  if not (workdir / 'checkpoints').is_dir():
    raise StorageError(f'--workdir: {workdir} has no checkpoints yet')
  with Checkpoints(workdir / 'checkpoints', config.checkpoint, read_only=True) as checkpoints:
    if not checkpoints.steps():
      raise StorageError(f'--workdir: {workdir} has no checkpoints yet')
    if checkpoint == 'best' and checkpoints.best_step() is None:
      raise ConfigError(f'--checkpoint: no checkpoint of {workdir} was validated, so none is the best')
    step = {'latest': None, 'best': checkpoints.best_step()}.get(checkpoint, checkpoint)
    if step is not None and not str(step).isdigit():
      raise ConfigError(f"--checkpoint: {checkpoint!r} is none of latest, best, or a step of {checkpoints.steps()}")
    params, _, meta = checkpoints.restore(abstract, step=None if step is None else int(step))
  return Run(config, tokenizer, model, params, meta)
