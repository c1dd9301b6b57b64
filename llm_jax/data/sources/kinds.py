"""Which files of a folder are text, records or no data at all, and how text is encoded that is not UTF-8."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.formats.encoding import head_of, is_binary, open_utf8, scan, utf16_of
from llm_jax.data.formats.registry import FORMATS, format_of
from llm_jax.data.sources.documents import Document, File, SourceConfig
from llm_jax.data.sources.finding import LeftOut

if TYPE_CHECKING:
  from llm_jax.data.sources.files import Source

LFS = b'version https://git-lfs.github.com/spec/v'
TEXTUAL = ('json', 'jsonl', 'toml', 'csv', 'tsv')  # records that are written as text
UNKNOWN = 'unknown encoding'
SURVEY_BYTES = 1 << 30  # of all files together, to find those that are not UTF-8


def refuse_pointers(paths: Iterable[Path]) -> None:
  """Raises DataError that names the files that hold a pointer in place of the data."""
  found = [path for path in paths if _begin(path) == LFS]
  if found:
    raise DataError(f'{_listed([str(path) for path in found])}: a Git LFS pointer, not the data: run git lfs pull '
                    'in the repository')


def _begin(path: Path) -> bytes:
  """The first bytes of a small file."""
  try:
    if path.stat().st_size < 1024:
      with open(path, 'rb') as f:
        return f.read(len(LFS))
  except OSError:
    pass  # no file, or its reader reports it
  return b''


def formats_of(files: Sequence[File], config: SourceConfig, left_out: LeftOut) -> list[str | None]:
  """The format of each file; None for one among several that would be text and is not. Empty ones are counted.

  Raises ConfigError for an unknown format.
  """
  formats = list[str | None]()
  for file in files:
    read = functools.cache(functools.partial(head_of, file.path))
    fmt = format_of(file, config, read)
    head = _try(read) if fmt == 'text' and config.format == 'auto' and len(files) > 1 else None
    if head == b'':
      left_out.add('empty', file.name)
    if binary := bool(head) and is_binary(head or b''):
      left_out.add(f'binary ({Path(file.name).suffix.lower() or "no ending"})', file.name)
    formats.append(None if binary else fmt)
  return formats if any(formats) else ['text'] * len(files)


def _try(read: Callable[[], bytes]) -> bytes | None:
  try:
    return read()
  except DataError:
    return None  # the reader reports it


def among_texts(files: Sequence[File], formats: Sequence[str], config: SourceConfig,
                left_out: LeftOut) -> tuple[list[str | None], tuple[str, ...]]:
  """(the format of each file, or None to leave it out; notes), for files most of which are text, such as a repository.

  A file of records is read as such only if it is clear which field is the text; else it is text.
  """
  counts = Counter(formats)
  told = config.field is not None or config.answer_field is not None or config.label_field is not None
  if told or counts['text'] <= len(files) - counts['text']:
    return list(formats), ()
  chosen, as_text = list[str | None](formats), []
  for index, (file, fmt) in enumerate(zip(files, formats, strict=True)):
    head = _try(functools.partial(head_of, file.path)) if fmt in TEXTUAL else None
    if head and not is_binary(head) and not _is_table(file, fmt, head, config):
      chosen[index] = 'text'
      as_text.append(file.name)
    elif fmt == 'sqlite' and not _gives_text(file, fmt, config):
      chosen[index] = None
      left_out.add(f'binary ({Path(file.name).suffix.lower() or fmt})', file.name)
  note = f'{len(as_text)} file(s) without a clear field of text are read as plain text: {_listed(as_text)}'
  return chosen, (note,) if as_text else ()


def _is_table(file: File, fmt: str, head: bytes, config: SourceConfig) -> bool:
  """Whether a file is records; one JSON object alone is text."""
  if fmt == 'json' and head.lstrip()[:1] == b'{':
    return _gives_text(file, fmt, config, lambda name: name != file.name)
  return _gives_text(file, fmt, config)


def _gives_text(file: File, fmt: str, config: SourceConfig, named: Callable[[str], bool] = bool) -> bool:
  """Whether the first item of the file is a document, with a name that passes `named`."""
  try:
    first = next(iter(FORMATS[fmt](file, config)), None)
  except (DataError, OSError):
    return False
  return isinstance(first, Document) and not isinstance(first.text, np.ndarray) and named(first.name)


def encodings(files: Sequence[File], formats: Sequence[str]) -> str:
  """What to do about the files that are not UTF-8, or nothing."""
  room, guesses = SURVEY_BYTES, dict[str, str]()
  for file, fmt in zip(files, formats, strict=True):
    if fmt not in ('text', *TEXTUAL) or room <= 0 or not file.path.is_file():
      continue
    room -= file.path.stat().st_size
    if (guess := _guess(file, room)) is not None:
      guesses[file.name] = guess
  if not guesses:
    return ''
  names = _listed([f'{name} ({guess})' for name, guess in guesses.items()])
  same = set(guesses.values())
  one = same.pop().removeprefix('perhaps ') if len(same) == 1 else UNKNOWN
  name = 'its name, such as cp1251, shift_jis or gb18030' if one == UNKNOWN else one
  return (f'; not UTF-8: {len(guesses)} of {len(files)} file(s): {names}; to read all, set config.data.encoding to '
          f'{name} (files that are UTF-8 stay so), or convert them to UTF-8')


def _guess(file: File, limit: int) -> str | None:
  """What the encoding of a text may be that is not UTF-8."""
  try:
    head = head_of(file.path)
    if is_binary(head):
      return None
    wide = utf16_of(head)
    found = scan(file.path, max(limit, len(head)))
  except (DataError, OSError):
    return None
  return wide or ((UNKNOWN if found.is_dense else 'perhaps cp1252') if found.is_other else None)


def _listed(names: Sequence[str]) -> str:
  return ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '')


def separator_notes(source: Source) -> list[str]:
  """A warning for a separator that occurs in no text file, with what may be meant."""
  config, texts = source.config, [file for file, fmt in zip(source.files, source.formats, strict=True) if fmt == 'text']
  wanted = config.separator
  if not wanted or not texts or any(_holds(file, wanted, config) for file in texts):
    return []
  plain = wanted.replace('\\n', '\n').replace('\\r', '\r').replace('\\t', '\t')
  meant = dict.fromkeys((plain, plain.replace('\r', '').replace('\n', '\r\n'), plain.replace('\r', ''), plain.strip()))
  found = next((text for text in meant if text and _holds(texts[0], text, config)), None)
  hint = '' if found is None else f'; {texts[0].name} holds {found!r}: in a shell, --config.data.separator=${found!r}'
  return [f'warning: config.data.separator {wanted!r} occurs in no text file: each file is one document{hint}']


def _holds(file: File, text: str, config: SourceConfig) -> bool:
  """Whether the text file holds the text."""
  wanted, rest = text.encode(), b''
  try:
    with open_utf8(file.path, config.encoding) as stream:
      while chunk := stream.read(1 << 20):
        if wanted in rest + chunk:
          return True
        rest = chunk[-len(wanted):]
  except DataError:
    pass  # a bad record
  return False
