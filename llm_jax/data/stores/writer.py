"""Writes a token store. A writer killed at any moment resumes from its last commit and produces the same bytes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llm_jax.base.errors import DataError, StorageError
from llm_jax.data.sources.documents import Content, Document
from llm_jax.data.sources.splits import SPLITS, size
from llm_jax.data.stores import identity
from llm_jax.data.stores.checks import file_sha256, write_crc
from llm_jax.data.stores.store import VERSION
from llm_jax.data.tokenizers.tokenizer import Tokenizer

SEEN = 'documents.seen'  # hashes of the documents so far, when duplicates are removed
CHUNK = 4 << 20  # characters or ids tokenized at once: enough work for all cores, little memory


class StoreWriter:
  """Appends documents to the splits of a store; everything up to the last `commit` survives a kill.

  `progress.json` holds the length of each file and the reader's state at the last commit; a new writer truncates the
  files to these lengths. Raises OSError.
  """

  def __init__(self, folder: Path, tokenizer: Tokenizer | None, dtype: str, shard_tokens: int,
               takes_ids: bool = True, encoder_tokenizer: Tokenizer | None = None):
    self.folder, self.tokenizer, self.takes_ids = folder, tokenizer, takes_ids
    self.encoder_tokenizer = encoder_tokenizer  # for the prompts; None: `tokenizer` encodes them too
    self.dtype, self.shard_tokens = np.dtype(dtype), shard_tokens
    self.bos_id: int | None = tokenizer.bos_id if tokenizer else None
    self.eos_id: int | None = tokenizer.eos_id if tokenizer else None
    self._token_bytes = token_sizes(tokenizer)
    self._prompt_bytes = token_sizes(encoder_tokenizer) if encoder_tokenizer else self._token_bytes
    self._files: dict[str, BinaryIO] = {}
    folder.mkdir(exist_ok=True)
    saved = json.loads(self._progress.read_text()) if self._progress.exists() else {}
    self.reader_state: Any = saved.get('reader')
    self.counts: dict[str, dict[str, int]] = saved.get('counts') or {
        split: {'tokens': 0, 'documents': 0, 'bytes': 0, 'token_bytes': 0, 'pieces': 0, 'identity': 0}
        for split in SPLITS}
    self.about = saved.get('about') or {'max_id': -1, 'answers': None, 'label_width': None, 'classes': []}
    lengths = saved.get('lengths', {})
    for path in folder.iterdir():
      if path.suffix == '.partial':
        path.unlink()
      elif path.suffix in ('.tokens', '.starts', '.answers', '.labels', '.learnt', '.seconds', '.seen', '.keys'):
        os.truncate(path, lengths.get(path.name, 0))

  @property
  def _progress(self) -> Path:
    return self.folder / 'progress.json'

  def add(self, documents: list[tuple[str, Document]]) -> None:
    """Tokenizes (split, document) pairs and appends them."""
    texts = encode_documents(
        self.tokenizer, [document for _, document in documents], self.takes_ids, self.encoder_tokenizer)
    for (split, document), (text, answer) in zip(documents, texts, strict=True):
      self._check(document)
      if not document.continues or not self.counts[split]['documents']:
        self._open_document(split, document, len(text))
      if self.tokenizer is None:
        self._check_width(document, text, answer)
      self._append(split, text, is_prompt=self.encoder_tokenizer is not None)
      self._append(split, answer)
      counts, answer_bytes = self.counts[split], num_bytes(document.answer, answer, self._token_bytes)
      self._identify(split, document, text, answer)
      counts['bytes'] += num_bytes(document.text, text, self._prompt_bytes) + answer_bytes
      if self.encoder_tokenizer is not None:
        counts['answer_bytes'] = counts.get('answer_bytes', 0) + answer_bytes

  def _identify(self, split: str, document: Document, *parts: np.ndarray) -> None:
    counts = self.counts[split]
    counts['identity'] = identity.joined(counts['identity'], identity.digest(document, parts), 1)
    counts['pieces'] += 1

  def _open_document(self, split: str, document: Document, text_length: int) -> None:
    self._close_document(split)
    self.write(f'{split}.starts', np.array([self.counts[split]['tokens']], np.int64))
    self.counts[split]['documents'] += 1
    if self.bos_id is not None:
      self._append(split, np.array([self.bos_id]))
    if document.answer is not None:
      self.write(f'{split}.answers', np.array([text_length + (self.bos_id is not None)], np.int64))
    if document.label is not None:
      self.write(f'{split}.labels', np.array(self._label(document), np.float64))

  def _close_document(self, split: str) -> None:
    if self.eos_id != self.bos_id and self.counts[split]['documents']:
      self._append(split, np.array([self.eos_id]))

  def _check(self, document: Document) -> None:
    """Raises DataError unless all documents have an answer or none has, and likewise labels of one width."""
    if self.about['answers'] is None:
      self.about |= {'answers': document.answer is not None, 'label_width': len(self._label(document))}
    if self.about['answers'] != (document.answer is not None):
      raise DataError(f'{document.name}: {"lacks" if self.about["answers"] else "has"} an answer, unlike the '
                      'documents before it')
    if len(self._label(document)) != self.about['label_width']:
      raise DataError(f'{document.name}: has {len(self._label(document))} label value(s), the documents before it '
                      f'have {self.about["label_width"]}')

  def _check_width(self, document: Document, *parts: np.ndarray) -> None:
    most = max((int(ids.max()) for ids in parts if len(ids)), default=0)
    if most > np.iinfo(self.dtype).max:
      raise DataError(f'{document.name}: token {most} does not fit into {self.dtype}; '
                      'set config.data.dtype to a wider one')

  def _label(self, document: Document) -> list[float]:
    label, classes = document.label, self.about['classes']
    if label is None:
      return []
    if isinstance(label, str):
      if label not in classes:
        classes.append(label)
      return [float(classes.index(label))]
    return [float(x) for x in label] if isinstance(label, tuple) else [float(label)]

  def _append(self, split: str, ids: np.ndarray, is_prompt: bool = False) -> None:
    """Appends ids to a split. `is_prompt`: they are the encoder tokenizer's."""
    if not len(ids):
      return
    count = self.counts[split]
    self.about['max_id'] = max(self.about['max_id'], int(ids.max()))
    if self._token_bytes is not None and not is_prompt:
      count['token_bytes'] += int(self._token_bytes[ids].sum(dtype=np.int64))
    self._write_shards(split, '.tokens', ids.astype(self.dtype))
    count['tokens'] += len(ids)

  def _write_shards(self, split: str, kind: str, values: np.ndarray) -> None:
    """Appends values, one for each token from the next one on, to the files of a split that hold `shard_tokens`."""
    begin = self.counts[split]['tokens']
    while len(values):
      shard, room = divmod(begin, self.shard_tokens)
      part = values[:self.shard_tokens - room]
      self.write(f'{split}-{shard:05}{kind}', part)
      begin, values = begin + len(part), values[len(part):]

  def write(self, name: str, values: np.ndarray) -> None:
    if name not in self._files:
      if '-' in name:  # one shard of a split is open at a time
        split, kind = name.split('-')[0], Path(name).suffix
        for other in [n for n in self._files if n.startswith(f'{split}-') and n.endswith(kind)]:
          self._sync(self._files.pop(other)).close()
      self._files[name] = open(self.folder / name, 'ab')  # noqa: SIM115
    self._files[name].write(np.ascontiguousarray(values).data)

  def column(self, name: str, dtype: Any) -> np.ndarray:
    """The values of a file so far, mapped into memory."""
    if name in self._files:
      self._files[name].flush()
    path = self.folder / name
    return np.memmap(path, dtype, 'r') if path.exists() and path.stat().st_size else np.zeros(0, dtype)

  def _sync(self, file: BinaryIO) -> BinaryIO:
    file.flush()
    os.fsync(file.fileno())
    return file

  def commit(self, reader_state: Any) -> None:
    """Flushes all files to disk and saves the reader's state, from which reading can resume."""
    for file in self._files.values():
      self._sync(file)
    lengths = {p.name: p.stat().st_size for p in self.folder.iterdir() if p.suffix != '.json'}
    write_json(self._progress, {'reader': reader_state, 'counts': self.counts, 'about': self.about, 'lengths': lengths})

  def close(self) -> None:
    """Closes all files; what follows the last commit is removed by the next writer. Later it could damage a store."""
    for file in self._files.values():
      with contextlib.suppress(OSError):
        file.close()

  def finish(self, target: Path, about: dict) -> None:
    """Closes the last documents, writes tokenizers and manifest, and renames the folder to `target`."""
    for split in SPLITS:
      self._close_document(split)
      for kind in self._kinds():
        self._write_empty(f'{split}{kind}')
    for file in self._files.values():
      self._sync(file).close()
    for name, tokenizer in (('tokenizer', self.tokenizer), ('encoder_tokenizer', self.encoder_tokenizer)):
      if tokenizer is not None:
        (self.folder / f'{name}.json').write_text(tokenizer.to_json(), encoding='utf-8')
        for file, content in getattr(tokenizer, 'files', {}).items():  # the chat template
          (self.folder / file).write_text(content, encoding='utf-8')
    hashes = {path.name: write_crc(path) for path in sorted(self.folder.glob('*.tokens'))}
    files = sorted(p for p in self.folder.iterdir() if p.name not in ('progress.json', 'manifest.json', SEEN))
    vocab_size = len(self.tokenizer.token_bytes) if self.tokenizer else self.about['max_id'] + 1
    write_json(self.folder / 'manifest.json', {
        'version': VERSION, 'dtype': self.dtype.name, 'vocab_size': vocab_size, 'splits': self.counts,
        'ends': [self.bos_id, self.eos_id],
        'label_width': self.about['label_width'] or 0, 'classes': self.about['classes'], **about,
        'files': {p.name: {'size': p.stat().st_size, 'sha256': hashes.get(p.name) or file_sha256(p)} for p in files}})
    os.rename(self.folder, target)
    for name in (SEEN, 'progress.json'):  # needed to resume, until the rename
      (target / name).unlink(missing_ok=True)

  def _kinds(self) -> list[str]:
    """The ends of the names of the files that each split has."""
    return ['.starts', '-00000.tokens', *(['.answers'] if self.about['answers'] else []),
            *(['.labels'] if self.about['label_width'] else [])]

  def _write_empty(self, name: str) -> None:
    if not (self.folder / name).exists():
      self._files[name] = open(self.folder / name, 'ab')  # noqa: SIM115


