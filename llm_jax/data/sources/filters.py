"""Which documents to keep: the limits of a config, removal of duplicates, and the report of what was dropped."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.loaders import RULES
from llm_jax.data.sources.documents import Content, Document
from llm_jax.data.sources.overlap import lines, normalized

HASH_BYTES = 16  # 2^64 documents before two different ones are likely to share a hash


@dataclasses.dataclass(frozen=True)
class FilterConfig:
  """Inclusive limits for documents to keep; a min of 0 and a max of None or () keep everything. Ratios lie in 0..1.

  A text longer than `max_record_bytes` is read in pieces, and judged by its first piece. Cheap rules come first, as the
  first rule that drops a document is reported as the reason.
  """

  min_chars: int = 0  # characters of a document
  max_chars: int | None = None  # characters of a document
  min_words: int = 0  # words of a document
  max_words: int | None = None  # words of a document
  min_mean_word_length: float = 0.0  # characters per word
  max_mean_word_length: float | None = None  # characters per word
  min_letter_ratio: float = 0.0  # letters of any script / characters that are not white space
  min_letter_word_ratio: float = 0.0  # words with at least one letter / words
  max_symbol_ratio: float | None = None  # the more frequent of '#' and '...', per word; may exceed 1
  max_bullet_lines: float | None = None  # lines that start with a bullet / lines
  max_ellipsis_lines: float | None = None  # lines that end in an ellipsis / lines
  min_terminal_lines: float = 0.0  # lines that end in terminal punctuation / lines
  min_sentences: int = 0  # sentences of a document
  max_duplicate_line_ratio: float | None = None  # lines that repeat an earlier one / lines
  max_duplicate_line_char_ratio: float | None = None  # the same, by characters
  max_duplicate_paragraph_ratio: float | None = None  # paragraphs that repeat an earlier one / paragraphs
  max_duplicate_paragraph_char_ratio: float | None = None  # the same, by characters
  max_top_ngram_ratio: tuple[float, ...] = ()  # characters in the n-gram that covers most of them; n = 2, 3, 4, ...
  max_duplicate_ngram_ratio: tuple[float, ...] = ()  # characters in any n-gram that occurs twice; n = 5, 6, 7, ...
  deduplicate: bool = False  # keep the first of equal documents; documents read in pieces are not compared
  deduplicate_normalized: bool = False  # the same, of documents that differ in case and white space alone

  def __post_init__(self) -> None:
    for name, limit in self._rules().items():
      values = limit if isinstance(limit, tuple) else () if limit is None else (limit,)
      top = 1 if name.endswith(('ratio', 'lines')) and name != 'max_symbol_ratio' else float('inf')
      if not all(0 <= value <= top for value in values):
        raise ValueError(f'{name} must lie between 0 and {top}; got {limit}')
    for name in ('chars', 'words', 'mean_word_length'):
      low, high = getattr(self, f'min_{name}'), getattr(self, f'max_{name}')
      if high is not None and low > high:
        raise ValueError(f'min_{name} {low} is above max_{name} {high}: no document could be kept')

  def _rules(self) -> dict[str, Any]:
    return {name: limit for name, limit in vars(self).items() if not name.startswith('deduplicate')}

  @property
  def limits(self) -> dict[str, Any]:
    """The rules that are on."""
    return {rule: limit for rule, limit in self._rules().items()
            if not (limit is None or limit == () or (rule.startswith('min_') and limit == 0))}


def rules_of(config: FilterConfig) -> Callable[[Content], str | None]:
  """A function of a document's text: the first rule that drops it; None: it is kept."""
  return RULES['quality'](config) if config.limits else lambda content: None


def parts_of(document: Document) -> tuple[Content, ...]:
  """What documents are compared by: text, and perhaps an answer; or the role and the content of each turn."""
  if document.messages is not None:
    both = (document.messages, document.rejected or ())
    return tuple(part for turns in both for part in ('', *(part for turn in turns for part in turn)))
  return (document.text,) if document.answer is None else (document.text, document.answer)


