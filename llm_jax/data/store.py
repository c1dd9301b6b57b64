"""The token store: a corpus, tokenized once, as flat arrays that are mapped into memory.

A store is a folder: `<split>.tokens` (flat uint16 or uint32), `<split>.starts` (int64, where each document begins),
`tokenizer.json`, and `manifest.json` with the sizes and sha256 of all of them. It is written aside and renamed into
place, under a lock: it is whole or absent, and of several processes that want it one writes and the others wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from llm_jax.data.sources import Document
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.errors import DataError, StorageError
from llm_jax.progress import progress

VERSION = 1


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """One split: tokens [num_tokens] and the ascending positions at which documents start, 0 first."""

  tokens: np.ndarray
  starts: np.ndarray
  sha256: str  # of the tokens' bytes: the data's identity
  num_bytes: int  # of text; 0 where unknown


def open_split(folder: Path, split: str) -> TokenStore:
  """Raises DataError when a file is missing or has another size than the manifest says."""
  try:
    manifest = json.loads((folder / 'manifest.json').read_text())
  except (OSError, ValueError) as e:
    raise DataError(f'{folder / "manifest.json"}: cannot be read ({e}); delete the folder and start again') from None
  for name, entry in manifest['files'].items():
    size = (folder / name).stat().st_size if (folder / name).exists() else 'none'
    if size != entry['size']:
      raise DataError(f'{folder / name}: size is {size}, the manifest says {entry["size"]}; '
                      'delete the folder and start again')
  tokens = np.memmap(folder / f'{split}.tokens', manifest['dtype'], mode='r')
  starts = np.fromfile(folder / f'{split}.starts', np.int64)
  return TokenStore(tokens, starts, manifest['files'][f'{split}.tokens']['sha256'], manifest['splits'][split]['bytes'])


def write_store(folder: Path, tokenizer: Tokenizer, documents: Iterable[tuple[str, str]], total_bytes: int,
                about: dict) -> None:
  """Tokenizes (split, text) pairs into `folder`, whose parent must exist. Call under `locked`."""
  aside = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(aside, ignore_errors=True)  # left by a killed run: we hold the lock, so nobody writes it now
  aside.mkdir()
  vocab_size = len(tokenizer.token_bytes)
  dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
  counts = {split: {'tokens': 0, 'documents': 0, 'bytes': 0} for split in ('train', 'val')}
  with contextlib.ExitStack() as stack:
    files = {f'{split}.{kind}': stack.enter_context(open(aside / f'{split}.{kind}', 'wb'))
             for split in counts for kind in ('tokens', 'starts')}
    bar = stack.enter_context(progress('tokenizing', total_bytes, 'B'))
    for chunk in _chunks(documents):
      ids = tokenizer.encode([text for _, text in chunk])
      for (split, text), document in zip(chunk, ids, strict=True):
        count, num_bytes = counts[split], len(text.encode())
        np.array([count['tokens']], np.int64).tofile(files[f'{split}.starts'])
        np.concatenate([[tokenizer.eot_id], document]).astype(dtype).tofile(files[f'{split}.tokens'])
        count['tokens'] += 1 + len(document)
        count['documents'] += 1
        count['bytes'] += num_bytes
        bar.update(num_bytes)
  (aside / 'tokenizer.json').write_text(tokenizer.to_json(), encoding='utf-8')
  manifest = {'version': VERSION, 'dtype': dtype.name, 'vocab_size': vocab_size, 'splits': counts, **about,
              'files': {p.name: {'size': p.stat().st_size, 'sha256': file_sha256(p)} for p in sorted(aside.iterdir())}}
  (aside / 'manifest.json').write_text(json.dumps(manifest, indent=1))
  for path in aside.iterdir():
    with open(path, 'rb') as f:
      os.fsync(f.fileno())
  os.rename(aside, folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Holds the lock beside `folder`; the kernel lets it go when the process dies. Raises StorageError."""
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(folder.with_name(f'{folder.name}.lock'), 'w')  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
  except OSError as e:
    raise StorageError(f'{folder.parent}: cannot be written ({e.strerror}); set --config.data.cache_dir or '
                       'LLM_JAX_CACHE to a folder that can') from None
  with lock:
    yield


def split_documents(documents: Callable[[], Iterable[Document]], how: str,
                    val_fraction: float) -> Iterator[tuple[str, str]]:
  """(split, text) of every document, in order.

  'document': by a hash of its name, so a document keeps its side when others come or go. 'tail': the last
  `val_fraction` of all characters is for validation; a document across the border is cut in two.
  """
  if how == 'document':
    for document in documents():
      fraction = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:4], 'big') / 2**32
      yield ('val' if fraction < val_fraction else 'train'), document.text
    return
  left = int(sum(len(d.text) for d in documents()) * (1 - val_fraction))
  for document in documents():
    for split, text in (('train', document.text[:left]), ('val', document.text[left:])):
      if text:
        yield split, text
    left = max(0, left - len(document.text))


def file_sha256(path: Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _chunks(documents: Iterable[tuple[str, str]], size: int = 4 << 20) -> Iterator[list[tuple[str, str]]]:
  """Lists of documents of about `size` characters: enough to share among cores, little enough to hold."""
  chunk, length = [], 0
  for item in documents:
    chunk.append(item)
    length += len(item[1])
    if length >= size:
      yield chunk
      chunk, length = [], 0
  if chunk:
    yield chunk
