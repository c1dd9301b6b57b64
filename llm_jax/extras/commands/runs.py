"""Lists runs with their state, best result and differences.

A folder is searched for runs at any depth (default: runs). The last column has the config fields in which the runs
differ. For the folder of one run, its launches are listed too: when, by which command, from which step, with which
changes of the config, and how each ended. Nothing in the folders is executed.

  llm-jax runs
  llm-jax runs runs/sweep --plot=runs.png
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError

RUNNING = ('starting', 'training')
STALE_SECONDS = 600  # without an update a run of another host has probably been killed


def parser() -> flags.Parser:
  parser = flags.Parser('runs', __doc__)
  parser.add_argument('folder', nargs='?', type=Path, default=Path('runs'), help='the folder to search (default: runs)')
  parser.add_argument('--format', choices=('text', 'json'), default='text', help='of the output')
  parser.add_argument('--plot', type=Path, metavar='PNG', help='also plot the losses of the runs (default: no plot)')
  return parser


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  folders = [path.parent for path in sorted(args.folder.rglob('status.json'))]
  if not folders:
    raise ConfigError(f'{args.folder}: there are no runs in this folder')
  found = [read_run(folder, args.folder) for folder in folders]
  differing = differences([run.pop('config') for run in found])
  for run, values in zip(found, differing, strict=True):
    run['differs'] = values
  launches = found[0]['launches'] if folders == [args.folder] else []
  print(json.dumps(found, indent=2) if args.format == 'json' else '\n'.join([*table(found), *history(launches)]))
  logged = [str(folder) for folder in folders if (folder / 'metrics.jsonl').is_file()]
  if args.plot and logged:
    from llm_jax.extras.commands import plot
    plot.main(['--workdir', *logged, f'--out={args.plot}'])


def read_run(folder: Path, root: Path) -> dict[str, Any]:
  """A run's name, progress, launches and config; damaged files give the state 'unreadable'."""
  from llm_jax.training.launches import read_launches
  run: dict[str, Any] = {'run': str(folder.relative_to(root) if folder != root else folder.name),
                         'launches': read_launches(folder)}
  try:
    status = json.loads((folder / 'status.json').read_text())
    path = folder / 'config.json'  # written with the first step
    config = json.loads(path.read_text()) if path.is_file() else {}
    age = time.time() - status.get('updated', status['started'])
    best, speed = status.get('best'), (status.get('metrics') or {}).get('train/tokens_per_second')
    return run | {'state': state_of(status, run['launches'], age), 'step': int(status['step']),
                  'num_steps': int(status['num_steps']), 'monitor': status.get('monitor'),
                  'best': None if best is None else float(best),
                  'tokens_per_second': None if speed is None else float(speed), 'age': age,
                  'config': dict(leaves(config))}
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return run | {'state': 'unreadable', 'step': None, 'num_steps': None, 'monitor': None, 'best': None,
                  'tokens_per_second': None, 'age': None, 'config': {}}


def state_of(status: dict[str, Any], launches: list[dict[str, Any]], age: float) -> str:
  """The state of a run: 'died' if its process ended without reporting it, 'no news' if that cannot be known."""
  from llm_jax.training.launches import is_alive
  last = launches[-1] if launches else {}
  if 'ended' in last:
    return status['state']
  alive = is_alive(last)
  if alive and status['state'] not in RUNNING:
    return 'starting'  # a further launch, which has not trained a step yet
  if status['state'] not in RUNNING or alive or (alive is None and age <= STALE_SECONDS):
    return status['state']
  return 'no news' if alive is None else 'died'


def history(launches: list[dict[str, Any]]) -> list[str]:
  """Lines on the launches of a run."""
  from llm_jax.training.launches import is_alive
  lines = []
  for number, launch in enumerate(launches, start=1):
    begin, changed = launch.get('begin'), launch.get('changed') or {}
    ended = launch.get('ended') or {True: 'runs', False: 'died', None: 'no news'}[is_alive(launch)]
    lines += ['', f'launch {number}: {launch.get("time")}, llm_jax {launch.get("llm_jax")}, '
              f'{launch.get("num_processes")} process(es), {launch.get("devices")}, host {launch.get("host")}',
              f'  command  {launch.get("command")}',
              '  begin    ' + ('no step was trained' if begin is None else f'step {begin}'),
              *(f'  changed  config.{name}: {old} -> {new}' for name, (old, new) in changed.items()),
              f'  ended    {ended}' + (f' at step {launch["step"]}' if begin is not None and 'step' in launch else '')
              + (': ' + ' '.join(launch['error'].split()) if 'error' in launch else '')]
  return lines


def leaves(values: dict[str, Any], path: str = '') -> Iterator[tuple[str, Any]]:
  """(path, value) of all fields of a config."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from leaves(value, f'{path}{name}.')
    else:
      yield f'{path}{name}', value


def differences(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """For each config, its values of the fields in which the configs that have them differ."""
  names = dict.fromkeys(name for config in configs for name in config)
  differing = [name for name in names if len({json.dumps(config[name]) for config in configs if name in config}) > 1]
  return [{name: config[name] for name in differing if name in config} for config in configs]


def table(runs: list[dict[str, Any]]) -> list[str]:
  """The runs as aligned lines, below a header."""
  rows = [('run', 'state', 'step', 'best', 'tokens/s', 'updated', 'differs in')]
  for run in runs:
    best = '' if run['best'] is None else f'{run["monitor"] or ""} {run["best"]:.4f}'.strip()
    speed = '' if run['tokens_per_second'] is None else f'{run["tokens_per_second"]:,.0f}'
    differs = ' '.join(f'{name}={value}' for name, value in run['differs'].items())
    first, *more = textwrap.wrap(differs, 80, break_long_words=False, break_on_hyphens=False) or ['']
    rows += [(run['run'], run['state'], '' if run['step'] is None else f'{run["step"]}/{run["num_steps"]}', best, speed,
              ago(run['age']), first), *(('',) * 6 + (line,) for line in more)]
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
