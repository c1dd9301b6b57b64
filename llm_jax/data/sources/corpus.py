"""From sources to token stores: read, filter, split, tokenize. Stores are made once and kept in the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np

from llm_jax.base.errors import ConfigError, DataError, StorageError
from llm_jax.base.progress import Progress, progress_bar
from llm_jax.data.chat.records import conversations_of, rendered
from llm_jax.data.chat.template import Template
from llm_jax.data.chat.writer import writer_of
from llm_jax.data.sources import overlap
from llm_jax.data.sources.content import FileHashes
from llm_jax.data.sources.documents import BadRecord, Content, Document
from llm_jax.data.sources.files import Position, Source
from llm_jax.data.sources.filters import Deduplicator, FilterConfig, Report, parts_of, rules_of
from llm_jax.data.sources.kinds import encodings, separator_notes
from llm_jax.data.sources.splits import SPLITS, Placed, SplitConfig, Splitter, content_hash, place, size
from llm_jax.data.stores import store
from llm_jax.data.stores.cache import lease
from llm_jax.data.stores.store import TokenStore, open_split
from llm_jax.data.stores.writer import SEEN, StoreWriter, chunks, locked, write_whole
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, Tokenizer, TokenizerConfig, load_tokenizer

FEW = 20  # validation documents; if fewer are expected, split='auto' uses 'tail' instead of 'document'
FIT_BYTES = 50_000_000  # bytes of text, spread over the corpus, to fit a tokenizer to
COMMIT_SECONDS = 5
PARTS = ('text', 'answer')  # of a document
RULES_VERSION = 3  # of how documents are found and split


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The documents of one source, with the settings that filter and split them."""

  name: str
  sides: tuple[tuple[str | None, Source], ...]  # (split, source); None: split by `split`
  split: SplitConfig
  filters: FilterConfig
  on_bad_record: str  # 'fail' or 'skip'
  max_bad_fraction: float
  template: Template | None = None  # of conversations
  hashes: FileHashes = dataclasses.field(default_factory=FileHashes, compare=False)

  def kept(self, report: Report | None = None, seen: Deduplicator | None = None,
           begin: tuple[int, int, int] = (0, 0, 0)) -> Iterator[
               tuple[tuple[int, int, int], str | None, Document, bool]]:
    """(position after the document, its split if fixed, document, whether a further piece of it follows) for all that
    pass the filters.

    Raises DataError for a bad record, or for more than `max_bad_fraction` of them if they are skipped.
    """
    report, seen, rules = report or Report(), seen or self.deduplicator(), rules_of(self.filters)
    deduplicates = self.filters.deduplicate or self.filters.deduplicate_normalized
    left_out = False  # further pieces of a long text follow the first
    for index in range(begin[0], len(self.sides)):
      side, source = self.sides[index]
      records = source.records(begin[1:] if index == begin[0] else (0, 0))
      for position, item, goes_on in _with_what_follows(records):
        if self.on_bad_record == 'skip' and self.template is not None and isinstance(item, Document):
          item = rendered(item, self.template)
        if isinstance(item, BadRecord):
          self._bad(item, report)
          left_out = True
          continue
        if not item.continues:
          reason = _reason(item, rules, seen if deduplicates and not goes_on else None)
          left_out = reason is not None
          report.drop(reason) if reason else report.keep()
        if not left_out:
          yield (index, *position), side, item, goes_on
    self._check_bad(report)

  def documents(self, progress: dict | None = None, seen: Deduplicator | None = None) -> Iterator[
      tuple[Callable[[], dict], list[tuple[str, Document]]]]:
    """(function that returns the progress after the document, [(split, document or part)]), from `progress` on."""
    progress = self.start() if progress is None else progress
    report = Report.from_dict(progress['report'])
    splitter = Splitter(self.split, self._placed, progress['splitter'])
    for position, side, document, goes_on in self.kept(report, seen, tuple(progress['position'])):
      dealt = [(side, document)] if side else list(splitter.deal(document, goes_on))

      # A copy of the report: records dropped after this document are counted by the reader that resumes here.
      def state(position: tuple[int, int, int] = position, counts: dict = report.to_dict()) -> dict:  # noqa: B008
        return {'position': position, 'splitter': dict(splitter.state), 'report': counts}

      yield state, dealt
    progress['report'] = report.to_dict()

  @functools.cached_property
  def _placed(self) -> Placed | None:
    return place(self.split, lambda: ((d, goes_on) for _, side, d, goes_on in self.kept() if side is None))

  @property
  def num_placed(self) -> int:
    """Number of documents, from the first on, that hold all of val and test with split count."""
    return len(self._placed.codes) if self._placed is not None else 0

  def deduplicator(self, hashes: bytes = b'') -> Deduplicator:
    return Deduplicator(hashes, self.filters.deduplicate_normalized)

  def start(self) -> dict:
    """The progress before the first document."""
    return {'position': (0, 0, 0), 'splitter': None, 'report': Report().to_dict()}

  def resolved(self) -> Corpus:
    """The corpus with split='auto' replaced by the split to use."""
    if self.split.split != 'auto':
      return self
    enough = int(FEW / self.split.val_fraction) if self.split.val_fraction else FEW
    documents = (d for _, side, d, _ in self.kept() if side is None and not d.continues)
    found = sum(1 for _ in islice(documents, enough))
    split = dataclasses.replace(self.split, split='tail' if found < enough else 'document')
    return dataclasses.replace(self, split=split)

  def shard(self, index: int, count: int) -> Corpus:
    """The part `index` of `count`: whole files, in order, of about equal size. Raises ConfigError."""
    if self.split.split != 'document' and any(side is None for side, _ in self.sides):
      raise ConfigError(f'config.data.split: {self.split.split} needs all text in one process; for shards set '
                        'document, or name the validation data by config.data.val_path')
    for name in ('deduplicate', 'deduplicate_normalized'):
      if getattr(self.filters, name):
        raise ConfigError(f'config.data.filters.{name}: compares all documents, which shards cannot; set it to '
                          'False, or prepare the data in one process')
    return dataclasses.replace(self, sides=tuple((side, source.shard(index, count)) for side, source in self.sides))

  def notes(self) -> list[str]:
    """What was left out or read in another way, and warnings about the files."""
    return [note for _, source in self.sides for note in (*source.notes, *separator_notes(source))]

  def train_texts(self, parts: tuple[str, ...]) -> Iterator[str]:
    """Texts of the training split, about FIT_BYTES at most, sampled by their hash."""
    rate = FIT_BYTES / max(FIT_BYTES, sum(sum(source.sizes()) for _, source in self.sides))
    left = 2 * FIT_BYTES  # file sizes are too small for compressed files and endless sources
    for _, dealt in self.documents():
      for side, document in dealt:
        if side == 'train' and int.from_bytes(content_hash(document)[4:8], 'big') < rate * 2**32:
          yield from self._texts(document, parts)
          left -= size(document)
      if left <= 0:
        return

  def all_texts(self, parts: tuple[str, ...]) -> Iterator[str]:
    for _, _, document, _ in self.kept():
      yield from self._texts(document, parts)

  def _texts(self, document: Document, parts: tuple[str, ...]) -> Iterator[str]:
    if self.template is not None:
      return map(self.template.plain_text, conversations_of(document))
    return (content for part in parts if isinstance(content := getattr(document, part), str))

  def first(self) -> Document | None:
    """The first document, which determines what all of them hold."""
    return next((document for _, _, document, _ in self.kept()), None)

  def dtype_of_ids(self) -> str | None:
    """The type of the token ids that the documents are, uint8 for bytes; None: they are texts."""
    first = self.first()
    return first.text.dtype.name if first is not None and isinstance(first.text, np.ndarray) else None

  def fingerprint(self) -> dict:
    """`contents` with the hashes of the files."""
    return self.contents() | {'files': [source.fingerprint(self.hashes) for _, source in self.sides]}

  def contents(self) -> dict:
    """Everything that determines the documents of each split; the same on any machine with the same files."""
    return {'sides': [[side, [[file.name, size] for file, size in zip(source.files, source.sizes(), strict=True)],
                       list(source.formats), _reading(source)] for side, source in self.sides],
            'split': dataclasses.asdict(self.split), 'filters': dataclasses.asdict(self.filters),
            'on_bad_record': self.on_bad_record, 'rules': RULES_VERSION,
            **({'template': self.template.identity} if self.template else {})}

  def _bad(self, record: BadRecord, report: Report) -> None:
    message = f'{record.where}: {record.why}' if record.where else record.why
    if self.on_bad_record == 'fail':
      files = [file for _, source in self.sides for file in source.files]
      raise DataError(message + encodings(files, [fmt for _, source in self.sides for fmt in source.formats]))
    report.bad(message)
    if report.num_bad >= 1000:
      self._check_bad(report)

  def _check_bad(self, report: Report) -> None:
    if report.num_bad > self.max_bad_fraction * report.num_in:
      raise DataError(f'{self.name}: {report.num_bad} of {report.num_in} records are bad, more than '
                      f'config.data.max_bad_fraction {self.max_bad_fraction} allows; the first: {report.first_bad}')


