"""Writes stores of conversations: ids by the chat template, and beside them which tokens are learnt."""

from __future__ import annotations

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.chat.tokenizer import ChatTokenizer
from llm_jax.data.sources.documents import Document
from llm_jax.data.stores.writer import StoreWriter
from llm_jax.data.tokenizers.tokenizer import Tokenizer


class ChatWriter(StoreWriter):
  """A StoreWriter of conversations, or of pairs of a chosen and a rejected one; the template writes all ids."""

  tokenizer: ChatTokenizer

  def add(self, documents: list[tuple[str, Document]]) -> None:
    found = self.tokenizer.conversations([document for _, document in documents])
    for (split, document), (ids, learnt, second) in zip(documents, found, strict=True):
      self.about.setdefault('pairs', second is not None)
      if self.about['pairs'] != (second is not None):
        raise DataError(f'{document.name}: {"lacks" if self.about["pairs"] else "has"} a rejected conversation, unlike '
                        'the documents before it')
      counts = self.counts[split]
      self.write(f'{split}.starts', np.array([counts['tokens']], np.int64))
      if second is not None:
        self.write(f'{split}.seconds', np.array([second], np.int64))
      counts['documents'] += 1
      self._identify(split, document, ids, learnt, np.array([] if second is None else [second]))
      before = counts['token_bytes']
      self._write_shards(split, '.learnt', learnt.astype(np.uint8))
      self._append(split, ids)
      counts['bytes'] += counts['token_bytes'] - before

  def _close_document(self, split: str) -> None:
    pass

  def _kinds(self) -> list[str]:
    return ['.starts', '-00000.tokens', '-00000.learnt', *(['.seconds'] if self.about.get('pairs') else [])]


def writer_of(tokenizer: Tokenizer | None) -> type[StoreWriter]:
  return ChatWriter if isinstance(tokenizer, ChatTokenizer) else StoreWriter
