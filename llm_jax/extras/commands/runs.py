"""Lists runs with their state, best result and differences.

A folder is searched for runs at any depth (default: runs); the newest comes first. The last column has the config
fields in which the runs differ, if the terminal is wide enough; a pipe gets whole rows. For the folder of one run, its
launches are listed too: when, by which command, from which step, with which changes of the config, and how each ended.
Nothing in the folders is executed.

  llm-jax runs
  llm-jax runs runs/sweep --plot=runs.png
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_jax.base import flags
from llm_jax.base.errors import ConfigError
from llm_jax.base.fields import DTYPES
from llm_jax.base.progress import duration
from llm_jax.base.terminal import columns, wrap

RUNNING = ('starting', 'training')
STALE_SECONDS = 600  # without an update a run of another host has probably been killed
OPTIONAL = ('differs in', 'tokens/s', 'updated')  # columns that a narrow terminal does without, the first one first
LEAST_WIDTH = {'run': 24, 'differs in': 20}  # of columns whose cells are wrapped
# Fields that follow from data.path and the machine: they are left out for runs of different data.
OF_DATA = (*(f'data.{name}' for name in ('sha256', 'format', 'separator', 'dtype', 'eot_id', 'cache_dir')),
           'tokens_per_device', 'model.vocab_size', 'model.encoder_vocab_size', 'model.start_id',
           *(f'model.{name}' for name in DTYPES))


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
  now = time.time()
  found = sorted((read_run(folder, args.folder, now) for folder in folders),
                 key=lambda run: (run['age'] is None, run['age']))  # the newest first, unreadable ones last
  differing = differences([run.pop('config') for run in found])
  for run, values in zip(found, differing, strict=True):
    run['differs'] = values
  launches = found[0]['launches'] if folders == [args.folder] else []
  print(json.dumps(found, indent=2) if args.format == 'json' else
        '\n'.join([*table(found, columns()), *history(launches)]))
  logged = [str(folder) for folder in folders if (folder / 'metrics.jsonl').is_file()]
  if args.plot and logged:
    from llm_jax.extras.commands import plot
    plot.main(['--workdir', *logged, f'--out={args.plot}'])


def read_run(folder: Path, root: Path, now: float) -> dict[str, Any]:
  """A run's name, progress, launches and config; damaged files give the state 'unreadable'."""
  from llm_jax.training.launches import read_launches
  run: dict[str, Any] = {'run': str(folder.relative_to(root) if folder != root else folder.name),
                         'launches': read_launches(folder)}
  try:
    status = json.loads((folder / 'status.json').read_text())
    path = folder / 'config.json'  # written with the first step
    config = json.loads(path.read_text()) if path.is_file() else {}
    age = now - status.get('updated', status['started'])
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
              *([f'  time     {duration(launch["seconds"])}: {shares(launch["goodput"])}']
                if launch.get('goodput') else []),
              *([f'  lost     {launch["lost_steps"]} step(s) of the launch before, which were trained again']
                if launch.get('lost_steps') else []),
              f'  ended    {ended}' + (f' at step {launch["step"]}' if begin is not None and 'step' in launch else '')
              + (': ' + ' '.join(launch['error'].split()) if 'error' in launch else '')]
  return lines


def shares(goodput: dict[str, float]) -> str:
  """'steps 83%, start 12%': the causes that took at least 1% of the time, the longest first."""
  found = sorted(((share, name.rpartition('/')[2]) for name, share in goodput.items()), reverse=True)
  return ', '.join(f'{name} {share:.0%}' for share, name in found if share >= 0.01)


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


def short(differing: list[dict[str, Any]]) -> list[str]:
  """The differences of each run for people: 'seed=1 learning_rate=0.01 path=notes.txt'."""
  other_data = any('data.path' in values for values in differing)
  shown = [{name: value for name, value in values.items() if not (other_data and name in OF_DATA)}
           for values in differing]
  names = unambiguous(list(dict.fromkeys(name for values in shown for name in values)), '.')
  paths = unambiguous(sorted({value for values in shown for value in values.values()
                              if isinstance(value, str) and '/' in value and ' ' not in value}), '/')

  def text(value: Any) -> str:
    if isinstance(value, list):
      return ','.join(map(str, value))
    return paths.get(value, value) if isinstance(value, str) else str(value)

  return [' '.join(f'{names[name]}={text(value)}' for name, value in values.items()) for values in shown]


def unambiguous(names: Sequence[str], separator: str) -> dict[str, str]:
  """For each name the shortest of its endings that no other name has."""
  def endings(name: str) -> list[str]:
    parts = name.split(separator)
    return [separator.join(parts[i:]) for i in reversed(range(len(parts)))]

  others = {name: {end for other in names if other != name for end in endings(other)} for name in names}
  return {name: next((end for end in endings(name) if end and end not in others[name]), name) for name in names}


def table(runs: list[dict[str, Any]], width: int | None) -> list[str]:
  """The runs as lines below a header: within `width`, or whole if that is None."""
  monitors = {run['monitor'] for run in runs if run['best'] is not None}
  [monitor] = monitors if len(monitors) == 1 else ['best']
  rows = [{'run': run['run'], 'state': run['state'],
           'step': '' if run['step'] is None else f'{run["step"]}/{run["num_steps"]}',
           monitor or 'best': '' if run['best'] is None else
           f'{run["monitor"] if monitor == "best" else ""} {run["best"]:.4f}'.strip(),
           'tokens/s': '' if run['tokens_per_second'] is None else f'{run["tokens_per_second"]:,.0f}',
           'updated': ago(run['age']), 'differs in': differs}
          for run, differs in zip(runs, short([run['differs'] for run in runs]), strict=True)]
  wide = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0] if any(row[name] for row in rows)}
  if width is None:
    header = {name: name for name in wide}
    return ['  '.join(f'{row[name]:{wide[name]}}' for name in wide).rstrip() for row in (header, *rows)]
  least = {name: min(wide[name], LEAST_WIDTH.get(name, width)) for name in wide}
  left_out = []
  for name in (name for name in OPTIONAL if name in least):
    if sum(least.values()) + 2 * (len(least) - 1) > width:
      del least[name]
      left_out.append(name)
  lines = fitted(rows, list(least), width)
  note = f'left out for lack of columns: {", ".join(left_out)}; llm-jax runs | cat has all'
  return [*lines, wrap(note, 2, width)] if left_out else lines


def fitted(rows: list[dict[str, str]], names: list[str], width: int) -> list[str]:
  """These columns of the rows as lines of at most `width` characters; long names and differences are wrapped."""
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text
  grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True)
  for name in names:
    grid.add_column(Text(name), no_wrap=name not in ('run', 'differs in'), overflow='fold')
  for row in rows:
    grid.add_row(*(Text(row[name]) for name in names))
  console = Console(width=width, color_system=None)
  with console.capture() as captured:
    console.print(grid)
  return [line.rstrip() for line in captured.get().splitlines()]


def ago(seconds: float | None) -> str:
  """Seconds as '5 min ago'."""
  if seconds is None:
    return ''
  for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'min')):
    if seconds >= size:
      return f'{seconds / size:.0f} {unit} ago'
  return f'{seconds:.0f} s ago'