def _with_what_follows(records: Iterator[tuple[Position, Document | BadRecord]]) -> Iterator[
    tuple[Position, Document | BadRecord, bool]]:
  """(position, item, whether the next item is a further piece of this one)."""
  for (position, item), following in pairwise(chain(records, [None])):  # type: ignore[misc]
    goes_on = following is not None and isinstance(following[1], Document) and following[1].continues
    yield position, item, goes_on


def _reason(document: Document, rules: Callable[[Content], str | None], seen: Deduplicator | None) -> str | None:
  if not size(document):
    return 'empty'
  if (reason := rules(document.text)) is not None:
    return reason
  return seen.seen(*parts_of(document)) if seen is not None else None


def _reading(source: Source) -> dict:
  """The fields of the source's config that change its documents."""
  ignored = ('path', 'weight', 'val_path', 'test_path')
  return {f: v for f, v in dataclasses.asdict(source.config).items() if f not in ignored and v is not None}


def key_of(recipe: object) -> str:
  return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def fit_tokenizer(name: str, config: TokenizerConfig, corpora: Iterable[Corpus], cache_dir: Path,
                  parts: tuple[str, ...] = PARTS) -> tuple[Tokenizer, str]:
  """(the tokenizer fitted to the training splits of all corpora, its key); made once and kept in the cache."""
  corpora = list(corpora)
  settings = {field: value for field, value in dataclasses.asdict(config).items() if field != 'own' or value}
  key = key_of([name, settings, [corpus.fingerprint() for corpus in corpora], store.VERSION,
                *(parts if parts != PARTS else ()), *TOKENIZERS.code(name)])
  path = cache_dir / 'tokenizers' / f'{name}-{key}.json'
  with lease(path) or contextlib.nullcontext(), locked(path):
    if not path.exists():
      begin = time.perf_counter()
      # Characters that occur only in validation need an id too; everything else is learnt from the training split.
      texts = ((t for corpus in corpora for t in corpus.all_texts(parts)) if name == 'char' else
               (t for corpus in corpora for t in corpus.train_texts(parts)))
      size_of_all = sum(sum(source.sizes()) for corpus in corpora for _, source in corpus.sides)
      with Progress(f'fitting the {name} tokenizer'):
        tokenizer = TOKENIZERS[name].fit(_shown(texts, name, min(size_of_all, FIT_BYTES)), config)
      try:
        write_whole(path, tokenizer.to_json())
      except OSError as e:
        raise StorageError(f'{path}: cannot be written: {e.strerror or e}') from None
      print(f'data: {name} tokenizer of {len(tokenizer.token_bytes)} tokens '
            f'made in {time.perf_counter() - begin:.1f} s', flush=True)
    return load_tokenizer(path), key


