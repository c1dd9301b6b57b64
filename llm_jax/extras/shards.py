"""Shards of a store, written by several processes, and their merge into the store that one process would write."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.errors import ConfigError, DataError, StorageError
from llm_jax.base.registry import NoSettings, register
from llm_jax.data.config import DataConfig
from llm_jax.data.loaders import LOADERS
from llm_jax.data.open import store_recipes
from llm_jax.data.sources import overlap
from llm_jax.data.sources.filters import Report
from llm_jax.data.sources.splits import SPLITS
from llm_jax.data.stores import identity
from llm_jax.data.stores.checks import file_sha256
from llm_jax.data.stores.store import read_manifest
from llm_jax.data.stores.writer import locked, write_json

# Of the files with one entry per document.
TYPES = {'.starts': 'int64', '.answers': 'int64', '.labels': 'float64', '.seconds': 'int64',
         '.keys': 'uint64'}


def shard_folder(store: Path, index: int, count: int) -> Path:
  return store.with_name(f'{store.name}.shard-{index:05}-of-{count:05}')


def find_shards(store: Path) -> dict[int, list[int]]:
  """{number of shards: the indices of those that are complete}, for each number of which there is a shard."""
  found: dict[int, list[int]] = {}
  for path in sorted(store.parent.glob(f'{store.name}.shard-*')):
    if match := re.fullmatch(r'\.shard-(\d{5})-of-(\d{5})(\.partial)?', path.name.removeprefix(store.name)):
      complete = found.setdefault(int(match[2]), [])
      complete += [] if match[3] else [int(match[1])]
  return found


def prepare_shard(config: DataConfig, index: int, count: int) -> None:
  """Prepares one shard of each source's store; one that is there already is left as it is.

  Raises ConfigError for settings that need all documents, and for ready token ids, which need no preparation.
  """
  recipes = store_recipes(config)
  if not recipes:
    raise ConfigError('--shard: the data are prepared already, or token ids that are mapped as they are; there is '
                      'nothing to prepare')
  for name, recipe in recipes.items():
    part = recipe.corpus.shard(index, count)
    if recipe.folder.exists():
      print(f'data: {name}: the store {recipe.folder} is there already')
    else:
      recipe.make(part, shard_folder(recipe.folder, index, count), config.shard_tokens, notes=list)


def merge(config: DataConfig) -> None:
  """Merges the shards of each source's store. Raises DataError where some are missing, or there are none."""
  for recipe in store_recipes(config).values():
    if not merge_shards(recipe.folder, recipe.corpus.notes()) and not recipe.folder.exists():
      raise DataError(f'{recipe.folder}: has no shards; prepare them first: llm-jax data prepare --shard=INDEX/COUNT')
    print(f'data: {recipe.folder} is complete')


def merge_shards(store: Path, notes: list[str]) -> bool:
  """Merges the shards of a store; False: it is there already, or has none. Raises DataError for missing shards.

  `notes`: of the report, about all files.

  Token files are linked, not copied, so that a merge takes no space and little time; the shards are removed after it.
  """
  if not find_shards(store):
    return False
  with locked(store):
    found = find_shards(store)
    complete = [count for count, shards in found.items() if len(shards) == count]
    if not store.exists() and found and not complete:
      count, shards = max(found.items(), key=lambda item: len(item[1]))
      missing = [str(i) for i in range(count) if i not in shards]
      raise DataError(
          f'{store}: {len(shards)} of {count} shards are prepared; missing: {", ".join(missing[:20])}'
          f'{" ..." if len(missing) > 20 else ""}; run llm-jax data prepare --shard=INDEX/{count} for each, or delete '
          f'{store.name}.shard-* to prepare the data in one process')
    try:
      if not store.exists() and complete:
        _merge([shard_folder(store, i, complete[0]) for i in range(complete[0])], store, notes)
        merged = True
      else:
        merged = False
      for path in store.parent.glob(f'{store.name}.shard-*') if store.exists() else ():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as e:
      raise StorageError(f'{store}: cannot be written: {e.strerror or e}') from None
  return merged


