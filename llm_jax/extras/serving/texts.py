"""Texts of a request, piece by piece while they are generated."""

from __future__ import annotations

import codecs
import dataclasses
import secrets
from collections.abc import Iterator
from typing import Any

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.tokenizers.tokenizer import stop_ids
from llm_jax.extras.serving.requests import ApiError, Request
from llm_jax.infer.text import fit_prompt


@dataclasses.dataclass(frozen=True)
class Piece:
  index: int  # of the text among those of the request
  text: str
  num_tokens: int  # generated since the last piece, with the end of the document
  finish: str | None = None  # in the last piece of a text: 'stop' or 'length'


@dataclasses.dataclass
class Text:
  """A text that grows token by token; it holds back incomplete characters and what may become a stop string."""

  tokenizer: Any
  stop: tuple[str, ...]
  finish: str | None = None
  held: str = ''

  def __post_init__(self) -> None:
    self.ends = stop_ids(self.tokenizer)
    self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def add(self, token: int) -> str:
    """The text that the next token completes."""
    if token in self.ends:
      return self.end('stop')
    return self._advance(self.decoder.decode(self.tokenizer.token_bytes[token]))

  def end(self, finish: str) -> str:
    """The text that was held back, as nothing follows."""
    text = self._advance(self.decoder.decode(b'', final=True))
    text, self.held, self.finish = text + self.held, '', self.finish or finish
    return text

  def _advance(self, new: str) -> str:
    text, self.held = self.held + new, ''
    found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
    if found:
      self.finish = 'stop'
      return text[:min(found)]
    num_held = max((size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
                   default=0)
    self.held = text[len(text) - num_held:]
    return text[:len(text) - num_held]


def count_prompts(trained: Any, request: Request) -> int:
  """The number of tokens that the model reads of all prompts. Raises ApiError for a prompt that it cannot read."""
  config, tokenizer = trained.config, trained.run.prompt_tokenizer
  try:
    return sum(len(fit_prompt(config, tokenizer, prompt, request.max_tokens)[0]) for prompt in request.prompts)
  except DataError as e:
    raise ApiError(f'prompt: {e}', 'prompt') from None
  except ConfigError as e:
    raise ApiError(str(e).removeprefix('--'), 'prompt', code='context_length_exceeded') from None


def generate(trained: Any, request: Request) -> Iterator[Piece]:
  """The pieces of all texts; prompt i has the texts i * n to i * n + n - 1 and the random numbers of seed + i."""
  seed = secrets.randbelow(1 << 32) if request.seed is None else request.seed
  for i, prompt in enumerate(request.prompts):
    columns = trained.tokens(prompt, num_samples=request.n, num_tokens=request.max_tokens, top_k=request.top_k,
                             temperature=request.temperature, top_p=request.top_p, seed=(seed + i) % (1 << 32))
    texts = {i * request.n + j: Text(trained.run.tokenizer, request.stop) for j in range(request.n)}
    if request.echo:
      yield from (Piece(index, str(prompt), 0) for index in texts)
    for column in columns:
      for (index, text), token in zip(texts.items(), column.tolist(), strict=True):
        if text.finish is None:
          yield Piece(index, text.add(token), 1, text.finish)
      if all(text.finish for text in texts.values()):
        break
    for index, text in texts.items():
      if text.finish is None:
        yield Piece(index, text.end('length'), 0, text.finish)
