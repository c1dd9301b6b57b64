"""Encodes prompts as token ids and decodes samples to text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llm_jax.base.batch import Params
from llm_jax.base.errors import ConfigError, DataError
from llm_jax.config import Config
from llm_jax.data.chat.template import Messages
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.open import Data
from llm_jax.data.tokenizers.tokenizer import Tokenizer, before_eos, decode
from llm_jax.infer import sampling
from llm_jax.models.protocol import LanguageModel


def prompt_ids(config: Config, tokenizer: Tokenizer, prompts: Sequence[str | Messages]) -> list[list[int]]:
  """The input ids of each text as in training: preceded by bos, or for an encoder followed by eos.

  A tokenizer with `leads` False, as of some published models, begins no text with bos but an empty one.

  With a chat template a text is a message of the user, and a prompt may also be a list of messages.
  """
  if isinstance(tokenizer, ChatTokenizer):
    return [tokenizer.prompt((('user', prompt),) if isinstance(prompt, str) else prompt) for prompt in prompts]
  texts = [prompt for prompt in prompts if isinstance(prompt, str)]
  if len(texts) < len(prompts):
    raise ConfigError('--workdir: the run has no chat template, so it continues a text and reads no messages')
  encodes = config.data.task_settings.encodes
  leads = getattr(tokenizer, 'leads', True)
  return [[*map(int, ids), tokenizer.eos_id] if encodes else
          [*([tokenizer.bos_id] if leads or not len(ids) else ()), *map(int, ids)] for ids in tokenizer.encode(texts)]


def check_writes(config: Config, tokenizer: Tokenizer | None, workdir: Path) -> Tokenizer:
  """The tokenizer of prompts. Raises ConfigError if the run in `workdir` cannot write text."""
  if tokenizer is None:
    raise ConfigError(f'--workdir: {workdir} was trained on token ids without a tokenizer, so it cannot read or '
                      'generate text')
  if not config.writes:
    raise ConfigError(f'--workdir: {workdir} was not trained to generate text (config.data.task={config.data.task}, '
                      f'config.loss.terms={", ".join(config.loss.terms)}); use llm-jax predict')
  return tokenizer


def fit_prompt(config: Config, tokenizer: Tokenizer, prompt: str | Messages, num_tokens: int) -> tuple[list[int], str]:
  """(the input ids of a text to continue or of messages to answer, a note if they are only the last ones of a text).

  Where the text is longer than the context, its end leaves room for `num_tokens`, but at most for half of the context.
  Raises ConfigError instead if the text is a prompt to answer, which means something only as a whole.
  """
  [ids] = prompt_ids(config, tokenizer, [prompt])
  context, longest, task = config.model.max_len, config.model.longest_prompt, config.data.task_settings
  if len(ids) <= longest:
    return ids, ''
  if task.encodes or task.needs == 'answers' or isinstance(tokenizer, ChatTokenizer):
    raise ConfigError(f'--prompt: has {len(ids)} tokens; shorten it to at most {longest}, as the model answers only '
                      'whole prompts')
  kept = min(longest, max(context - num_tokens, context // 2))
  return ids[-kept:], f'the prompt has {len(ids)} tokens, but the context {context}: only the last {kept} are read'


def encode_prompts(config: Config, tokenizer: Tokenizer) -> list[list[int]]:
  """The ids of config.eval.prompts. Raises ConfigError for prompts that cannot be encoded or are too long."""
  try:
    prompts = prompt_ids(config, tokenizer, list(config.eval.prompts))
  except DataError as e:
    raise ConfigError(f'config.eval.prompts: {e}; set other prompts, for example --config.eval.prompts=') from None
  for prompt, ids in zip(config.eval.prompts, prompts, strict=True):
    if len(ids) > config.model.longest_prompt:
      raise ConfigError(f'config.eval.prompts: {prompt!r} has {len(ids)} tokens; shorten it to at most '
                        f'{config.model.longest_prompt}')
  return prompts


def goes_on(model: LanguageModel, tokenizer: Tokenizer | None) -> bool:
  """Whether what the model writes continues the text of the prompt, and is no answer to it."""
  return model.prompt_in_row and not isinstance(tokenizer, ChatTokenizer)


def samples(config: Config, data: Data, model: LanguageModel, params: Params,
            interrupted: Callable[[], bool] = lambda: False) -> list[tuple[str, str]]:
  """[(prompt, prompt + sample)] for config.eval.prompts; shorter ones once interrupted() is true.

  [] without a tokenizer, or if the model cannot write text.
  """
  tokenizer, reader = data.tokenizer, data.prompt_tokenizer
  if tokenizer is None or reader is None or not config.eval.sample_tokens or not config.writes:
    return []
  prompts = encode_prompts(config, reader)
  columns = sampling.generate(
      model, params, prompts, max_len=config.model.max_len, num_tokens=config.eval.sample_tokens, seed=config.seed,
      temperature=config.eval.temperature, top_k=config.eval.top_k, num_ids=len(tokenizer.token_bytes))
  taken: list[np.ndarray] = []
  while not (taken and interrupted()) and (column := next(columns, None)) is not None:
    taken.append(column)
  rows = np.stack(taken, axis=1).tolist()
  between = '' if goes_on(model, tokenizer) else '\n'
  return [(prompt, prompt + between + decode(tokenizer, before_eos(tokenizer, row)))
          for prompt, row in zip(config.eval.prompts, rows, strict=True)]