def _shown(texts: Iterable[str], name: str, total: int) -> Iterator[str]:
  with progress_bar(f'reading text for the {name} tokenizer', total, 'B') as bar:
    for text in texts:
      yield text
      bar.update(min(len(text), total - bar.n))


def make_store(corpus: Corpus, tokenizer: Tokenizer | None, folder: Path, dtype: str, shard_tokens: int,
               takes_ids: bool, about: dict, encoder_tokenizer: Tokenizer | None = None, *,
               notes: Callable[[], list[str]]) -> bool:
  """Writes the store and returns True if it is missing; resumes the work of a killed process.

  Raises DataError, StorageError.
  """
  with locked(folder):
    if folder.exists():
      return False
    try:
      aside = folder.with_name(f'{folder.name}.partial')
      writer = writer_of(tokenizer)(aside, tokenizer, dtype, shard_tokens, takes_ids, encoder_tokenizer)
      with contextlib.closing(writer):
        _write(corpus, writer, folder, about, notes)
      return True
    except OSError as e:
      raise StorageError(f'{folder}: cannot be written: {e.strerror or e}') from None


def _write(corpus: Corpus, writer: StoreWriter, folder: Path, about: dict,
           notes: Callable[[], list[str]]) -> None:
  sizes = [source.sizes() for _, source in corpus.sides]
  total = sum(map(sum, sizes))
  num_files = sum(len(source.files) for _, source in corpus.sides)
  print(f'data: {corpus.name}: {num_files} file(s), {total / 1e6:.1f} MB; kept in {folder}', flush=True)
  reading = writer.reader_state or corpus.start()
  seen_file = writer.folder / SEEN
  seen = corpus.deduplicator(seen_file.read_bytes() if seen_file.exists() else b'')
  committed = time.monotonic()
  with progress_bar(f'tokenizing {corpus.name}', total, 'B', initial=_bytes_before(sizes, reading['position'])) as bar:
    for state, parts in chunks(corpus.documents(reading, seen)):
      for split in SPLITS:
        writer.write(f'{split}{overlap.ENDING}', overlap.keys(d for side, d in parts if side == split))
      writer.add(parts)
      if time.monotonic() - committed > COMMIT_SECONDS:
        writer.write(SEEN, np.frombuffer(seen.new_hashes(), np.uint8))
        writer.commit(state())
        committed = time.monotonic()
      read = sum(count['bytes'] for count in writer.counts.values())
      before = _bytes_before(sizes, state()['position'])
      bar.update(max(0, min(max(read, before), total) - bar.n))
  if (changed := corpus.hashes.changed()) is not None:
    shutil.rmtree(writer.folder)  # it may hold parts of both versions
    raise DataError(f'{changed}: changed while it was read; start again when it is complete')
  report = Report.from_dict(reading['report'])
  report.notes = notes()
  report.overlap = overlap.compare(lambda name: writer.column(name, np.uint64))
  for line in report.lines():
    print(f'data: {corpus.name}: {line}', flush=True)
  about = {**about, 'report': report.to_dict(), 'split': dataclasses.asdict(corpus.split)}
  writer.finish(folder, about)