class Deduplicator:
  """Finds duplicates by a 16-byte hash of each document; takes about 200 bytes of memory per document and kind."""

  def __init__(self, hashes: bytes = b'', normalize: bool = False):
    """Starts from saved hashes. `normalize`: case and white space do not tell documents apart.

    Raises DataError when they are not a whole number of hashes.
    """
    if len(hashes) % HASH_BYTES:
      raise DataError(f'the saved hashes of documents are {len(hashes)} bytes, not a multiple of {HASH_BYTES}: '
                      'the file is truncated; delete the unfinished store and start again')
    self._seen = {hashes[i:i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)}
    self._new: list[bytes] = []
    self._normalize = normalize

  def seen(self, *parts: Content) -> str | None:
    """'duplicate' or 'normalized duplicate' if a document of the same parts (see `parts_of`) was seen before.

    Otherwise remembers it.
    """
    keys = {'duplicate': _key(parts, lambda part: np.asarray(part, '<i8').tobytes() if isinstance(part, np.ndarray) else
                              part.encode('utf-8', 'surrogatepass'))}
    if self._normalize:
      keys['normalized duplicate'] = _key(parts, normalized, b'n')
    for reason, key in keys.items():
      if key in self._seen:
        return reason
    self._seen.update(keys.values())
    self._new += keys.values()
    return None

  def new_hashes(self) -> bytes:
    """Hashes added since the last call, to append to a file."""
    new, self._new = b''.join(self._new), []
    return new


def _key(parts: tuple[Content, ...], body_of: Callable[[Content], bytes], kind: bytes = b'') -> bytes:
  digest = hashlib.blake2b(digest_size=HASH_BYTES)
  for part in parts:
    body = body_of(part)
    # The length tells ('ab', 'c') from ('a', 'bc').
    digest.update(kind + (b'i' if isinstance(part, np.ndarray) else b't') + len(body).to_bytes(8, 'little'))
    digest.update(body)
  return digest.digest()


@dataclasses.dataclass
class Report:
  """Counts of records: `num_in` = `num_kept` + sum of `dropped` + `num_bad`."""

  num_kept: int = 0
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # by reason
  num_bad: int = 0  # records that could not be read and were skipped
  first_bad: str | None = None
  notes: list[str] = dataclasses.field(default_factory=list)  # about the files
  overlap: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # of val and test with train

  @property
  def num_in(self) -> int:
    return self.num_kept + sum(self.dropped.values()) + self.num_bad

  def keep(self) -> None:
    self.num_kept += 1

  def drop(self, reason: str) -> None:
    self.dropped[reason] = self.dropped.get(reason, 0) + 1

  def bad(self, message: str) -> None:
    self.num_bad += 1
    self.first_bad = self.first_bad or message

  def to_dict(self) -> dict:
    """The counts for a JSON file; `Report.from_dict` reads them."""
    return {'in': self.num_in, 'kept': self.num_kept, 'dropped': dict(sorted(self.dropped.items())),
            'bad': self.num_bad, 'first_bad': self.first_bad,
            'notes': self.notes, 'overlap': self.overlap}

  @staticmethod
  def from_dict(saved: dict) -> Report:
    return Report(saved['kept'], dict(saved['dropped']), saved['bad'], saved['first_bad'],
                  list(saved.get('notes', [])), dict(saved.get('overlap', {})))

  def findings(self) -> list[str]:
    """What a user should know again when the data are used again: the notes, and the overlap of splits."""
    return [*self.notes, *lines({split: c for split, c in self.overlap.items() if c['normalized']})]

  def lines(self) -> list[str]:
    """The printed report: notes, the totals, a line per reason, the most frequent first, and what is in train too."""
    total, num_dropped = self.num_in, sum(self.dropped.values())
    bad = f', {self.num_bad:,} bad' if self.num_bad else ''
    reasons = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
    return [*self.notes, f'{total:,} documents in: {self.num_kept:,} kept, {num_dropped:,} dropped{bad}',
            *(f'  {count:,} ({count / total:.2%}) dropped by {reason}' for reason, count in reasons),
            *([f'  the first bad record: {self.first_bad}'] if self.num_bad else []), *lines(self.overlap)]
