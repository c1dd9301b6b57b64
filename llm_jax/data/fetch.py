"""Downloads: once, into a cache, checked against a sha256."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from llm_jax.errors import DataError, StorageError
from llm_jax.progress import progress


def is_url(path: str) -> bool:
  return urlsplit(path).scheme in ('http', 'https')


def fetch(url: str, sha256: str | None, cache_dir: Path) -> Path:
  """The local copy of `url`. Raises DataError when it cannot be had or its sha256 differs, and StorageError."""
  name = Path(urlsplit(url).path).name or 'download'
  target = cache_dir / 'downloads' / hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16] / name
  if target.exists():
    return target
  by_hand = 'download it elsewhere and pass the file: --config.data.path=FILE'
  partial = target.with_name(f'{name}.{os.getpid()}.partial')
  digest = hashlib.sha256()
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    out = open(partial, 'wb')  # noqa: SIM115
  except OSError as e:
    raise StorageError(f'{target.parent}: cannot be written ({e.strerror}); set --config.data.cache_dir or '
                       'LLM_JAX_CACHE to a folder that can') from None
  try:
    with out, urllib.request.urlopen(url, timeout=30) as response:
      size = int(response.headers.get('Content-Length') or 0)
      with progress(f'fetching {name}', size or None, 'B') as bar:
        while chunk := response.read(1 << 20):
          out.write(chunk)
          digest.update(chunk)
          bar.update(len(chunk))
    if size and partial.stat().st_size != size:
      raise DataError(f'{url}: the connection broke after {partial.stat().st_size} of {size} bytes; start again')
    if sha256 and digest.hexdigest() != sha256:
      raise DataError(f'{url}: sha256 is {digest.hexdigest()}, config.data.sha256 wants {sha256}: the file differs')
    os.replace(partial, target)
  except (OSError, http.client.HTTPException) as e:  # URLError is an OSError; an answer cut in a chunk is not
    reason = getattr(e, 'reason', None) or e
    raise DataError(f'{url}: cannot be downloaded ({reason}); without a network {by_hand}') from None
  finally:
    partial.unlink(missing_ok=True)
  return target