def memory_stores(dealt: Iterable[tuple[str, Document]], sides: tuple[str, ...], tokenizer: Tokenizer | None,
                  encoder_tokenizer: Tokenizer | None = None) -> dict[str, TokenStore]:
  """Stores of the (split, document) pairs in memory, for small data that is used once."""
  with tempfile.TemporaryDirectory() as folder:
    writer = writer_of(tokenizer)(
        Path(folder) / 'partial', tokenizer, 'uint32', 1 << 40, encoder_tokenizer=encoder_tokenizer)
    for _, parts in chunks((None, [pair]) for pair in dealt):
      writer.add(parts)
    writer.finish(Path(folder) / 'store', {})
    stores = {side: open_split(Path(folder) / 'store', side) for side in sides}
    return {side: dataclasses.replace(s, tokens=np.array(s.tokens[:]), mapped={}, starts=np.array(s.starts),
                                      answers=None if s.answers is None else np.array(s.answers),
                                      seconds=None if s.seconds is None else np.array(s.seconds),
                                      learnt=None if s.learnt is None else np.array(s.learnt[:]))
            for side, s in stores.items()}


def _bytes_before(sizes: list[list[int]], position: tuple[int, int, int]) -> int:
  part, file, _ = position
  return sum(map(sum, sizes[:part])) + (sum(sizes[part][:file]) if part < len(sizes) else 0)
