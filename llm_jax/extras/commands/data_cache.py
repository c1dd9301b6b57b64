"""Lists what the cache of data holds, with sizes and last use, and deletes what is used least.

Nothing that a running job uses is deleted. What is deleted is made or fetched again when it is needed.

  llm-jax data cache
  llm-jax data cache --prune --max_gb=50 --max_days=90
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from rich import filesize

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.runtime import user_cache
from llm_jax.data.stores.cache import CacheEntry, entries, prune


def parser() -> flags.Parser:
  parser = flags.Parser('data cache', __doc__)
  parser.add_argument('--cache_dir', type=Path, help='the cache (default: $LLM_JAX_CACHE, else ~/.cache/llm_jax)')
  parser.add_argument('--prune', action='store_true', help='delete the entries that --max_gb and --max_days exclude, '
                      'the least recently used first')
  parser.add_argument('--max_gb', type=float, help='with --prune, the size to keep, in GB of 10^9 bytes '
                      '(default: any)')
  parser.add_argument('--max_days', type=float, help='with --prune, the days since the last use to keep (default: any)')
  parser.add_argument('--format', choices=('text', 'json'), default='text', help='of the output')
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  folder = args.cache_dir.expanduser() if args.cache_dir else user_cache()
  bounds = [value for value in (args.max_gb, args.max_days) if value is not None]
  if args.prune != bool(bounds):
    raise ConfigError('--prune needs --max_gb, --max_days or both' if args.prune else
                      '--max_gb and --max_days need --prune')
  if any(not value >= 0 for value in bounds):
    raise ConfigError(f'--max_gb and --max_days must be 0 or more; got {args.max_gb} and {args.max_days}')
  if not folder.is_dir():
    raise ConfigError(f'{folder}: there is no such folder; the cache is made with the first data')
  found = prune(folder, None if args.max_gb is None else args.max_gb * 1e9, args.max_days) if args.prune else \
      entries(folder)
  if args.format == 'json':
    print(json.dumps([dataclasses.asdict(entry) | {'path': str(entry.path)} for entry in found], indent=2))
    return
  print('\n'.join(table(found, folder)))
  if args.prune:
    print(f'deleted {len(found)} entries of {_size(found)}; {_size(entries(folder))} remain in {folder}')
  else:
    print(f'{len(found)} entries of {_size(found)} in {folder}')


def table(found: list[CacheEntry], folder: Path) -> list[str]:
  """A line for each entry, and one for each kind."""
  if not found:
    return []
  width, now = max(len(str(entry.path.relative_to(folder))) for entry in found), time.time()
  lines = [f'{"entry":{width}} {"size":>10} {"last used":>14}']
  for entry in found:
    used = 'in use' if entry.in_use else f'{(now - entry.used) / 86400:,.1f} days ago'
    lines.append(f'{entry.path.relative_to(folder)!s:{width}} {filesize.decimal(entry.num_bytes):>10} {used:>14}  '
                 f'{entry.about}'.rstrip())
  kinds = sorted({entry.kind for entry in found})
  return [*lines, '', *(f'{kind:{width}} {_size([entry for entry in found if entry.kind == kind]):>10}'
                        for kind in kinds)]


def _size(found: list[CacheEntry]) -> str:
  return filesize.decimal(sum(entry.num_bytes for entry in found))