def _merge(shards: list[Path], store: Path, notes: list[str]) -> None:
  aside = store.with_name(f'{store.name}.merging')
  shutil.rmtree(aside, ignore_errors=True)
  aside.mkdir()
  manifests = [read_manifest(shard) for shard in shards]
  _check(shards, manifests)
  classes = list(dict.fromkeys(name for manifest in manifests for name in manifest['classes']))
  splits: dict[str, dict] = {}
  files: dict[str, dict] = {}
  for split in SPLITS:
    splits[split] = _add_counts([manifest['splits'][split] for manifest in manifests])
    files |= _link_tokens(shards, manifests, split, aside)
    for kind in TYPES:
      columns = list(_columns(shards, manifests, split, kind, classes))
      if columns:
        path = aside / f'{split}{kind}'
        np.concatenate(columns).tofile(path)
        files[path.name] = {'size': path.stat().st_size, 'sha256': file_sha256(path)}
  for name in manifests[0]['files']:
    if name.endswith(('.json', '.jinja')):
      _link(shards[0] / name, aside / name)
      files[name] = manifests[0]['files'][name]
  report = _add_reports([Report.from_dict(manifest['report']) for manifest in manifests])
  report.notes = notes
  report.overlap = overlap.compare(lambda name: np.fromfile(aside / name, np.uint64) if (aside / name).exists() else
                                   np.zeros(0, np.uint64))
  write_json(aside / 'manifest.json', manifests[0] | {
      'splits': splits, 'classes': classes, 'files': dict(sorted(files.items())),
      'label_width': max(manifest['label_width'] for manifest in manifests),
      'vocab_size': max(manifest['vocab_size'] for manifest in manifests), 'report': report.to_dict()})
  os.rename(aside, store)
  for line in report.lines():
    print(f'data: {store.name}: {line}', flush=True)


def _check(shards: list[Path], manifests: list[dict]) -> None:
  """Raises DataError for shards of different kinds: their recipe is one, but the documents need not be."""
  full = [(shard, manifest) for shard, manifest in zip(shards, manifests, strict=True)
          if any(counts['documents'] for counts in manifest['splits'].values())]
  for shard, manifest in full[1:]:
    for what, (one, other) in {
        'answers': [any(name.endswith('.answers') for name in m['files']) for m in (full[0][1], manifest)],
        'pairs': [any(name.endswith('.seconds') for name in m['files']) for m in (full[0][1], manifest)],
        'label values': [m['label_width'] for m in (full[0][1], manifest)]}.items():
      if one != other:
        raise DataError(f'{shard.name}: documents have {what}: {other}, those of {full[0][0].name}: {one}')


def _add_counts(counts: list[dict[str, int]]) -> dict[str, int]:
  total = {name: sum(count.get(name, 0) for count in counts) for name in counts[0] if name != 'identity'}
  value = 0
  for count in counts:
    value = identity.joined(value, count['identity'], count['pieces'])
  return total | {'identity': value}


def _link_tokens(shards: list[Path], manifests: list[dict], split: str, aside: Path) -> dict[str, dict]:
  """Links the files with entries per token, numbered anew without empty ones; returns their manifest entries."""
  entries: dict[str, dict] = {}
  numbers: dict[str, int] = {}
  for shard, manifest in zip(shards, manifests, strict=True):
    for name, entry in sorted(manifest['files'].items()):
      if match := re.fullmatch(rf'{split}-\d+\.([\w.]+)', name):
        kind = match[1]
        number = numbers.setdefault(kind, 0)
        if entry['size'] or (shard == shards[-1] and not number):
          target = f'{split}-{number:05}.{kind}'
          _link(shard / name, aside / target)
          entries[target], numbers[kind] = entry, number + 1
  return entries


def _columns(shards: list[Path], manifests: list[dict], split: str, kind: str, classes: list[str]) -> Iterator[Any]:
  """The entries per document of each shard: starts counted from the first shard, labels as indices of all classes."""
  begin = 0
  for shard, manifest in zip(shards, manifests, strict=True):
    if f'{split}{kind}' in manifest['files']:
      column = np.fromfile(shard / f'{split}{kind}', TYPES[kind])
      if kind == '.starts':
        column += begin
      if kind == '.labels' and manifest['classes']:
        column = np.array([classes.index(name) for name in manifest['classes']], np.float64)[column.astype(int)]
      yield column
    begin += manifest['splits'][split]['tokens']


def _link(source: Path, target: Path) -> None:
  try:
    os.link(source, target)
  except OSError:  # a file system without links
    shutil.copyfile(source, target)


def _add_reports(reports: list[Report]) -> Report:
  total = Report()
  for report in reports:
    total.num_kept += report.num_kept
    total.num_bad += report.num_bad
    total.first_bad = total.first_bad or report.first_bad
    for reason, count in report.dropped.items():
      total.dropped[reason] = total.dropped.get(reason, 0) + count
  return total


def parse_shard(text: str) -> tuple[int, int]:
  """(index, count) of 'INDEX/COUNT', counted from 0. Raises ConfigError."""
  match = re.fullmatch(r'(\d+)/(\d+)', text)
  if match is None or not int(match[1]) < int(match[2]) <= 99999:
    raise ConfigError(f'--shard: {text!r} is not INDEX/COUNT, as 0/8, with INDEX from 0 to COUNT - 1, at most 99999')
  return int(match[1]), int(match[2])


class Shards:
  """The entry of LOADERS."""

  merge = staticmethod(merge_shards)

  @staticmethod
  def prepare(config: DataConfig, shard: str) -> None:
    prepare_shard(config, *parse_shard(shard))


register(LOADERS, 'shards', Shards, NoSettings)
