"""manifest.json of a checkpoint: size and hash of each of its files. A step counts only if it has one.

A run's folder has one too, of its config and tokenizers.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from llm_jax.base.errors import StorageError
from llm_jax.base.files import MANIFEST, sync_folder, write_file
from llm_jax.base.seal import file_hash, seal, unseal, value_hash

VERSION = 1
CONFIG = 'config.json'


class DamagedError(Exception):
  """What is wrong with a checkpoint."""


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
  """Writes the manifest of all files in the folder, after these are on disk. Raises OSError."""
  paths = [path for path in sorted(folder.rglob('*')) if path.is_file() and path != folder / MANIFEST]
  files = {path.relative_to(folder).as_posix(): file_hash(path, sync=True) for path in paths}
  for each in (path for path in folder.rglob('*') if path.is_dir()):
    sync_folder(each)
  write_file(folder / MANIFEST, seal({'version': VERSION, **values, 'files': files}), durable=True)


def commit(folder: Path, final: Path, values: dict[str, Any]) -> None:
  """Writes the manifest of a complete folder and gives the folder its final name. Raises OSError."""
  write_manifest(folder, values)
  os.rename(folder, final)
  sync_folder(final.parent)


def step_manifest(folder: Path) -> dict[str, Any]:
  """The manifest of a checkpoint. Raises OSError and ValueError."""
  values = unseal((folder / MANIFEST).read_bytes())
  if values['version'] != VERSION:
    raise ValueError(f'version {values["version"]} is not {VERSION}; update llm_jax')
  return values


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
  """What is wrong with a checkpoint, by file; [] if nothing is. Reads every `parts`-th of its files, from `part` on."""
  try:
    manifest = step_manifest(folder)
  except (OSError, ValueError, KeyError) as e:
    return [f'{MANIFEST}: {reason(e)}']
  if folder.name.partition('.')[0] != str(manifest['step']):
    return [f'{MANIFEST}: is of step {manifest["step"]}']
  found = []
  for name in sorted(manifest['files'], key=lambda name: manifest['files'][name]['bytes'])[part::parts]:
    wanted = manifest['files'][name]
    try:
      size = (folder / name).stat().st_size
      if size != wanted['bytes']:
        found.append(f'{name}: has {size} bytes instead of {wanted["bytes"]}')
      elif file_hash(folder / name) != wanted:
        found.append(f'{name}: its content has changed')
    except OSError as e:
      found.append(f'{name}: {reason(e)}')
  return found


def reason(error: BaseException) -> str:
  """The first line of an error, or what the operating system said, without the path."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if found := re.search(r"([^:]+) \[os_error_code='", str(error)):  # TensorStore's
    return found[1].strip()
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def write_run_manifest(workdir: Path, names: tuple[str, ...]) -> None:
  """Writes the manifest of a run's config and tokenizers. Raises OSError."""
  files = {name: file_hash(workdir / name) for name in names}
  write_file(workdir / MANIFEST, seal({'version': VERSION, 'model': model_hash(workdir), 'files': files}), durable=True)


def model_hash(workdir: Path) -> str:
  """The hash of what config.json says of the model and its losses. Raises OSError and ValueError."""
  config = json.loads((workdir / CONFIG).read_bytes())
  return value_hash([config.get('model'), config.get('loss')])


def check_run_files(workdir: Path) -> None:
  """Raises StorageError if a run's tokenizer or model config is not as the run wrote it; runs of before have no
  manifest. For other changes of config.json, which a user may make, it prints a warning."""
  path = workdir / MANIFEST
  if not path.exists():
    return
  try:
    manifest = unseal(path.read_bytes())
    changed = [name for name, wanted in manifest['files'].items() if file_hash(workdir / name) != wanted]
    same_model = CONFIG not in changed or model_hash(workdir) == manifest['model']
  except (OSError, ValueError, KeyError, AttributeError) as e:
    raise StorageError(f'{path} or a file that it lists is damaged: {reason(e)}; the command that trained the run '
                       'writes them anew with its next step') from None
  if problem := [name for name in changed if name != CONFIG or not same_model]:
    raise StorageError(f'{workdir / problem[0]} is not as the run wrote it (its hash is another than in {MANIFEST}); '
                       f'copy it back, or delete {path} to use it as it is')
  if changed:
    print(f'WARNING: {workdir / CONFIG} was changed after the run wrote it', file=sys.stderr, flush=True)
