"""DataConfig: the data to train on, and how it is turned into rows of tokens."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

from llm_jax.base.builder import Sections, keep_named, known_names, sections
from llm_jax.base.errors import ConfigError
from llm_jax.base.runtime import user_cache
from llm_jax.data.loaders import LOADERS
from llm_jax.data.rows.augment import Augment
from llm_jax.data.rows.tasks import TASKS, Task
from llm_jax.data.sources.documents import SourceConfig
from llm_jax.data.sources.filters import FilterConfig
from llm_jax.data.sources.splits import SplitConfig
from llm_jax.data.stores.token_files import DTYPES
from llm_jax.data.tokenizers.tokenizer import TOKENIZERS


@dataclasses.dataclass(frozen=True)
class DataConfig(SourceConfig, SplitConfig):
  """The data to train on, and how it is turned into rows of tokens. If `sources` is empty, it is the only source."""

  sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)  # a mixture, by name
  weights_from: tuple[int, ...] = (0,)  # the steps at which the sources' 1st, 2nd, ... weights begin
  on_bad_record: Literal['fail', 'skip'] = 'fail'  # what a damaged record does: end the run, or be left out and counted
  max_bad_fraction: float = 0.01  # of all records, if bad ones are skipped
  filters: FilterConfig = FilterConfig()

  # One of TOKENIZERS; a tokenizer.json, a vocab.json with merges.txt, a SentencePiece .model; tiktoken:NAME; none.
  tokenizer: str = 'bpe'
  # Of the prompts of seq2seq: one of TOKENIZERS, or a file; `tokenizer` is then that of answers. None: the same.
  encoder_tokenizer: str | None = None
  vocab_size: int = 8192  # of bpe; maximum for word. The same for both tokenizers
  min_frequency: int = 1  # of a word, or of a pair merged by bpe
  special_tokens: Literal['text', 'parse'] = 'text'  # what spelled special tokens are: text, or the token
  pattern: str | None = None  # regular expression for words; None: the one in extras/word_tokenizer.py

  task: str = 'next_token'  # one of TASKS; its settings are in the section of its name
  sections: Sections = sections(TASKS, TOKENIZERS)
  augment: Augment = Augment()
  seq_len: int = 1024  # tokens in a row, at least 1
  encoder_len: int = 512  # for tasks with an encoder
  packing: Literal['concat', 'best_fit', 'pad'] = 'concat'  # see rows.py
  stride: int | None = None  # distance between window starts; None: seq_len (no overlap)
  truncate: Literal['auto', 'split', 'left', 'right'] = 'auto'  # how to shorten documents longer than a row
  mask_documents: bool = True  # attention and positions stay inside a document

  streaming: bool = False  # tokenize during training, for endless or very large data; see streaming.py
  shuffle_buffer: int = 1024  # rows, when streaming
  cache_mb: int = 0  # memory for tokenized documents, when streaming
  num_workers: int = 0  # processes that make batches; 0: one thread
  shard_tokens: int = 1 << 27  # tokens per file of a store
  verify: bool = False  # check the sha256 of every file of a store when opening it
  remote_cache_gb: float = 50.0  # GB of a store in object storage that are kept on this machine
  cache_dir: str | None = None  # None: $LLM_JAX_CACHE, else ~/.cache/llm_jax
  cache_max_gb: float | None = None  # of the cache, in 10^9 bytes; what is used least is deleted. None: no bound
  cache_max_days: float | None = None  # since the last use, after which an entry is deleted. None: no bound

  def __post_init__(self) -> None:
    problems = []
    if self.task not in TASKS:
      problems.append(f'task {self.task!r} is unknown; {known_names(self.task, TASKS)}')
    else:
      keep_named(self, (self.task, self.tokenizer, self.encoder_tokenizer or ''), 'neither task nor tokenizer names it')
    for field in ('seq_len', 'encoder_len', 'shard_tokens', 'shuffle_buffer', 'max_record_bytes', 'min_frequency'):
      if getattr(self, field) < 1:
        problems.append(f'{field} must be at least 1; got {getattr(self, field)}')
    for field in ('cache_max_gb', 'cache_max_days'):
      if (value := getattr(self, field)) is not None and not value >= 0:
        problems.append(f'{field} must be 0 or more, or None; got {value}')
    for field in ('cache_mb', 'remote_cache_gb', 'num_workers', 'val_documents', 'test_documents'):
      if getattr(self, field) < 0:
        problems.append(f'{field} must not be negative; got {getattr(self, field)}')
    if not 0 <= self.val_fraction < 1:
      problems.append(f'val_fraction must be in [0, 1), 0 for no validation part; got {self.val_fraction}')
    if not 0 <= self.test_fraction < 1 - self.val_fraction:
      problems.append(f'test_fraction must lie in [0, 1 - val_fraction); got {self.test_fraction}')
    if not 0 <= self.max_bad_fraction <= 1:
      problems.append(f'max_bad_fraction must lie in [0, 1]; got {self.max_bad_fraction}')
    if self.split == 'count' and not self.val_documents and self.val_path is None and self.val_fraction:
      problems.append('val_documents must be at least 1 if split is count; for no validation part set val_fraction=0')
    if self.tokenizer not in (*TOKENIZERS, 'none') and not set(self.tokenizer) & set('./:'):
      problems.append(f'tokenizer {self.tokenizer!r} is unknown, and not a path ending in .json or .model, nor '
                      f'tiktoken:NAME; {known_names(self.tokenizer, [*TOKENIZERS, "none"], extensible=True)}')
    if self.encoder_tokenizer is not None:
      problems += self._encoder_tokenizer_problems(self.encoder_tokenizer)
    if 'bpe' in (self.tokenizer, self.encoder_tokenizer) and self.vocab_size < 257:
      problems.append(f'vocab_size must be at least 257 (256 bytes and one special token); got {self.vocab_size}')
    if not self.vocab_size < 2**31:
      problems.append(f'vocab_size must be below 2^31; got {self.vocab_size}')
    if self.stride is not None and not 1 <= self.stride <= self.seq_len:
      problems.append(f'stride must lie in [1, seq_len], or be None; got {self.stride}')
    if list(self.weights_from) != sorted(set(self.weights_from)) or self.weights_from[:1] != (0,):
      problems.append(f'weights_from must begin with 0 and ascend; got {self.weights_from}')
    for name, source in self.sources.items():
      if len(source.weight) != len(self.weights_from) or min(source.weight) < 0:
        problems.append(f'sources.{name}.weight must hold {len(self.weights_from)} number(s) of 0 or more, one for '
                        f'each of weights_from {self.weights_from}; got {source.weight}')
    stages = [] if problems else zip(*(source.weight for source in self.sources.values()), strict=True)
    if not all(map(sum, stages)):
      problems.append('sources: the weights of one stage are all 0')
    if self.special_tokens == 'parse' and self.task in TASKS and self.task_settings.chats:
      problems.append(f'special_tokens must be text for task {self.task}: contents that spell special tokens would end '
                      'turns; the template writes those tokens itself')
    if self.streaming:
      problems += LOADERS['stream'].problems(self)
    if problems:
      raise ValueError('\n'.join(problems))

  def _encoder_tokenizer_problems(self, name: str) -> list[str]:
    fits = self.task not in TASKS or TASKS[self.task].encoder_tokenizer
    tasks = [] if fits else [task for task in TASKS if TASKS[task].encoder_tokenizer]
    return [f'encoder_tokenizer {name!r} {message}' for wrong, message in (
        (name not in TOKENIZERS and not set(name) & set('./:'),
         'is unknown, and not a path ending in .json or .model, nor tiktoken:NAME; set it to None to use tokenizer for '
         f'both sides; {known_names(name, TOKENIZERS)}'),
        (not fits, f'is for task {" or ".join(tasks)}, where an encoder reads the prompts; the task is {self.task!r}: '
         'set it to None'),
        (self.tokenizer == 'none', 'needs a tokenizer for the answers too, but tokenizer is none')) if wrong]

  def check_paths(self) -> None:
    """Raises ConfigError for a source without a path, or with settings that no file can have."""
    from llm_jax.data.formats.encoding import check_encoding
    from llm_jax.data.formats.registry import check_format
    for name, source in self.named_sources.items():
      section = f'config.data.sources.{name}' if self.sources else 'config.data'
      check_format(source.format, section)
      check_encoding(source.encoding)
      if source.dtype is not None and source.dtype not in DTYPES:
        raise ConfigError(f'{section}.dtype: {source.dtype!r} is not one of {", ".join(DTYPES)}')
      if source.sha256 is not None and not re.fullmatch('[0-9a-fA-F]{64}', source.sha256):
        raise ConfigError(f'{section}.sha256: must be 64 hexadecimal digits; got {source.sha256!r}')
      if not source.path:
        field = f'{section}.path'
        raise ConfigError(f"{field} is empty: name your data, a file, a folder, a glob ('notes/**/*.md') or a URL, "
                          f"with --{field}=PATH; for a first try, set --{field}=stdlib, the source code of Python's "
                          'standard library')

  @property
  def task_settings(self) -> Task:
    """The task with its settings."""
    return self.sections.get(self.task) or TASKS.settings(self.task)()

  @property
  def named_sources(self) -> dict[str, SourceConfig]:
    own = SourceConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(SourceConfig)})
    return self.sources or {'data': own}


def cache_dir(config: DataConfig) -> Path:
  return Path(config.cache_dir).expanduser() if config.cache_dir else user_cache()
