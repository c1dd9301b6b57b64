"""The token store: a corpus, tokenized once, as flat arrays that are mapped into memory.

A store is a folder: `<split>-00000.tokens`, `<split>-00001.tokens`, ... (flat uint16 or uint32; each but the last holds
`shard_tokens` ids), `<split>.starts` (int64, the position of each document's first token), for pairs `<split>.answers`
(int64, the answer's offset in its document), for labels `<split>.labels` (float64), for conversations files `.learnt`
(uint8, 1 on tokens to learn) beside those of tokens and `<split>.seconds` (int64, where the rejected one of a pair
begins in its document), `tokenizer.json` (and `encoder_tokenizer.json` if prompts have their own tokenizer), and
`manifest.json` with size and sha256 of each file.
writer.py writes a temporary folder and renames it: a store is complete or absent.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.errors import DataError
from llm_jax.base.progress import progress_bar
from llm_jax.data.stores.token_files import TokenFile, document_starts, sampled_sha256

VERSION = 3


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Several token files as one flat array: supports `len`, and slices with step 1."""

  files: tuple[TokenFile, ...]

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
      parts.append(self.files[index].array[begin - first:end - first])
      begin, index = first + self.files[index].size, index + 1
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int64)])


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """One split: all tokens, and each document's start, answer offset and label."""

  tokens: Any  # Tokens, or an array [num_tokens]
  starts: np.ndarray  # int64 [D], ascending, 0 first
  sha256: str  # of tokens, starts and all else: identifies the data
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


def open_split(folder: Path, split: str) -> TokenStore:
  """Opens one split of a store. Raises DataError when a file is missing or its size differs from the manifest."""
  manifest = read_manifest(folder)
  for name, entry in manifest['files'].items():
    size = (folder / name).stat().st_size if (folder / name).exists() else 'none'
    if size != entry['size']:
      raise DataError(f'{folder / name}: size is {size}, the manifest says {entry["size"]}; '
                      'delete the folder and start again')
  about = manifest['splits'][split]
  columns: dict[str, Any] = {
      kind: np.fromfile(folder / f'{split}.{kind}', dtype) for kind, dtype in (
          ('answers', 'int64'), ('labels', 'float64'), ('seconds', 'int64')) if f'{split}.{kind}' in manifest['files']}
  if f'{split}-00000.learnt' in manifest['files']:
    columns['learnt'] = _shards(folder, manifest, f'{split}-', '.learnt', 'uint8')
  classes = manifest['classes']
  if classes:
    values = class_values(classes)
    columns['labels'] = values[columns['labels'].astype(int)]
    if sorted(values) == list(range(len(classes))):
      columns['classes'] = tuple(classes[i] for i in np.argsort(values))
  elif 'labels' in columns and manifest['label_width'] > 1:
    columns['labels'] = columns['labels'].reshape(-1, manifest['label_width'])
  of_split = sorted(name for name in manifest['files'] if name.startswith((f'{split}-', f'{split}.')))
  sha256 = hashlib.sha256(''.join(manifest['files'][name]['sha256'] for name in of_split).encode()
                          + json.dumps(classes).encode()).hexdigest()
  learnt_bytes = about.get('answer_bytes', about['bytes'])
  tokens = _shards(folder, manifest, f'{split}-', '.tokens', manifest['dtype'])
  return TokenStore(tokens, np.fromfile(folder / f'{split}.starts', 'int64'), sha256, about['bytes'],
                    bytes_scale=learnt_bytes / (about['token_bytes'] or learnt_bytes or 1),
                    report=manifest.get('report'), **columns)


def _shards(folder: Path, manifest: dict, first: str, last: str, dtype: str) -> Tokens:
  names = sorted(name for name in manifest['files'] if name.startswith(first) and name.endswith(last))
  return Tokens(tuple(TokenFile(folder / name, dtype, manifest['files'][name]['size'] // np.dtype(dtype).itemsize)
                      for name in names))


def class_values(classes: Sequence[str]) -> np.ndarray:
  """The number to predict for each text label: its value if all labels spell numbers, else its rank when sorted."""
  try:
    return np.array([float(name) for name in classes])
  except ValueError:
    return np.argsort(np.argsort(classes)).astype(np.float64)


def read_manifest(folder: Path) -> dict:
  path = folder / 'manifest.json'
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise DataError(f'{path}: cannot be read ({e}); delete the folder and start again') from None


def verify(folder: Path) -> None:
  """Checks the sha256 of every file. Raises DataError naming the first file that differs from the manifest."""
  files = read_manifest(folder)['files']
  with progress_bar(f'verifying {folder.name}', sum(entry['size'] for entry in files.values()), 'B') as bar:
    for name, entry in files.items():
      if (found := file_sha256(folder / name)) != entry['sha256']:
        raise DataError(f'{folder / name}: sha256 is {found}, the manifest says {entry["sha256"]}: '
                        'the file is damaged; delete the folder and start again')
      bar.update(entry['size'])


def mapped_store(file: TokenFile, eot_id: int | None, begin: int = 0, end: int | None = None) -> TokenStore:
  """A .bin file, or its tokens [begin, end), as a store; nothing is copied."""
  end = file.size if end is None else end
  part = TokenFile(file.path, file.dtype, end - begin, file.offset + begin * np.dtype(file.dtype).itemsize)
  starts = document_starts(part.array, eot_id)
  return TokenStore(Tokens((part,)), starts, f'{sampled_sha256(part.array)} {eot_id}', 0)


def file_sha256(path: Path) -> str:
  try:
    with open(path, 'rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
  except OSError as e:
    raise DataError(f'{path}: cannot be read: {e.strerror}') from None
