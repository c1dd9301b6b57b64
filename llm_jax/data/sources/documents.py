"""What a source gives: documents, or a note where one could not be read; and the config that says how to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Content = str | np.ndarray  # text; or ids [n], where the source holds tokens


@dataclasses.dataclass(frozen=True)
class Document:
  """One document: plain, a (text, answer) pair, or text with a label."""

  name: str  # where it is from, the same on any machine: 'a/b.txt', 'part-3.jsonl:17'
  text: Content
  answer: Content | None = None  # what is to be predicted after, or from, the text
  label: str | float | tuple[float, ...] | None = None
  continues: bool = False  # its text goes on the document before: a long text is read in pieces


@dataclasses.dataclass(frozen=True)
class BadRecord:
  """Stands where a document should have been."""

  where: str  # 'PATH, line 7', 'PATH at byte 812', 'PATH, record 3'
  why: str


@dataclasses.dataclass(frozen=True)
class File:
  """Something that one reader reads; `path` may be a folder where a format is one."""

  name: str  # below the source's root, the same on any machine
  path: Path


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """Where documents come from and how they are read. What a format has no use for stays None."""

  path: str = 'stdlib'  # a file, folder, glob or URL, or stdlib, enwik8, synthetic, modular, hf:NAME
  format: str = 'auto'  # one of formats.FORMATS; 'auto' goes by the file's ending or its first bytes
  field: str | None = None  # key, column or data set of the text (or ids); None: the only one there is
  answer_field: str | None = None  # of the answer, which makes pairs
  label_field: str | None = None  # of a label
  separator: str | None = None  # text files hold several documents with this between; None: one document a file
  query: str | None = None  # SQL, for SQLite
  dtype: str | None = None  # of a .bin without a header; None: uint16
  eot_id: int | None = None  # of ids: the one that opens a document
  sha256: str | None = None  # of the file behind a URL
  max_record_bytes: int = 8_000_000  # a longer line or record is bad; a longer text file is read in pieces
  val_path: str | None = None  # documents to validate with, read alike; None: split off `path`
  test_path: str | None = None
  weight: tuple[float, ...] = (1.0,)  # share in a mixture; one for each of config.data.weights_from


# A reader raises DataError for a file that it cannot go on with, and yields BadRecord for what it can step over.
Reader = Callable[[File, SourceConfig], Iterator[Document | BadRecord]]
