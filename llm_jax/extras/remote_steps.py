"""Checkpoints in object storage that are read: a local folder gets the files that hold what is needed of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import StorageError, UnreachableError
from llm_jax.base.files import MANIFEST, write_file
from llm_jax.base.seal import file_hash, seal, unseal
from llm_jax.extras.bucket import Bucket, manifest_of, persistently
from llm_jax.training.manifest import VERSION, DamagedError, reason

AT_ONCE = 64  # files of a checkpoint that are copied between two signs of progress


class RemoteSteps:
  """The steps of a run in storage, and a local folder with a manifest of each that lists the files that are here."""

  def __init__(self, bucket: Bucket, folder: Path):
    self._bucket, self._folder = bucket, folder
    self._values: dict[str, Any] = {}  # of the manifest of the step that was fetched
    self._files: dict[str, Any] = {}

  def note(self, steps: Iterable[int]) -> None:
    """Makes the steps known here, without their files."""
    for step in steps:
      if not (self._folder / manifest_of(step)).is_file():  # of an earlier command, or of one that reads it now
        self._note(step, {'version': VERSION, 'step': step}, {})

  def fetch(self, step: int, items: tuple[str, ...]) -> None:
    """Copies here the files of some items of a step but for shards, such as metadata.

    Raises DamagedError for what differs from the manifest, and UnreachableError.
    """
    from llm_jax.training.orbax_io import ITEMS, is_shard
    with _reaching():
      content = persistently(partial(self._bucket.read, manifest_of(step)))
    try:
      values = unseal(content or b'')
    except ValueError as e:
      raise DamagedError(f'{MANIFEST}: {reason(e)}') from None
    if values['version'] != VERSION:
      raise DamagedError(f'version {values["version"]} is not {VERSION}; update llm_jax')
    others = tuple(f'{item}/' for item in ITEMS if item not in items)
    self._files = {name: file for name, file in values.pop('files').items() if not name.startswith(others)}
    self._values = values
    self._get(step, {name for name in self._files if not is_shard(name, self._files)})

  def fetch_shards(self, step: int, trees: dict[str, Any]) -> None:
    """Copies here this process's shards of `trees`, by item, of the step that was fetched.

    Raises DamagedError, UnreachableError, and ConfigError for other arrays than those of `trees`.
    """
    from llm_jax.training.orbax_io import is_shard, shards_here
    if any(is_shard(name, self._files) for name in self._files):
      wanted = shards_here(self._folder / 'checkpoints' / str(step), trees)
      self._get(step, {name for name in self._files if name in wanted or not is_shard(name, self._files)})

  def _get(self, step: int, names: Collection[str]) -> None:
    """Copies files of a step here that are not here yet, and notes what is here."""
    folder, prefix = self._folder / 'checkpoints' / str(step), f'checkpoints/{step}/'
    with _reaching():
      for some in groups([name for name in sorted(names) if not _is_here(folder / name, self._files[name])]):
        missing = persistently(partial(self._bucket.get, self._folder, [prefix + name for name in some]))
        ACTIVITY.sign()
        for name in missing:
          raise DamagedError(f'{name.removeprefix(prefix)}: is missing')
        for name in some:
          if not _is_here(folder / name, self._files[name]):
            raise DamagedError(f'{name}: its content has changed')
      self._note(step, self._values, {name: self._files[name] for name in names})

  def _note(self, step: int, values: dict[str, Any], files: dict[str, Any]) -> None:
    folder = self._folder / 'checkpoints' / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / MANIFEST, seal({**values, 'files': files}))


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
  """Turns what fails into an UnreachableError."""
  try:
    yield
  except (StorageError, OSError) as e:
    raise UnreachableError(str(e)) from None


def groups(names: list[str]) -> list[list[str]]:
  """The names, AT_ONCE at a time."""
  return [names[i:i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]


def _is_here(path: Path, wanted: dict[str, Any]) -> bool:
  with contextlib.suppress(OSError):
    return path.stat().st_size == wanted['bytes'] and file_hash(path) == wanted
  return False