def encode_documents(tokenizer: Tokenizer | None, documents: list[Document], takes_ids: bool = True,
                     encoder_tokenizer: Tokenizer | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
  """(ids of the text, ids of the answer) of each document; contents that are token ids already stay as they are.

  `encoder_tokenizer`, if given, encodes the texts and `tokenizer` the answers. `takes_ids`: whether token ids may be
  the tokenizer's; a tokenizer that was fitted to this data cannot have made them. Raises DataError naming the document.
  """
  if encoder_tokenizer is not None:  # encode prompts and answers apart
    prompts = encode_documents(encoder_tokenizer, [Document(d.name, d.text) for d in documents], takes_ids)
    answers = encode_documents(
        tokenizer, [Document(d.name, '' if d.answer is None else d.answer) for d in documents], takes_ids)
    return [(prompt, answer) for (prompt, _), (answer, _) in zip(prompts, answers, strict=True)]
  contents = [c for d in documents for c in (d.text, d.answer if d.answer is not None else '')]
  texts = [c for c in contents if isinstance(c, str)]
  try:
    encoded = iter(tokenizer.encode(texts) if tokenizer else [np.zeros(0, np.int64)] * len(texts))
  except DataError:
    for document in documents:
      try:
        assert tokenizer is not None
        tokenizer.encode([c for c in (document.text, document.answer) if isinstance(c, str)])
      except DataError as e:
        raise DataError(f'{document.name}: {e}') from None
    raise
  if (chat := next((d for d in documents if d.messages is not None), None)) is not None:
    raise DataError(f'{chat.name}: holds a conversation, unlike the first document; set config.data.task to chat, or '
                    'config.data.field to a field with text')
  owners = [d for d in documents for _ in range(2)]
  ids = [next(encoded) if isinstance(c, str) else c for c in contents]
  for document, c, found in zip(owners, contents, ids, strict=True):
    if tokenizer is None and isinstance(c, str) and c:  # '' stands for no answer
      raise DataError(f'{document.name}: holds text, but there is no tokenizer: the first document holds token ids, '
                      'or config.data.tokenizer is none; set it to the tokenizer of these ids, which encodes texts '
                      'too, or leave the texts out')
    if not takes_ids and isinstance(c, np.ndarray):
      raise DataError(f'{document.name}: holds token ids, but the tokenizer was fitted to the texts; set '
                      'config.data.tokenizer to the tokenizer of these ids, or leave them out')
    if tokenizer and isinstance(c, np.ndarray) and len(c) and found.max() >= len(tokenizer.token_bytes):
      raise DataError(f'{document.name}: {beyond_vocabulary(int(found.max()), tokenizer)}')
  return list(zip(ids[::2], ids[1::2], strict=True))


def beyond_vocabulary(most: int, tokenizer: Tokenizer) -> str:
  return (f'token {most} is beyond the vocabulary of {len(tokenizer.token_bytes)} tokens; set config.data.tokenizer to '
          'the tokenizer of these ids, or to none')


def token_sizes(tokenizer: Tokenizer | None) -> np.ndarray | None:
  if tokenizer is None:
    return None
  sizes = [len(b) for b in tokenizer.token_bytes]
  return np.array(sizes, np.min_scalar_type(max(sizes)))  # narrow, as it is looked up for every token


def num_bytes(content: Content | None, ids: np.ndarray, token_bytes: np.ndarray | None) -> int:
  """Bytes of a text in UTF-8; for ids, the bytes of their tokens."""
  if isinstance(content, str):
    return len(content.encode())
  return 0 if content is None or token_bytes is None else int(token_bytes[ids].sum(dtype=np.int64))


def chunks(documents: Iterable[tuple[Any, list[tuple[str, Document]]]]) -> Iterator[tuple[Any, list]]:
  """Groups (state, parts of a document) into (last state, parts of many documents) of about CHUNK characters each."""
  chunk, length, state = [], 0, None
  for state, parts in documents:
    chunk += parts
    length += sum(size(document) for _, document in parts)
    if length >= CHUNK:
      yield state, chunk
      chunk, length = [], 0
  if chunk:
    yield state, chunk


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds the lock file beside `path`; the kernel releases it when the process dies. Raises StorageError."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path.with_name(f'{path.name}.lock'), 'w')  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
  except OSError as e:
    raise StorageError(f'{path.parent}: cannot be written ({e.strerror}); set --config.data.cache_dir or '
                       'LLM_JAX_CACHE to a writable folder') from None
  with lock:
    yield


def write_json(path: Path, value: Any) -> None:
  write_whole(path, json.dumps(value, indent=1))


def write_whole(path: Path, text: str) -> None:
  """Writes a file atomically: it ends up with all of `text`, or unchanged."""
  aside = path.with_name(f'{path.name}.partial')
  with open(aside, 'w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(aside, path)
