"""The token store: a corpus, tokenized once, as flat arrays that are mapped into memory.

A store is a folder: `<split>-00000.tokens`, `<split>-00001.tokens`, ... (flat uint16 or uint32; each but the last holds
`shard_tokens` ids), `<split>.starts` (int64, the position of each document's first token), for pairs `<split>.answers`
(int64, the answer's offset in its document), for labels `<split>.labels` (float64), for conversations files `.learnt`
(uint8, 1 on tokens to learn) beside those of tokens and `<split>.seconds` (int64, where the rejected one of a pair
begins in its document), `<split>.keys` (uint64, two for each document's text), `tokenizer.json` (and
`encoder_tokenizer.json` if prompts have their own tokenizer), checksums of the tokens (checks.py), and `manifest.json`
with size and sha256 of each file.
writer.py writes a temporary folder and renames it: a store is complete or absent.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.data.sources.splits import SPLITS
from llm_jax.data.stores.checks import check_files, checks_of
from llm_jax.data.stores.token_files import TokenFile, document_starts, sampled_sha256

VERSION = 5


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Several token files as one flat array: supports `len`, and slices with step 1."""

  files: tuple[Any, ...]  # TokenFile, or others with size and read

  @cached_property
  def _begins(self) -> list[int]:
    return [0, *itertools.accumulate(file.size for file in self.files)]

  def __len__(self) -> int:
    return self._begins[-1]

  def __getitem__(self, where: slice) -> np.ndarray:
    begin, end, _ = where.indices(len(self))
    parts, index = [], bisect.bisect_right(self._begins, begin) - 1
    while begin < end:
      first = self._begins[index]
      parts.append(self.files[index].read(begin - first, min(end - first, self.files[index].size)))
      begin, index = first + self.files[index].size, index + 1
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int64)])


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """One split: all tokens, and each document's start, answer offset and label."""

  tokens: Any  # Tokens, or an array [num_tokens]
  starts: np.ndarray  # int64 [D], ascending, 0 first
  sha256: str  # of tokens, starts and all else, not of their files: identifies the data
  num_bytes: float  # of the text; 0: unknown
  answers: np.ndarray | None = None  # int64 [D]
  labels: np.ndarray | None = None  # float64 [D] or [D, C]
  # num_bytes / (bytes of all tokens by the tokenizer's table): 1 if lossless; corrects bits per byte if it is not.
  # With an encoder tokenizer it covers the answers only, as only they are learnt.
  bytes_scale: float = 1.0
  report: dict | None = None  # of the filters, for all splits together
  classes: tuple[str, ...] = ()  # names of the classes 0, 1, ...; empty if labels are numbers
  learnt: Any = None  # of conversations: like tokens, 1 where a token is to be learnt
  seconds: np.ndarray | None = None  # int64 [D], of pairs: the offset of the rejected conversation
  keys: np.ndarray | None = None  # uint64 [2 D]: of each document, normalized and exact; see sources/overlap.py
  vocab_size: int | None = None  # above all ids; None: unknown
  cut: bool = False  # whether the last document goes on in another split, as where a .bin is cut between tokens
  map: Callable[..., Iterable[Any]] = map  # makes many rows: where reading them takes long, in threads
  mapped: Mapping[str, TokenFile] = dataclasses.field(default_factory=dict)  # files of the fields of these names
  lease: IO | None = None  # keeps the store in the cache

  def __getstate__(self) -> dict:
    return {name: value for name, value in self.__dict__.items() if name not in self.mapped} | {'lease': None}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state | {name: file.array for name, file in state['mapped'].items()})


def open_store(folder: Path, check: Literal['some', 'all', 'nothing'] = 'some',
               lease: IO | None = None) -> dict[str, TokenStore]:
  """Opens all splits, after checking `all` files, or `some`: as much as checks.py says. Raises DataError."""
  files = read_manifest(folder)['files']
  if check == 'all':
    check_files(folder, files, shown=True)
  checks = checks_of(folder, files) if check == 'some' else {}

  def token_file(path: Path, dtype: str, size: int) -> TokenFile:
    return TokenFile(path, dtype, size, checks=checks.get(path.name))

  return {split: open_split(folder, split, token_file, lease=lease) for split in SPLITS}


