"""Downloads, once and verified, into a cache.

http and https use the standard library, other URLs fsspec. Files are stored in `downloads/KEY/files`, and their sizes
and sha256 in `downloads/KEY/about`: a file whose size has changed is downloaded again.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import glob
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote

from llm_jax.base.errors import ConfigError, DataError, StorageError, UserError
from llm_jax.base.progress import progress_bar
from llm_jax.base.redaction import redact, whole_url
from llm_jax.base.registry import register
from llm_jax.data.loaders import SOURCES
from llm_jax.data.sources.documents import File, SourceConfig, shown
from llm_jax.data.stores.checks import file_sha256

TIMEOUT = 30  # seconds without a byte
RETRY_SECONDS = 1.0  # before a broken download is resumed
MAX_TRIES = 20
STALE_SECONDS = 7 * 86400  # an older partial file was left by a killed process
NUM_THREADS = 8  # for downloading a folder
BY_HAND = 'without a network download it elsewhere and pass the file: --config.data.path=FILE'


def files_at_url(config: SourceConfig, cache_dir: Path) -> list[File]:
  """The source `url`: local copies of the files."""
  return [File(name, local) for name, local in fetch_all(config.path, config.sha256, cache_dir)]


def fetch(url: str, sha256: str | None, cache_dir: Path) -> Path:
  """The local copy of one file. Raises DataError if the download fails or its sha256 differs, and StorageError."""
  found = fetch_all(url, sha256, cache_dir)
  if len(found) != 1:
    raise DataError(f'{shown(url)}: holds {len(found)} files, but one is needed')
  return found[0][1]


def fetch_all(url: str, sha256: str | None, cache_dir: Path) -> list[tuple[str, Path]]:
  """(name relative to the URL, local copy) of a file, or of all files of a folder or glob that are not hidden, sorted.

  A folder or glob is listed once; delete its folder in the cache to list it again.
  Raises DataError, StorageError, and ConfigError if a package is missing.
  """
  url = whole_url(url)
  folder = _folder(url, sha256, cache_dir)
  try:
    (folder / 'about').mkdir(parents=True, exist_ok=True)
    (folder / 'partial').mkdir(exist_ok=True)
  except OSError as e:
    raise _unwritable(folder, e) from None
  if _scheme(url) in ('http', 'https'):
    name = url.split('?')[0].split('#')[0].split('://')[1].partition('/')[2].rpartition('/')[2][-100:]
    name = name if name.strip('.') else 'download'
    return [(name, _once(url, folder, name, sha256, lambda out: _download(url, name, out)))]
  return _fetch_by_fsspec(url, sha256, folder)


def forget(url: str, sha256: str | None, cache_dir: Path) -> None:
  """Deletes the downloads of the URL from the cache."""
  shutil.rmtree(_folder(whole_url(url), sha256, cache_dir), ignore_errors=True)


def aside(folder: Path) -> Path:
  """A unique path in `folder` for a temporary file; deletes old ones that killed processes left."""
  for left in folder.glob('*.partial'):
    with contextlib.suppress(OSError):  # already gone: its process is still alive
      if time.time() - left.stat().st_mtime > STALE_SECONDS:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
  return folder / f'{uuid.uuid4().hex}.partial'


def _scheme(url: str) -> str:
  return url.split('://')[0].lower()


def _folder(url: str, sha256: str | None, cache_dir: Path) -> Path:
  return cache_dir / 'downloads' / hashlib.sha256(f'{url} {sha256}'.encode()).hexdigest()[:16]


def _unwritable(path: Path, e: OSError) -> StorageError:
  return StorageError(f'{path}: cannot be written ({e.strerror or e}); set --config.data.cache_dir or '
                      'LLM_JAX_CACHE to a writable folder with free space')


def _once(url: str, folder: Path, name: str, sha256: str | None, download: Callable[[BinaryIO], str]) -> Path:
  """The file `name` in `folder`, after a check; if missing, `download` writes it and returns its sha256."""
  target, about = folder / 'files' / name, folder / 'about' / f'{name}.json'
  known = _known(about)
  if known and target.is_file():
    size = target.stat().st_size
    if size == known['size'] and (not sha256 or file_sha256(target) == sha256):
      return target
    print(f'data: {target} ({size} bytes) differs from the download of {shown(url)} ({known["size"]} bytes); '
          'downloading it again', flush=True)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    about.parent.mkdir(parents=True, exist_ok=True)
    partial = aside(folder / 'partial')
    out = open(partial, 'wb')  # noqa: SIM115
  except OSError as e:
    raise _unwritable(target.parent, e) from None
  try:
    with out:
      digest = download(out)
      out.flush()
      os.fsync(out.fileno())  # otherwise a power failure could leave zeros of the right size
    if sha256 and digest != sha256:
      raise DataError(f'{shown(url)}: sha256 is {digest}, but config.data.sha256 is {sha256}')
    if known and digest != known['sha256']:
      raise DataError(f'{shown(url)}: is no longer the file that was downloaded before (sha256 {digest}, was '
                      f'{known["sha256"]}); to use the new one, delete {folder}')
    size = partial.stat().st_size
    os.replace(partial, target)
    _note(about, {'url': shown(url), 'size': size, 'sha256': digest}, folder)
  except OSError as e:
    raise _unwritable(target.parent, e) from None
  finally:
    partial.unlink(missing_ok=True)
  return target


def _known(about: Path) -> Any:
  """The JSON value in a file; None: missing or invalid."""
  try:
    return json.loads(about.read_text())
  except (OSError, ValueError):
    return None


def _note(path: Path, content: Any, folder: Path) -> None:
  """Writes JSON atomically."""
  note = aside(folder / 'partial')
  note.write_text(json.dumps(content))
  os.replace(note, path)


# http and https.

def _download(url: str, name: str, out: BinaryIO) -> str:
  """Writes the response to `out` and returns its sha256; resumes after a broken connection."""
  digest, done, best, size, validator = hashlib.sha256(), 0, 0, 0, None
  with contextlib.ExitStack() as stack:
    bar = None
    for number in range(1, MAX_TRIES + 1):
      why = None
      try:
        with urllib.request.urlopen(_request(url, done, validator), timeout=TIMEOUT) as response:
          if done and not _goes_on(response, done, size):
            digest, done = hashlib.sha256(), 0
            out.seek(0)
            out.truncate()
          if not done:
            size = int(response.headers.get('Content-Length') or 0)
            validator = _validator(response)
          bar = bar if bar is not None else stack.enter_context(progress_bar(f'fetching {name}', size or None, 'B'))
          bar.n = done
          while chunk := response.read(1 << 20):
            _write(out, chunk)
            digest.update(chunk)
            done += len(chunk)
            bar.update(len(chunk))
      except (OSError, http.client.HTTPException, ValueError) as e:  # URLError is an OSError
        why = _reason(e, url)
      if why is None and done >= size:
        return digest.hexdigest()
      if done <= best or number == MAX_TRIES:  # no progress since the last try
        break
      best = done
      time.sleep(RETRY_SECONDS)
  if why is None or done:
    raise DataError(f'{shown(url)}: the connection broke after {done} of {size or "?"} bytes'
                    f'{f" ({why})" if why else ""}; start again, or {BY_HAND}')
  raise DataError(f'{shown(url)}: cannot be downloaded ({why}); {BY_HAND}')


def _request(url: str, done: int, validator: str | None) -> urllib.request.Request:
  """A request for the bytes from `done` on, if the file still matches `validator`."""
  scheme, rest = url.split('://', 1)
  user, _, bare = rest.rpartition('@') if '@' in re.split('[/?#]', rest)[0] else ('', '', rest)
  request = urllib.request.Request(f'{scheme}://{bare}')
  if user:
    login = base64.b64encode(unquote(user).encode()).decode()
    request.add_unredirected_header('Authorization', f'Basic {login}')  # not sent to other hosts after a redirect
  if done and validator:
    request.add_header('Range', f'bytes={done}-')
    request.add_header('If-Range', validator)
  return request


def _validator(response: Any) -> str | None:
  """The ETag or date that identifies this version of the file."""
  etag = response.headers.get('ETag')
  return etag if etag and not etag.startswith('W/') else response.headers.get('Last-Modified')


def _goes_on(response: Any, done: int, size: int) -> bool:
  """Whether the response is the rest of the file, not all of it."""
  return response.status == 206 and response.headers.get('Content-Range') == f'bytes {done}-{size - 1}/{size}'


def _write(out: BinaryIO, chunk: bytes) -> None:
  try:
    out.write(chunk)
  except OSError as e:
    raise _unwritable(Path(out.name), e) from None


def _reason(e: Exception, url: str) -> str:
  """The error's text, without the URL's password and query."""
  reason = getattr(e, 'reason', None) or e
  text = f'HTTP {e.code}: {reason}' if isinstance(e, urllib.error.HTTPError) else str(reason) or type(e).__name__
  user = re.match('[^:]+://([^/?#]*)@', url)
  # The text may hold only part of user:password, if a library cut the URL at the colon.
  for secret in [url.partition('?')[2], *([user[1], user[1].rpartition(':')[2]] if user else [])]:
    text = text.replace(secret, '...') if secret else text
  return redact(text)


# Every other file system, by fsspec.

def _fetch_by_fsspec(url: str, sha256: str | None, folder: Path) -> list[tuple[str, Path]]:
  listing = folder / 'listing.json'
  files = _known(listing)
  if files is None:
    files = _list(url)
    try:
      _note(listing, files, folder)
    except OSError as e:
      raise _unwritable(listing, e) from None
  if sha256 and len(files) > 1:
    raise ConfigError(f'config.data.sha256 is for one file; {shown(url)} holds {len(files)}')
  missing = sum(f['size'] or 1 for f in files if not (folder / 'about' / f'{f["name"]}.json').exists())
  bar = progress_bar(f'fetching {len(files)} file(s)', missing, 'B') if missing else None
  with contextlib.closing(bar) if bar is not None else contextlib.nullcontext():
    with ThreadPoolExecutor(NUM_THREADS) as pool:
      jobs = [pool.submit(_once, url, folder, f['name'], sha256, functools.partial(_copy, url, f['remote'], bar))
              for f in files]
      try:
        return [(f['name'], job.result()) for f, job in zip(files, jobs, strict=True)]
      finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, start no more downloads


def _list(url: str) -> list[dict]:
  """Name relative to the URL, path in the file system and size of each file. Raises DataError if there are none."""
  with remote_files(url) as (fs, root):
    if fs.isfile(root):
      return [{'name': PurePosixPath(root).name, 'remote': root, 'size': fs.size(root)}]
    if fs.isdir(root):
      found, top = fs.find(root, detail=True), root
    else:
      found = fs.glob(root, detail=True)
      top = str(PurePosixPath(*takewhile(lambda part: not glob.has_magic(part), PurePosixPath(root).parts)))
    files = []
    for remote, info in sorted(found.items()):
      name = PurePosixPath(remote).relative_to(top)
      if '..' in name.parts:
        raise DataError(f'{shown(url)}: holds {remote!r}, whose name leads out of the folder')
      if info['type'] == 'file' and not any(part.startswith('.') for part in name.parts):
        files.append({'name': str(name), 'remote': remote, 'size': info.get('size')})
  if not files:
    raise DataError(f'{shown(url)}: there is no file or folder of that name, and as a glob it matches nothing')
  return files


def _copy(url: str, remote: str, bar: Any, out: BinaryIO) -> str:
  """Writes the remote file to `out` and returns its sha256."""
  digest, done = hashlib.sha256(), 0
  with remote_files(url) as (fs, _):
    size = fs.size(remote)
    with fs.open(remote, 'rb') as f:
      while chunk := f.read(4 << 20):
        _write(out, chunk)
        digest.update(chunk)
        done += len(chunk)
        if bar is not None:
          bar.update(len(chunk))
  if size is not None and done != size:
    raise DataError(f'{shown(url)}: {remote}: the connection broke after {done} of {size} bytes; start again')
  return digest.hexdigest()


@contextlib.contextmanager
def remote_files(url: str) -> Iterator[tuple[Any, str]]:
  """The URL's file system and the path in it. Errors inside become a DataError or ConfigError."""
  try:
    import fsspec
    from fsspec.registry import known_implementations
  except ImportError:
    raise ConfigError(f"{shown(url)}: needs the package fsspec: pip install 'llm_jax[data]'") from None
  if _scheme(url) not in fsspec.available_protocols():
    raise ConfigError(f'{shown(url)}: no file system is known for {_scheme(url)}://; '
                      'known: gs, s3, hf, http, https, abfs and the others of fsspec')
  try:
    yield fsspec.core.url_to_fs(whole_url(url))
  except UserError:
    raise
  except ImportError:
    package = known_implementations[_scheme(url)]['class'].split('.')[0]
    raise ConfigError(f'{shown(url)}: needs the package {package}: pip install {package}') from None
  except Exception as e:  # each file system has its own exceptions
    raise DataError(f'{shown(url)}: cannot be read ({type(e).__name__}: {_reason(e, url)}); {BY_HAND}') from None


register(SOURCES, 'url', files_at_url)
