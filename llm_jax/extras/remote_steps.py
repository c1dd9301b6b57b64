"""Checkpoints in object storage that are read: a local folder gets the files that hold what is needed of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.errors import StorageError
from llm_jax.base.files import MANIFEST, write_file
from llm_jax.base.seal import file_hash, seal, unseal
from llm_jax.extras.bucket import Bucket, manifest_of
from llm_jax.training.manifest import VERSION, reason

AT_ONCE = 64  # files of a checkpoint that are copied between two signs of progress


class RemoteSteps:
  """The steps of a run in storage, and a local folder with a manifest of each that lists the files that are here."""

  def __init__(self, bucket: Bucket, folder: Path):
    self._bucket, self._folder = bucket, folder

  def note(self, steps: Iterable[int]) -> None:
    """Makes the steps known here, without their files."""
    for step in steps:
      if not (self._folder / manifest_of(step)).is_file():  # of an earlier command, or of one that reads it now
        self._note(step, {'step': step}, {})

  def fetch(self, step: int, trees: dict[str, Any]) -> None:
    """Copies here the files of a step with this process's shards of `trees`, by item.

    Raises StorageError, OSError, and ConfigError for other arrays than those of `trees`.
    """
    from llm_jax.training.orbax_io import ITEMS, is_shard, shards_here
    folder = self._folder / 'checkpoints' / str(step)
    try:
      manifest = unseal(self._bucket.read(manifest_of(step)) or b'')
    except ValueError as e:
      raise StorageError(f'{MANIFEST}: {reason(e)}') from None
    others = tuple(f'{item}/' for item in ITEMS if item not in trees)
    files = {name: file for name, file in manifest.pop('files').items() if not name.startswith(others)}
    common = {name for name in files if not is_shard(name, files)}
    self._get(folder, files, common)
    shards = shards_here(folder, trees) & files.keys() if common != files.keys() else set[str]()
    self._get(folder, files, shards)
    self._note(step, {name: manifest[name] for name in manifest if name != 'version'},
               {name: files[name] for name in common | shards})

  def _get(self, folder: Path, files: dict[str, Any], names: Collection[str]) -> None:
    """Copies files of a step here that are not here yet."""
    for some in groups([name for name in sorted(names) if not _is_here(folder / name, files[name])]):
      self._bucket.get(self._folder, [f'checkpoints/{folder.name}/{name}' for name in some])
      ACTIVITY.sign()

  def _note(self, step: int, values: dict[str, Any], files: dict[str, Any]) -> None:
    folder = self._folder / 'checkpoints' / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / MANIFEST, seal({'version': VERSION, **values, 'files': files}))


def groups(names: list[str]) -> list[list[str]]:
  """The names, AT_ONCE at a time."""
  return [names[i:i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]


def _is_here(path: Path, wanted: dict[str, Any]) -> bool:
  with contextlib.suppress(OSError):
    return path.stat().st_size == wanted['bytes'] and file_hash(path) == wanted
  return False
