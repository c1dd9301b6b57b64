"""Evaluation of a model on whole stores: sums over all batches, divided once at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.base.batch import Batch, Metrics, Params
from llm_jax.base.errors import Interrupted
from llm_jax.base.progress import Progress
from llm_jax.base.sharding import local_rows, num_batch_shards, put_batch
from llm_jax.config import Config
from llm_jax.data import pipeline
from llm_jax.data.open import Data
from llm_jax.data.stores.store import TokenStore
from llm_jax.infer.answers import answer_stores, summarize_answers
from llm_jax.losses.objective import Objective
from llm_jax.models.protocol import LanguageModel
from llm_jax.training.state import eval_step

Results = tuple[dict[str, float], dict[str, np.ndarray]]
Evaluator = Callable[..., Results]
COUNTS = ('tokens', 'documents', 'count')  # results that are whole numbers, unless a loss weights them


def make_evaluator(config: Config, data: Data, model: LanguageModel, objective: Objective, mesh: Mesh) -> Evaluator:
  """A function evaluator(params, stores, max_tokens, interrupted): a fixed pass over stores, compiled once.

  It returns ({'loss': ...}, Objective.tables). Each of several stores also has its own NAME/loss and an equal part of
  `max_tokens`. It raises Interrupted once interrupted() is true. `objective` is that of training.
  """
  lengths = [len(b) for b in data.tokenizer.token_bytes] if data.tokenizer else []
  token_bytes = np.zeros(max(model.cfg.vocab_size or 0, len(lengths)), np.int32)
  token_bytes[:len(lengths)] = lengths
  eval_objective = objective.eval_objective()
  eval_fn = jax.jit(partial(eval_step, model=model, token_bytes=token_bytes, objective=eval_objective))
  num_rows = num_eval_rows(config, objective, mesh)
  rows = local_rows(mesh, num_rows)

  def evaluator(params: Params, stores: dict[str, TokenStore], max_tokens: int | None,
                interrupted: Callable[[], bool] = lambda: False) -> Results:
    def batches(store: TokenStore) -> Generator[Batch, None, None]:
      max_rows = max_tokens and max(1, max_tokens // config.data.seq_len // len(stores))
      examples = pipeline.open_examples(config.data, data, store, train=False)
      total = min(len(examples), max_rows or len(examples))
      with Progress('evaluating', total, 'rows', shown=jax.process_index() == 0) as task:
        for features in pipeline.eval_batches(examples, num_rows, rows, max_rows):
          if interrupted():
            raise Interrupted
          yield put_batch(features, rows, num_rows, mesh)
          task.update(min(num_rows, total - task.n))

    def sums_of(store: TokenStore) -> dict[str, Any]:
      with contextlib.closing(batches(store)) as rows_of_store:  # also after an error, which would hold it open
        return add_up(eval_fn, params, rows_of_store)

    sums = {name: sums_of(store) for name, store in stores.items()}
    for name, store in stores.items():
      if 'next_token/bytes' in sums[name]:
        sums[name]['next_token/bytes'] *= store.bytes_scale
    whole = {key: sum(s[key] for s in sums.values()) for key in next(iter(sums.values()))}
    results = eval_objective.summarize(whole)
    if config.eval.answers:
      answers = answer_stores(config, data, model, params, stores, config.eval.answers, interrupted)
      results |= summarize_answers(answers, config.eval)
    if len(stores) > 1:
      results |= {f'{name}/{key}': value for name in stores
                  for key, value in eval_objective.summarize(sums[name]).items() if key in ('loss', 'bits_per_byte')}
    return with_counts(results), eval_objective.tables(whole)

  return evaluator


def with_counts(results: dict[str, float]) -> dict[str, float]:
  """The results with counts as integers."""
  return {name: int(x) if name.rpartition('/')[2] in COUNTS and float(x).is_integer() else x
          for name, x in results.items()}


def num_eval_rows(config: Config, objective: Objective, mesh: Mesh) -> int:
  """The number of rows in an evaluation batch."""
  if not objective.row_wise:  # the loss depends on the number of rows, so it must be that of training
    return config.rows_per_batch
  part = config.data.seq_len // mesh.shape['context']  # of a row, on one device
  return num_batch_shards(mesh) * max(1, (config.tokens_per_device or part) // part)


def add_up(eval_fn: Callable[[Params, Batch], Metrics], params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
  """The sums of eval_step over all batches: numbers, and NumPy arrays of float64."""
  # The sums of batch i are fetched while batch i+1 runs, and added in double precision.
  totals: dict[str, Any] = {}
  pending: Metrics = {}

  def add(sums: Metrics) -> None:
    for name, value in jax.device_get(sums).items():
      totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)

  for batch in batches:
    sums = eval_fn(params, batch)
    add(pending)
    pending = sums
  add(pending)
  return {name: value if value.ndim else float(value) for name, value in totals.items()}