def open_split(folder: Path, split: str, token_file: Callable[[Path, str, int], Any] = TokenFile,
               **fields: Any) -> TokenStore:
  """Opens one split of a store, whose starts and the like are mapped, not read. Raises DataError.

  `token_file` opens a file of tokens from (path, dtype, number of tokens). `fields` are those of TokenStore.
  """
  manifest = read_manifest(folder, with_tokens=token_file is TokenFile)
  about, files = manifest['splits'][split], manifest['files']

  def per_token(kind: str, dtype: str) -> Tokens:
    names = sorted(name for name in files if name.startswith(f'{split}-') and name.endswith(kind))
    return Tokens(tuple(token_file(folder / name, dtype, files[name]['size'] // np.dtype(dtype).itemsize)
                        for name in names))

  mapped = {kind: TokenFile(folder / name, 'uint64' if kind == 'keys' else 'int64', files[name]['size'] // 8)
            for kind in ('starts', 'answers', 'seconds', 'keys') if (name := f'{split}.{kind}') in files}
  columns: dict[str, Any] = {kind: file.array for kind, file in mapped.items()}
  if f'{split}.labels' in files:
    columns['labels'] = np.fromfile(folder / f'{split}.labels', 'float64')
  if f'{split}-00000.learnt' in files:
    columns['learnt'] = per_token('.learnt', 'uint8')
  classes = manifest['classes']
  if classes:
    values = class_values(classes)
    columns['labels'] = values[columns['labels'].astype(int)]
    if sorted(values) == list(range(len(classes))):
      columns['classes'] = tuple(classes[i] for i in np.argsort(values))
  elif 'labels' in columns and manifest['label_width'] > 1:
    columns['labels'] = columns['labels'].reshape(-1, manifest['label_width'])
  sha256 = hashlib.sha256(json.dumps([about['identity'], about['pieces'], manifest['ends']]).encode()).hexdigest()
  learnt_bytes = about.get('answer_bytes', about['bytes'])
  return TokenStore(per_token('.tokens', manifest['dtype']), sha256=sha256, num_bytes=about['bytes'],
                    report=manifest.get('report'),
                    bytes_scale=learnt_bytes / (about['token_bytes'] or learnt_bytes or 1),
                    vocab_size=manifest['vocab_size'], mapped=mapped, **columns, **fields)


def class_values(classes: Sequence[str]) -> np.ndarray:
  """The number to predict for each text label: its value if all labels spell numbers, else its rank when sorted."""
  try:
    return np.array([float(name) for name in classes])
  except ValueError:
    return np.argsort(np.argsort(classes)).astype(np.float64)


def read_manifest(folder: Path, with_tokens: bool = True) -> dict:
  """The manifest. Raises DataError when it is damaged, and when a file is missing or has another size.

  Without `with_tokens`, the files of tokens may be elsewhere.
  """
  path = folder / 'manifest.json'
  try:
    manifest = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise DataError(f'{path}: cannot be read ({e}); delete the folder and start again') from None
  for name, entry in manifest['files'].items():
    if name.endswith('.tokens') and not with_tokens:
      continue
    size = (folder / name).stat().st_size if (folder / name).exists() else 'none'
    if size != entry['size']:
      raise DataError(f'{folder / name}: size is {size}, the manifest says {entry["size"]}; '
                      'delete the folder and start again')
  return manifest


def mapped_store(file: TokenFile, eot_id: int | None, begin: int = 0, end: int | None = None) -> TokenStore:
  """A .bin file, or its tokens [begin, end), as a store; nothing is copied."""
  end = file.size if end is None else end
  part = TokenFile(file.path, file.dtype, end - begin, file.offset + begin * np.dtype(file.dtype).itemsize)
  if file.starts is None:
    return TokenStore(Tokens((part,)), document_starts(part.array, eot_id), f'{sampled_sha256(part.array)} {eot_id}', 0,
                      cut=end < file.size and int(file.array[end]) != eot_id)
  inside = file.starts[(file.starts > begin) & (file.starts < end)] - begin
  starts = np.concatenate([[0], inside])
  return TokenStore(Tokens((part,)), starts, f'{sampled_sha256(part.array)} {sampled_sha256(starts)}', 0)
