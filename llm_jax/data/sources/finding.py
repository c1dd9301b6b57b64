"""The files that a path names. A folder and a glob follow one rule: each real file once, each link to a folder once."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm_jax.base.errors import DataError
from llm_jax.data.sources.documents import File
from llm_jax.data.sources.naming import SPLIT_OF

BACKUPS = ('~', '.bak', '.orig', '.swp')


class LeftOut:
  """What a path leaves out: for each kind a count and the first name."""

  def __init__(self) -> None:
    self._found: dict[str, tuple[int, str]] = {}

  def add(self, kind: str, name: object) -> None:
    count, first = self._found.get(kind, (0, str(name)))
    self._found[kind] = count + 1, first

  def lines(self) -> tuple[str, ...]:
    """One line for all kinds, or none."""
    kinds = ', '.join(f'{count} {kind} ({first}{", ..." if count > 1 else ""})'
                      for kind, (count, first) in sorted(self._found.items()))
    return (f'left out: {kinds}',) if kinds else ()


def find(root: Path, path: str, left_out: LeftOut) -> list[File]:
  """The files of a file, folder or glob, with names that are the same on any machine. Raises DataError."""
  if root.is_file():
    return [File(root.name, root)]
  if root.is_dir():
    return _saved_dataset(root, left_out) or below(_snapshot(root), path, left_out)
  if root.is_symlink():
    raise DataError(f'config.data.path: {path} is a link to {root.readlink()}, which does not exist{_annex(root)}')
  if root.exists():
    raise DataError(f'config.data.path: {path} is neither a file nor a folder')
  fixed, pattern = _fixed(root)
  names = sorted(set(_matches(fixed, list(pattern), left_out)), key=lambda p: p.parts)
  matches = _each_once(fixed, _without_backups(fixed, names, left_out, root.name), left_out)
  if not matches:
    near = difflib.get_close_matches(root.name, [p.name for p in root.parent.glob('*')], n=1)
    hint = f' (did you mean {root.parent / near[0]}?)' if near else ''
    raise DataError(f'config.data.path: there is no file or folder {path!r}, and as a glob it matches nothing{hint}')
  return matches


def below(root: Path, path: str, left_out: LeftOut) -> list[File]:
  """All files below the folder that are neither hidden nor backups. Raises DataError if there are none."""
  names = sorted((file for _, files in _walk(root, root, left_out) for file in files), key=lambda p: p.parts)
  files = _each_once(root, _without_backups(root, names, left_out), left_out)
  if not files:
    raise DataError(f'config.data.path: the folder {path} holds no files{"".join(f"; {x}" for x in left_out.lines())}')
  return files


def _walk(top: Path, root: Path, left_out: LeftOut) -> Iterator[tuple[Path, list[Path]]]:
  """(folder, its files) for `top` and the folders below it. A real folder comes once, a link above itself never."""
  seen, folders, linked = {_identity(top)}, [top], list[Path]()
  while folders or linked:
    if folders:
      folder = folders.pop()
    else:
      folder = linked.pop(0)
      if _identity(folder) in seen or folder.resolve() in folder.parent.resolve().parents:
        left_out.add('link to a folder that is read already or holds the link', folder.relative_to(root))
        continue
      seen.add(_identity(folder))
    files = []
    for entry in _entries(folder, root, left_out):
      child = folder / entry.name
      if entry.name.startswith('.'):
        left_out.add('hidden', child.relative_to(root))
      elif entry.is_file(follow_symlinks=False) or (not entry.is_dir() and _is_file(child, root, left_out)):
        files.append(child)
      elif not entry.is_dir():
        continue
      elif entry.is_symlink():
        linked.append(child)
      elif _identity(child) not in seen:
        seen.add(_identity(child))
        folders.append(child)
    yield folder, files


def _entries(folder: Path, root: Path, left_out: LeftOut) -> list[os.DirEntry[str]]:
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError:
    left_out.add('folder that cannot be read', folder.relative_to(root))
    return []


def _is_file(path: Path, root: Path, left_out: LeftOut) -> bool:
  if path.is_file():
    return True
  if not path.exists():
    left_out.add(f'link to nothing{_annex(path)}', path.relative_to(root))
  elif not path.is_dir():
    left_out.add('pipe, socket or device', path.relative_to(root))
  return False


def _identity(path: Path) -> tuple[int, int]:
  state = path.stat()
  return state.st_dev, state.st_ino


def _annex(link: Path) -> str:
  """What to do about a link to a file that git-annex has not fetched."""
  return ' (git-annex: run git annex get)' if link.is_symlink() and '.git/annex/' in str(link.readlink()) else ''


def _fixed(root: Path) -> tuple[Path, tuple[str, ...]]:
  """(the longest path without a wildcard, the parts of the pattern after it)."""
  fixed = Path(root.parts[0]) if root.is_absolute() else Path()
  parts = root.parts[1:] if root.is_absolute() else root.parts
  for index, part in enumerate(parts):
    if _is_pattern(fixed, part):
      return fixed, parts[index:]
    fixed /= part
  return fixed.parent, parts[-1:]


def _is_pattern(folder: Path, part: str) -> bool:
  """Whether the part of a path has a wildcard; [ has none in the name of a file or folder that exists."""
  return glob.has_magic(part) and not (not set('*?') & set(part) and os.path.lexists(folder / part))


def _matches(folder: Path, pattern: list[str], left_out: LeftOut) -> Iterator[Path]:
  """The files in and below the folder that match the parts of the pattern."""
  part, *rest = pattern
  if part == '**':
    for inner, files in _walk(folder, folder, LeftOut() if rest else left_out):
      yield from _matches(inner, rest, left_out) if rest else files
    return
  if _is_pattern(folder, part):
    names = [e.name for e in _entries(folder, folder, left_out) if part.startswith('.') or not e.name.startswith('.')]
    children = [folder / n for n in fnmatch.filter(names, part.replace('[', '[[]')) or fnmatch.filter(names, part)]
  else:
    children = [folder / part]
  for child in children:
    if rest and child.is_dir():
      yield from _matches(child, rest, left_out)
    elif not rest and os.path.lexists(child) and _is_file(child, folder, left_out):
      yield child


def _without_backups(root: Path, paths: Iterable[Path], left_out: LeftOut, named: str = '') -> Iterator[Path]:
  """The files without an editor's backups, which a pattern can name by their ending."""
  for path in paths:
    if (path.name.endswith(BACKUPS) and not named.endswith(BACKUPS)) or path.name[:1] == path.name[-1:] == '#':
      left_out.add('backup', path.relative_to(root))
    else:
      yield path


def _each_once(root: Path, paths: Iterable[Path], left_out: LeftOut) -> list[File]:
  """A file with several names counts by the one that is no link, else by the first."""
  by_file: dict[tuple[int, int], list[Path]] = {}
  for path in paths:
    by_file.setdefault(_identity(path), []).append(path)
  chosen = []
  for names in by_file.values():
    own = next((p for p in names if len(names) > 1 and p.resolve() == root.resolve() / p.relative_to(root)), names[0])
    chosen.append(own)
    for other in names:
      if other is not own:
        left_out.add('further name of a file', other.relative_to(root))
  return [File('/'.join(p.parts[len(root.parts):]), p) for p in sorted(chosen, key=lambda p: p.parts)]


def _saved_dataset(root: Path, left_out: LeftOut) -> list[File]:
  """The data set that `save_to_disk` has written to the folder: one file, or one for each split of a DatasetDict."""
  if (root / 'dataset_dict.json').is_file():
    splits = [p.name for p in sorted(root.iterdir()) if (p / 'state.json').is_file()]
    if 'train' in splits:
      for split in [split for split in splits if split not in SPLIT_OF]:
        left_out.add('split that is neither train, validation nor test', split)
        splits.remove(split)
      return [File(f'{root.name}/{split}', root / split, 'huggingface') for split in splits]
    return [File(root.name, root, 'huggingface')]  # its reader names the splits
  is_one = (root / 'state.json').is_file() and (root / 'dataset_info.json').is_file()
  return [File(root.name, root, 'huggingface')] if is_one else []


def _snapshot(root: Path) -> Path:
  """The folder of files in the folder of one repository in the Hugging Face cache. Raises DataError for several."""
  if not ((root / 'snapshots').is_dir() and (root / 'blobs').is_dir() and (root / 'refs').is_dir()):
    return root
  snapshots = sorted((root / 'snapshots').iterdir())
  if len(snapshots) != 1:
    raise DataError(f'config.data.path: {root} holds {len(snapshots)} snapshots; set config.data.path to one of '
                    f'{", ".join(map(str, snapshots))}')
  return snapshots[0]
