"""ChatTokenizer: a tokenizer with a chat template, which turns conversations into ids and says which are learnt."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import NamedTuple

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.data.chat.find import template_files
from llm_jax.data.chat.records import conversations_of, shared
from llm_jax.data.chat.template import Messages, Span, Template
from llm_jax.data.sources.documents import Document
from llm_jax.data.tokenizers.huggingface import EOT, HuggingFaceTokenizer
from llm_jax.data.tokenizers.tokenizer import ExtendedTokenizer, Tokenizer

Parsed = tuple[np.ndarray, np.ndarray]  # ids [n], and the characters [n, 2] of each


class Conversation(NamedTuple):
  """A conversation in ids; of a pair, the rejected one follows the chosen one."""

  ids: np.ndarray  # uint32 [n]
  learnt: np.ndarray  # bool [n]: whether the assistant wrote it; of a pair, in its answers to the shared prompt
  second: int | None = None  # where the rejected conversation begins


class ChatTokenizer:
  """A tokenizer with a chat template. Its eos is the token that ends a turn of the assistant.

  Ids and masks equal those of transformers' apply_chat_template(..., return_assistant_tokens_mask=True), except that
  spellings of special tokens in contents stay text.
  """

  def __init__(self, tokenizer: Tokenizer, template: Template):
    self.original = tokenizer  # without the tokens that the template adds
    own = _special_tokens(tokenizer)
    bos_token, eos_token = (_name_of(tokenizer, token) if name is None else name for name, token in (
        (template.bos_token, tokenizer.bos_id), (template.eos_token, tokenizer.eos_id)))
    named = [token for token in (*template.special_tokens, bos_token, eos_token) if token]
    self.added = [token for token in dict.fromkeys(named) if token not in own]
    self.base = tokenizer if not self.added else _extended(tokenizer, self.added)
    self.special_tokens = {**own, **_special_tokens(self.base)}
    self.template = dataclasses.replace(template, special_tokens=tuple(self.special_tokens), bos_token=bos_token,
                                        eos_token=eos_token)
    self.files = template_files(self.template)  # what a run's folder keeps beside tokenizer.json
    self.bos_id, self.eos_id = self.base.bos_id, self.base.eos_id
    self.token_bytes, self.encode, self.to_json = self.base.token_bytes, self.base.encode, self.base.to_json
    self._split = re.compile('(' + '|'.join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True))) + ')')
    self._sizes = np.array([len(piece) for piece in self.token_bytes], np.int64)
    self.eos_id = self._end_of_turn()

  def _end_of_turn(self) -> int:
    """The first special token after the assistant's text; the tokenizer's own eos if the template writes none."""
    question = [('user', 'a')]
    before = self._split.findall(self.template.prompt(question))
    whole = self._split.findall(self.template.render([*question, ('assistant', 'b')])[0])
    return self.special_tokens[whole[len(before)]] if len(whole) > len(before) else self.base.eos_id

  def prompt(self, messages: Messages) -> list[int]:
    """The ids after which the model writes the assistant's next turn."""
    [(ids, _)] = self._parse([self.template.prompt(messages)])
    return ids.tolist()

  def conversations(self, documents: list[Document]) -> list[Conversation]:
    """The ids of each document's conversation, or of both of a pair. Raises DataError, ConfigError, with its name."""
    rendered = []
    for document in documents:
      both = conversations_of(document)
      skipped = 0 if len(both) == 1 else sum(role == 'assistant' for role, _ in both[0][:shared(*both)])
      for turns in both:
        try:
          text, spans = self.template.render(turns)
        except (DataError, ConfigError) as e:
          raise type(e)(f'{document.name}: {e}') from None
        rendered.append((text, spans[skipped:]))
    parsed = iter(zip(self._parse(*map(list, zip(*rendered, strict=True))) if rendered else [], rendered, strict=True))
    results = []
    for document in documents:
      parts = [next(parsed) for _ in range(1 if document.rejected is None else 2)]
      learnt = [overlaps(places, spans) for (_, places), (_, spans) in parts]
      second = None if document.rejected is None else len(learnt[0])
      results.append(Conversation(np.concatenate([ids for (ids, _), _ in parts]), np.concatenate(learnt), second))
    return results

  def _parse(self, texts: list[str], spans: list[list[Span]] | None = None) -> list[Parsed]:
    """The ids of rendered texts and the characters of each. `spans`: see `_parse_parts`."""
    whole = isinstance(self.base, HuggingFaceTokenizer)
    direct = [i for i, text in enumerate(texts) if whole and self.template.restore(text) == text]
    found = dict(zip(direct, self.base.parse([texts[i] for i in direct]), strict=True)  # type: ignore[attr-defined]
                 if direct else [])
    return [found[i] if i in found else self._parse_parts(text, spans[i] if spans else [])
            for i, text in enumerate(texts)]

  def _parse_parts(self, text: str, spans: list[Span]) -> Parsed:
    """Parses a text part by part: its special tokens, and what is between them, encoded as plain text.

    A tokenizer whose tokens do not spell the text exactly is also cut at the borders of `spans`.
    """
    ids, places, begin = [np.zeros(0, np.uint32)], [np.zeros((0, 2), np.int64)], 0
    for part in self._split.split(text):
      if part in self.special_tokens:
        found, where = np.array([self.special_tokens[part]], np.uint32), np.array([[0, len(part)]])
      else:
        found, where = self._parse_plain(part, [(a - begin, b - begin) for a, b in spans])
      ids.append(found)
      places.append(where + begin)
      begin += len(part)
    return np.concatenate(ids), np.concatenate(places)

  def _parse_plain(self, part: str, spans: list[Span]) -> Parsed:
    restored = part if part.isascii() else [self.template.restore(c) for c in part]
    text = ''.join(restored)
    [ids] = self.base.encode([text])
    if b''.join([self.token_bytes[i] for i in ids.tolist()]) != text.encode():
      cuts = sorted({0, len(part), *(x for span in spans for x in span if 0 < x < len(part))})
      parts = [(a, b, self.base.encode([''.join(restored[a:b])])[0]) for a, b in itertools.pairwise(cuts)]
      return (np.concatenate([found for _, _, found in parts] or [ids]),
              np.array([(a, b) for a, b, found in parts for _ in found], np.int64).reshape(-1, 2))
    ends = np.cumsum(self._sizes[ids])
    begins = ends - self._sizes[ids]
    if not part.isascii() and len(ids):  # from bytes to characters
      character = np.repeat(np.arange(len(part)), [len(c.encode()) for c in restored])
      begins, ends = character[begins], character[ends - 1] + 1
    return ids, np.stack([begins, ends], axis=1)


def overlaps(places: np.ndarray, spans: list[Span]) -> np.ndarray:
  """bool [n]: whether the characters of each token overlap one of the spans, which ascend."""
  result = np.zeros(len(places), bool)
  for begin, end in spans:
    result |= (places[:, 0] < end) & (places[:, 1] > begin)
  return result


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
  """Ids of the special tokens by spelling; <|endoftext|> is the eos of tokenizers whose eos has none."""
  own = dict(getattr(tokenizer, 'special_tokens', {}))
  if isinstance(tokenizer, ExtendedTokenizer):
    return {**_special_tokens(tokenizer.base), **own}
  return own if isinstance(tokenizer, HuggingFaceTokenizer) else {EOT: tokenizer.eos_id, **own}


def _name_of(tokenizer: Tokenizer, token: int) -> str:
  return tokenizer.name_of(token) if isinstance(tokenizer, HuggingFaceTokenizer) else EOT


def _extended(tokenizer: Tokenizer, tokens: list[str]) -> Tokenizer:
  if isinstance(tokenizer, HuggingFaceTokenizer):
    return tokenizer.with_special_tokens(tokens)
  return ExtendedTokenizer(tokenizer, tokens)
