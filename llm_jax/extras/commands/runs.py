"""Lists runs with their state, best result and differences.

A folder is searched for runs at any depth (default: runs). The last column has the config fields in which the runs
differ. Nothing in the folders is executed.

  llm-jax runs
  llm-jax runs runs/sweep --plot=runs.png
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError

STALE_SECONDS = 600  # without an update a run that is said to train has probably been killed


def parser() -> flags.Parser:
  parser = flags.Parser('runs', __doc__)
  parser.add_argument('folder', nargs='?', type=Path, default=Path('runs'), help='the folder to search (default: runs)')
  parser.add_argument('--format', choices=('text', 'json'), default='text', help='of the output')
  parser.add_argument('--plot', type=Path, metavar='PNG', help='also plot the losses of the runs (default: no plot)')
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  found = [read_run(path.parent, args.folder) for path in sorted(args.folder.rglob('config.json'))
           if (path.parent / 'status.json').is_file()]
  if not found:
    raise ConfigError(f'{args.folder}: there are no runs in this folder')
  if args.plot:
    from llm_jax.extras.commands import plot
    plot.main(['--workdir', *(str(args.folder / run['run']) for run in found), f'--out={args.plot}'])
  differing = differences([run.pop('config') for run in found])
  for run, values in zip(found, differing, strict=True):
    run['differs'] = values
  print(json.dumps(found, indent=2) if args.format == 'json' else '\n'.join(table(found)))


def read_run(folder: Path, root: Path) -> dict[str, Any]:
  """A run's name, progress and config; damaged files give the state 'unreadable'."""
  try:
    status, config = (json.loads((folder / f'{name}.json').read_text()) for name in ('status', 'config'))
    age = time.time() - status.get('updated', status['started'])
    state = 'no news' if status['state'] in ('starting', 'training') and age > STALE_SECONDS else status['state']
    return {'run': str(folder.relative_to(root)), 'state': state, 'step': status['step'],
            'num_steps': status['num_steps'], 'monitor': status.get('monitor'), 'best': status.get('best'),
            'tokens_per_second': (status.get('metrics') or {}).get('train/tokens_per_second'), 'age': age,
            'config': dict(leaves(config))}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return {'run': str(folder.relative_to(root)), 'state': 'unreadable', 'step': None, 'num_steps': None,
            'monitor': None, 'best': None, 'tokens_per_second': None, 'age': None, 'config': {}}


def leaves(values: dict[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  """(path, value) of all fields of a config."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', value


def differences(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """For each config, its values of the fields in which the configs differ."""
  names = dict.fromkeys(name for config in configs for name in config)
  differing = [name for name in names if len({json.dumps(config.get(name)) for config in configs if config}) > 1]
  return [{name: config[name] for name in differing if name in config} for config in configs]


def table(runs: list[dict[str, Any]]) -> list[str]:
  """The runs as aligned lines, below a header."""
  rows = [('run', 'state', 'step', 'best', 'tokens/s', 'updated', 'differs in')]
  for run in runs:
    best = '' if run['best'] is None else f'{run["monitor"] or ""} {run["best"]:.4f}'.strip()
    speed = '' if run['tokens_per_second'] is None else f'{run["tokens_per_second"]:,.0f}'
    differs = ' '.join(f'{name}={value}' for name, value in run['differs'].items())
    rows.append((run['run'], run['state'], '' if run['step'] is None else f'{run["step"]}/{run["num_steps"]}', best,
                 speed, ago(run['age']), differs if len(differs) < 120 else f'{differs[:117]}...'))
  widths = [max(len(row[column]) for row in rows) for column in range(6)]
  return ['  '.join([*(f'{text:{width}}' for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
          for row in rows]


def ago(seconds: float | None) -> str:
  """Seconds as '5 min ago'."""
  if seconds is None:
    return ''
  for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'min')):
    if seconds >= size:
      return f'{seconds / size:.0f} {unit} ago'
  return f'{seconds:.0f} s ago'
