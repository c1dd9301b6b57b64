"""What names of files say: the split that a file belongs to, and shards that are missing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from llm_jax.data.sources.documents import File

SPLIT_OF = {'train': 'train', 'training': 'train', 'validation': 'val', 'valid': 'val', 'val': 'val', 'dev': 'val',
            'test': 'test', 'testing': 'test', 'eval': 'test', 'evaluation': 'test'}
_WORD = re.compile(rf'(?<![a-z0-9])({"|".join(sorted(SPLIT_OF, key=len, reverse=True))})(?![a-z])')
_SHARD = re.compile(r'^(.*?)-?(\d{3,})-of-(\d{3,})(.*)$')
_PLAIN = ('', '.txt', '.text', '.tokens', '.raw', '.md')  # endings of text whose name can tell a split: no code
CARDS = ('readme', 'license', 'licence', 'copying', 'notice', 'citation', 'changelog', 'authors', 'contributing',
         'dataset_info', 'dataset_infos', 'dataset_card')


def splits_of(files: Sequence[File], formats: Sequence[str]) -> list[str]:
  """The split of each file by its name, as on the Hugging Face hub: by a folder, a shard, or a word of the name.

  A word counts beside a file of the same name with 'train' in its place; the whole name of a data file, or the name of
  a shard, counts alone. Files that say nothing are for training; so are all if none would be left to train on.
  """
  words = [_words(file, fmt) for file, fmt in zip(files, formats, strict=True)]
  with_train = {template for of_file in words for template, word, _ in of_file if SPLIT_OF[word] == 'train'}
  splits = [next((SPLIT_OF[word] for template, word, alone in of_file if alone or template in with_train), 'train')
            for of_file in words]
  return splits if 'train' in splits else ['train'] * len(files)


def _words(file: File, fmt: str) -> list[tuple[str, str, bool]]:
  """(the name with the word and the digits of a shard left out, the word, whether the word counts alone)."""
  path = PurePosixPath(file.name.lower())
  if file.format == 'huggingface':  # a split of a DatasetDict
    return [('', path.name, True)] if path.name in SPLIT_OF else []
  found = [(f'{"/".join(path.parts[:i])}/*', part, fmt != 'text')
           for i, part in enumerate(path.parts[:-1]) if part in SPLIT_OF]
  ending = ''.join(path.suffixes[-1:])
  if fmt == 'text' and ending not in _PLAIN:
    return found
  shard = _SHARD.match(path.name)
  name = shard[1] if shard else path.name
  for match in _WORD.finditer(name):
    whole = fmt != 'text' and name.split('.')[0] == match[1]
    found.append((f'{path.parent}/{name[:match.start()]}*{name[match.end():]}', match[1], bool(shard) or whole))
  return found


def missing_shards(files: Sequence[File]) -> list[str]:
  """Names of files -NNNNN-of-NNNNN that are neither among the files nor in their folders."""
  found: dict[tuple[Path, str, str], set[int]] = {}
  endings: dict[tuple[Path, str, str], str] = {}
  for file in files:
    if match := _SHARD.match(file.path.name):
      key = file.path.parent, match[1], match[3]
      found.setdefault(key, set()).add(int(match[2]))
      endings[key] = match[4]
  missing = []
  for (folder, name, total), have in found.items():
    first = 0 if 0 in have or int(total) not in have else 1  # some count from 1
    for index in sorted(set(range(first, int(total) + first)) - have):
      shard = f'{name}{"-" if name else ""}{index:0{len(total)}}-of-{total}'
      if not any(folder.glob(f'{shard.replace("[", "[[]")}*')):
        missing.append(shard + endings[folder, name, total])
  return missing


def cards(files: Sequence[File], formats: Sequence[str]) -> list[File]:
  """The files that describe data files beside them, such as README.md, and are no data."""
  if all(fmt == 'text' for fmt in formats):
    return []
  named = [file for file in files if Path(file.name).name.lower().split('.')[0] in CARDS]
  others = [fmt for file, fmt in zip(files, formats, strict=True) if file not in named]
  return named if others and 'text' not in others else []
