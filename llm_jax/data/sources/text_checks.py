"""Checks shared by all tokenizers: a text must be valid Unicode, and the number of ids must fit a table."""

from __future__ import annotations

from llm_jax.base.errors import DataError


def utf8(text: str) -> bytes:
  """UTF-8 of the text. Raises DataError for half of a surrogate pair, which is not a character."""
  try:
    return text.encode()
  except UnicodeEncodeError as e:
    raise DataError(f'a text holds the lone surrogate {text[e.start]!r} at position {e.start}, which has no '
                    'encoding; correct the source, or leave the document out') from None


def empty_table(num_ids: int) -> list[bytes]:
  """An empty table of the bytes of each id. Raises DataError for a number that only a damaged file has."""
  if not 0 < num_ids <= 1 << 24:
    raise DataError(f'the highest token id is {num_ids - 1}; it must be in 0 to {(1 << 24) - 1}')
  return [b''] * num_ids
