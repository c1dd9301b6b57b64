"""The items of a source: documents, and bad records in place of those that cannot be read; and a source's config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

Content = str | np.ndarray  # text, or token ids [n]


@dataclasses.dataclass(frozen=True)
class Document:
  """One document: plain, a (text, answer) pair, text with a label, or a conversation."""

  name: str  # file and record, the same on any machine: 'a/b.txt', 'part-3.jsonl:17'
  text: Content
  answer: Content | None = None  # to be predicted from the text
  label: str | float | tuple[float, ...] | None = None
  continues: bool = False  # a further piece of the document before: long texts are read in pieces
  messages: tuple[tuple[str, str], ...] | None = None  # (role, content) of each turn; `text` joins the contents
  rejected: tuple[tuple[str, str], ...] | None = None  # the same conversation with an answer that is not preferred
  asked: tuple[str, str] | None = None  # of a pair with a system prompt: this and the question, which `text` joins


@dataclasses.dataclass(frozen=True)
class BadRecord:
  """Takes the place of a document that could not be read."""

  where: str  # 'PATH, line 7', 'PATH at byte 812', 'PATH, record 3'
  why: str


@dataclasses.dataclass(frozen=True)
class File:
  """The input of one reader; `path` is a folder for formats that consist of one."""

  name: str  # relative to the source's root, the same on any machine
  path: Path
  format: str | None = None  # of FORMATS; None: the config's, or by the file's ending or first bytes


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where documents come from and how they are read. Settings that a format does not use stay None."""

  path: str = 'stdlib'  # a file, folder, glob or URL, or NAME or NAME:..., of data.sources.files.SOURCES
  format: str = 'auto'  # one of data.formats.registry.FORMATS; auto: by the file's ending or first bytes
  # Key, column or data set of the text (or ids); doc.text reaches into objects, title+body joins two; None: the only
  field: str | None = None
  answer_field: str | None = None  # key of the answer: documents are (text, answer) pairs
  label_field: str | None = None  # key of the label
  encoding: str | None = None  # of text files that are not UTF-8, such as cp1252 or utf-16-le; None: they are refused
  separator: str | None = None  # text between the documents of a text file; None: one document per file
  join: str | None = None  # between joined fields and the texts of a list; None: a new line, and lists are refused
  delimiter: str | None = None  # of CSV and TSV, a character or tab; None: found by the header and the first rows
  quoting: Literal['minimal', 'none'] | None = None  # of CSV and TSV; None: minimal for CSV, none for TSV
  query: str | None = None  # SQL, for SQLite
  dtype: str | None = None  # type of a .bin without a header; None: uint16
  eot_id: int | None = None  # for data of token ids: the id that starts a document
  sha256: str | None = None  # expected sha256 of the file at a URL
  max_record_bytes: int = 8_000_000  # a longer line or record is bad; a longer text file is read in pieces
  val_path: str | None = None  # validation documents, read the same way; None: split off `path`
  test_path: str | None = None  # test documents, read the same way; None: split off `path`
  weight: tuple[float, ...] = (1.0,)  # share in a mixture, for each step in config.data.weights_from


# A reader yields BadRecord for records that it can skip, and raises DataError if it cannot read on.
Reader = Callable[[File, SourceConfig], Iterator[Document | BadRecord]]


def unescaped(text: str) -> str:
  r"""The text with a written \n, \r or \t as the character, as shells pass them on."""
  return text.replace('\\n', '\n').replace('\\r', '\r').replace('\\t', '\t')


def is_url(path: str) -> bool:
  return re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', path) is not None


def shown(path: str) -> str:
  """A URL without user, password and query, for logs. Other paths are unchanged."""
  if '://' not in path:
    return path
  return re.sub(r'^([^:]+://)[^/?#]*@', r'\1', path.split('#')[0]).split('?')[0] + ('?...' if '?' in path else '')
