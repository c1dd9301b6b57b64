"""Sources with a name: enwik8, and generated ones: random ids and tables of modular arithmetic."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llm_jax.base.errors import ConfigError, DataError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.formats.registry import FORMATS
from llm_jax.data.loaders import SOURCES
from llm_jax.data.sources.documents import Document, File, SourceConfig, is_url, shown
from llm_jax.extras import fetch
from llm_jax.extras.archives import unpack

ENWIK8_URL = 'http://mattmahoney.net/dc/enwik8.zip'  # the environment variable LLM_JAX_ENWIK8_URL overrides it
ENWIK8_SIZE = 100_000_000
ENWIK8_SHA1 = '57b8363b814821dc9d47aa4d41f58733519076b2'  # published at mattmahoney.net/dc/textdata.html

PIECE = 1 << 16  # ids of one synthetic document
OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    'add': lambda a, b, p: (a + b) % p,
    'sub': lambda a, b, p: (a - b) % p,
    'mul': lambda a, b, p: a * b % p,
    'div': lambda a, b, p: a * _inverses(p)[b] % p,
}
MAX_MODULUS = 2003  # 4 million equations; they are sorted in memory


def enwik8(cache_dir: Path, url: str | None = None, size: int = ENWIK8_SIZE, sha1: str = ENWIK8_SHA1) -> Path:
  """The first 10^8 bytes of a Wikipedia dump of 2006, checked at every call. Raises DataError, StorageError."""
  url = url or os.environ.get('LLM_JAX_ENWIK8_URL') or ENWIK8_URL
  archive = fetch.fetch(url, None, cache_dir) if is_url(url) else Path(url).expanduser()
  folder = unpack(archive, cache_dir)
  path, problem = folder / 'enwik8', 'it holds no file enwik8'
  if path.is_file():
    with open(path, 'rb') as f:
      found = (path.stat().st_size, hashlib.file_digest(f, 'sha1').hexdigest())
    if found == (size, sha1):
      return path
    problem = f'its enwik8 has {found[0]} bytes with sha1 {found[1]}; the published file has {size} and {sha1}'
  shutil.rmtree(folder, ignore_errors=True)  # a wrong file must not stay in the cache
  if is_url(url):
    fetch.forget(url, None, cache_dir)
  raise DataError(f'{shown(url)}: {problem}; set LLM_JAX_ENWIK8_URL to a URL or file of the right enwik8.zip')


def synthetic(file: File, config: SourceConfig) -> Iterator[Document]:
  """'synthetic:VOCAB:TOKENS': uniform random ids, the same on any machine, in documents of 65536 ids.

  The default is 32768:10000000. For benchmarks: the ids cost little and nothing can be learnt (loss ln VOCAB).
  """
  del config
  vocab_size, num_tokens = _numbers(file.name, 'synthetic:VOCAB:TOKENS', (32768, 10_000_000))
  if not 1 <= vocab_size <= 1 << 31 or num_tokens < 1:
    raise ConfigError(f'config.data.path: {file.name}: VOCAB must lie in 1..2^31 and TOKENS be at least 1')
  # A generator's raw bits are the same in every version of NumPy; its distributions may change.
  bits = np.random.PCG64(np.random.SeedSequence([vocab_size]))
  for number, begin in enumerate(range(0, num_tokens, PIECE), 1):
    raw = bits.random_raw(PIECE // 2).view(np.uint32)[:num_tokens - begin].astype(np.uint64)
    yield Document(f'{file.name}:{number}', (raw * np.uint64(vocab_size) >> np.uint64(32)).astype(np.int64))


def modular(file: File, config: SourceConfig) -> Iterator[Document]:
  """'modular:P:OP': each equation a OP b = c (mod P) once, as ids (a, P, b, P + 1) with the answer (c,).

  P is the id of the operation and P + 1 that of the equals sign. OP is add, sub, mul or div (P prime, b not 0); default
  97:div, as in Power et al. 2022, arXiv 2201.02177. The order is fixed and pseudo-random: any part is a fair sample.
  """
  del config
  name, *rest = file.name.split(':')
  operation = rest.pop() if rest and not rest[-1].isdecimal() else 'div'
  (p,) = _numbers(':'.join([name, *rest]), 'modular:P:OP', (97,))
  if operation not in OPERATIONS:
    raise ConfigError(f'config.data.path: {file.name}: {operation!r} is unknown; known: {", ".join(OPERATIONS)}')
  if not 2 <= p <= MAX_MODULUS:
    raise ConfigError(f'config.data.path: {file.name}: P must lie in 2..{MAX_MODULUS}')
  if operation == 'div' and any(p % d == 0 for d in range(2, int(p**0.5) + 1)):
    raise ConfigError(f'config.data.path: {file.name}: division needs a prime P; {p} is not prime')
  a, b = (x.ravel() for x in np.indices((p, p)))
  if operation == 'div':
    a, b = a[b > 0], b[b > 0]
  c = OPERATIONS[operation](a, b, p)
  rows = np.stack([a, np.full_like(a, p), b, np.full_like(a, p + 1)], axis=1)
  bits = np.random.PCG64(np.random.SeedSequence([p, list(OPERATIONS).index(operation)]))
  for i in np.argsort(bits.random_raw(len(rows)), kind='stable'):
    yield Document(f'{file.name}:{a[i]},{b[i]}', rows[i], c[i:i + 1])


def _inverses(p: int) -> np.ndarray:
  """b^-1 mod p for b in 0..p-1, p prime; 0 for b = 0."""
  return np.array([pow(b, p - 2, p) if b else 0 for b in range(p)])


def _numbers(path: str, form: str, defaults: tuple[int, ...]) -> tuple[int, ...]:
  """The numbers after the name in `path`, with defaults for missing ones. Raises ConfigError."""
  given = path.split(':')[1:]
  if len(given) > len(defaults) or not all(re.fullmatch('[0-9]{1,18}', part) for part in given):
    raise ConfigError(f'config.data.path: {path} is not of the form {form}, for example '
                      f'{":".join([form.split(":")[0], *map(str, defaults)])}')
  return (*map(int, given), *defaults[len(given):])


def enwik8_file(config: SourceConfig, cache_dir: Path) -> list[File]:
  """The source `enwik8`."""
  if config.path != 'enwik8':
    raise ConfigError(f'config.data.path: {config.path}: nothing may follow enwik8')
  return [File('enwik8', enwik8(cache_dir), 'bytes')]


def generated(config: SourceConfig, cache_dir: Path) -> list[File]:
  """The sources `synthetic` and `modular`: no file; the readers of the same names generate documents from the path."""
  return [File(config.path, Path(config.path), config.path.split(':')[0])]


register(SOURCES, 'enwik8', enwik8_file)
for _name, _reader in (('synthetic', synthetic), ('modular', modular)):
  register(SOURCES, _name, generated)
  register(FORMATS, _name, _reader, NoSettings)
