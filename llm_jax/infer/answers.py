"""Generates a model's answers to the prompts of a data set and compares them with the expected ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from llm_jax.base.batch import Params
from llm_jax.base.errors import Interrupted
from llm_jax.config import Config, EvalConfig
from llm_jax.data.open import Data, open_examples
from llm_jax.data.rows.examples import Examples
from llm_jax.data.stores.store import TokenStore
from llm_jax.data.tokenizers.tokenizer import Tokenizer, before_eos, decode
from llm_jax.infer.sampling import beam_search, decode_variables
from llm_jax.infer.validators import TimedOut, Validator, make_validator
from llm_jax.losses.metrics import ANSWER_METRICS, Metric, make_metrics
from llm_jax.models.protocol import LanguageModel

ROWS = 32  # prompts per batch


class Answer(NamedTuple):
  prompt: str
  expected: str
  given: str
  exact: bool
  token_accuracy: float  # positions that agree, as a share of the longer answer
  valid: bool | None  # None: no validator


def pairs(examples: Examples, eos_id: int, limit: int | None) -> Iterator[tuple[list[int], list[int]]]:
  """(prompt tokens, answer tokens without eos) of the pairs in all rows, or in `limit` evenly spaced rows."""
  count = len(examples) if limit is None else min(limit, len(examples))
  for i in range(count):
    index = i * len(examples) // count
    if examples.task.encodes:
      features = examples.make(index, np.random.default_rng(0))
      found = [(features['encoder_tokens'][features['encoder_segment_ids'] > 0],
                features['targets'][features['loss_mask'] > 0])]
    else:
      found = [(piece.ids[:piece.answer], piece.ids[piece.answer:]) for piece in examples.rows[index]]
    for prompt, answer in found:
      yield prompt.tolist(), (answer[:-1] if len(answer) and answer[-1] == eos_id else answer).tolist()


def answer(model: LanguageModel, params: Params, examples: Examples, tokenizer: Tokenizer, *, limit: int | None,
           num_beams: int, validator: Validator | None, interrupted: Callable[[], bool] = lambda: False,
           prompt_tokenizer: Tokenizer | None = None) -> list[Answer]:
  """The model's answers by beam search, with up to one token more than the longest expected answer.

  One beam is greedy decoding. `prompt_tokenizer` decodes the prompts; None: `tokenizer` does. Raises Interrupted once
  interrupted() is true.
  """
  asked = list(pairs(examples, tokenizer.eos_id, limit))
  longest = max(len(expected) for _, expected in asked) + 1
  max_len = model.cfg.max_len
  if model.prompt_in_row:  # room for the answer of each prompt, independent of the other prompts in its batch
    max_len = max(max_len, longest + max(len(prompt) for prompt, _ in asked))
  results, variables = [], decode_variables(model, params)
  for begin in range(0, len(asked), ROWS):
    part = asked[begin:begin + ROWS]
    prompts = [prompt for prompt, _ in part]
    prompts += prompts[:1] * (ROWS - len(prompts) if len(asked) > ROWS else 0)  # padded to one shape, compiled once
    rows = beam_search(model, params, prompts, max_len=max_len, num_tokens=longest, eos_id=tokenizer.eos_id,
                       num_beams=num_beams, num_ids=len(tokenizer.token_bytes), variables=variables)
    for (prompt, expected), row in zip(part, rows.tolist(), strict=False):
      if interrupted():
        raise Interrupted
      given = before_eos(tokenizer, row)
      same = sum(a == b for a, b in zip(given, expected, strict=False))
      exact = given == expected and all(tokenizer.token_bytes[token] for token in expected)  # <unk> never counts
      text = decode(tokenizer, given)
      asked_text = decode(prompt_tokenizer or tokenizer, prompt)
      results.append(Answer(asked_text, decode(tokenizer, expected), text, exact,
                            same / max(len(given), len(expected), 1), is_valid(validator, text)))
  return results


def is_valid(validator: Validator | None, text: str) -> bool | None:
  """False with a warning for a text that a command has not checked in time; None without a validator."""
  try:
    return None if validator is None else validator(text)
  except TimedOut as e:
    print(f'WARNING: config.eval.validator: {e}; the answer counts as invalid', file=sys.stderr, flush=True)
    return False


def summarize_answers(answers: list[Answer], config: EvalConfig) -> dict[str, float]:
  """exact_match, answer_accuracy (of tokens), valid if there is a validator, and the config's answer_metrics."""
  results = {'exact_match': np.mean([a.exact for a in answers]),
             'answer_accuracy': np.mean([a.token_accuracy for a in answers])}
  if answers[0].valid is not None:
    results['valid'] = np.mean([bool(a.valid) for a in answers])
  results |= {name: metric(answers) for name, metric in answer_metrics(config)}
  return {name: float(value) for name, value in results.items()}


def answer_metrics(config: EvalConfig) -> tuple[tuple[str, Metric], ...]:
  """(name, function) of each. Raises ConfigError for a missing package."""
  return make_metrics(config.answer_metrics, config.sections, ANSWER_METRICS)


def answer_stores(config: Config, data: Data, model: LanguageModel, params: Params, stores: dict[str, TokenStore],
                  limit: int | None, interrupted: Callable[[], bool] = lambda: False) -> list[Answer]:
  """Answers to the prompts of all stores; each store provides an equal part of `limit` rows."""
  validator = make_validator(config.eval.validator)
  answers: list[Answer] = []
  for store in stores.values():
    examples = open_examples(config.data, data, store, train=False)
    assert data.tokenizer is not None  # checked by `resolve`
    answers += answer(model, params, examples, data.tokenizer, num_beams=config.eval.num_beams, validator=validator,
                      limit=limit and max(1, limit // len(stores)), interrupted=interrupted,
                      prompt_tokenizer=data.encoder_tokenizer)
  return answers
