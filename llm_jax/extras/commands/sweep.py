"""Trains all trials of a config's sweep, and compares them.

The config defines `sweep()`, which returns {'optim.learning_rate': [1e-3, 3e-3], 'seed': [0, 1]} for all combinations,
or a list of settings. Trials are runs in subfolders of the workdir, each in its own process. Repeating the command
continues unfinished trials; another config needs another workdir. Writes sweep.md, sweep.json, and sweep.png with the
ten best trials.

  llm-jax sweep --config=optimizer_race --processes=2
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llm_jax.base import flags, plugins
from llm_jax.base.builder import to_dict
from llm_jax.base.errors import ConfigError, StorageError, UserError
from llm_jax.base.files import check_no_link, open_append, write_file, writing
from llm_jax.base.process import run_as_program
from llm_jax.base.redaction import public


def main(argv: list[str]) -> None:
  args = parser().parse(argv)
  overrides = args.overrides
  plugins.load_all(args.plugin)
  from llm_jax.base.progress import duration
  from llm_jax.config_file import open_config
  from llm_jax.training.status import read_status
  source = open_config(args.config)
  if not source.trials:
    raise ConfigError(f"--config: {args.config} has no sweep(); add, for example, def sweep(): return "
                      "{'seed': [0, 1]}")
  if args.processes < 1:
    raise ConfigError(f'--processes must be at least 1; got {args.processes}')
  # Reports a mistake in any trial before the first one runs, with and without on_cpu, as the machine is not known here.
  for trial in source.trials:
    source.check({**overrides, **trial})
  resolved = [[public(to_dict(source.resolve({**overrides, **trial}, cpu_only=cpu_only))) for cpu_only in (True, False)]
              for trial in source.trials]
  if any('jsonl' not in configs[0]['log']['loggers'] for configs in resolved):
    raise ConfigError('config.log.loggers: a sweep compares its trials by what jsonl writes; add jsonl to the list')
  if args.metric and not args.mode:
    raise ConfigError(f'--mode: set min or max, whether a lower or higher {args.metric} is better')
  evaluation = resolved[0][0]['eval']
  metric, mode = args.metric or evaluation['monitor'], args.mode or evaluation['mode']
  workdir = args.workdir or Path('runs') / f'{args.config.stem}_sweep'
  names = [name_of(i, trial) for i, trial in enumerate(source.trials)]
  for name, configs in zip(names, resolved, strict=True):
    check_unchanged(workdir / name, configs)
  begin, done = time.monotonic(), 0

  def train(name: str, trial: dict[str, Any], configs: list[dict]) -> None:
    nonlocal done
    folder = workdir / name
    if read_status(folder)['state'] != 'finished':
      folder.mkdir(parents=True, exist_ok=True)
      write_file(check_no_link(folder) / 'trial.json', json.dumps(configs, indent=2))
      given = [f'--plugin={name}' for name in args.plugin]
      given += [f'--config.{field}={text_of(value)}' for field, value in {**overrides, **trial}.items()]
      with open_append(folder / 'output.txt') as output:
        subprocess.run([sys.executable, '-m', 'llm_jax.main', f'--config={args.config}', f'--workdir={folder}', *given],
                       stdout=output, stderr=subprocess.STDOUT, check=False)
    done += 1
    left = (time.monotonic() - begin) / done * (len(names) - done)
    print(f'trial {done} of {len(names)}: {name}: {read_status(folder)["state"]}, {duration(left)} left',
          flush=True)

  with writing(f'--workdir: {workdir}'):
    workdir.mkdir(parents=True, exist_ok=True)
  with ThreadPoolExecutor(args.processes) as pool:
    for future in [pool.submit(train, *pair) for pair in zip(names, source.trials, resolved, strict=True)]:
      future.result()
  rows = [row_of(workdir / name, name, trial, metric, mode)
          for name, trial in zip(names, source.trials, strict=True)]
  rows.sort(key=lambda row: (row['best'] is None, (row['best'] or 0) * (1 if mode == 'min' else -1)))
  write_file(workdir / 'sweep.json', json.dumps({'metric': metric, 'trials': rows}, indent=2))
  write_file(workdir / 'sweep.md', '\n'.join(table(rows, metric)) + '\n')
  print('\n'.join(table(rows, metric)))
  draw(workdir, [row['name'] for row in rows[:10]], metric)
  if failed := [row['name'] for row in rows if row['state'] != 'finished']:
    raise UserError(f'not finished: {", ".join(failed)}; see output.txt in their folders in {workdir}')


def parser() -> flags.Parser:
  parser = flags.Parser('sweep', __doc__, fields='llm_jax.config:Config')
  parser.add_argument('--config', type=Path, metavar='FILE', required=True, help='a config file or preset with sweep()')
  parser.add_argument('--workdir', type=Path, metavar='FOLDER', help='default: runs/<name of the config>_sweep')
  parser.add_argument('--processes', type=int, default=1, help='number of trials at a time')
  parser.add_argument('--metric', default='', help='metric to compare by (default: config.eval.monitor)')
  parser.add_argument('--mode', choices=('min', 'max'), help='whether lower or higher is better (default: '
                      'config.eval.mode)')
  plugins.add_flags(parser, trust=False)
  return parser


def check_unchanged(folder: Path, configs: list[dict]) -> None:
  """Raises ConfigError for a trial that was trained with other settings."""
  from llm_jax.config import differences
  path, changed = folder / 'trial.json', dict[str, tuple[Any, Any]]()
  if not (folder / 'metrics.jsonl').is_file():  # not trained yet
    return
  try:
    for old, new in zip(json.loads(path.read_text()), configs, strict=True):
      changed |= differences(old, new)
  except (OSError, ValueError) as e:
    raise StorageError(f'{path}: damaged: {e}') from None
  if changed:
    raise ConfigError(f'--workdir: {folder} was trained with other settings; name another --workdir:\n  ' + '\n  '.join(
        f'config.{name}: trained with {old}, now {new}' for name, (old, new) in changed.items()))


def name_of(number: int, trial: dict[str, Any]) -> str:
  """The folder name of a trial: '003_learning_rate=0.001,seed=1'."""
  settings = ','.join(f'{field.split(".")[-1]}={plain(value)}' for field, value in public(trial).items())
  return f'{number:03}_' + ''.join(c if c.isalnum() or c in '=,._-' else '_' for c in settings)[:80]


def text_of(value: Any) -> str:
  """A value in the syntax of the command line."""
  return repr(tuple(value)) if isinstance(value, (list, tuple)) else str(value)


def plain(value: Any) -> str:
  return ' '.join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


def row_of(folder: Path, name: str, trial: dict[str, Any], metric: str, mode: str) -> dict[str, Any]:
  from llm_jax.training.log import read_metrics
  from llm_jax.training.status import read_status
  status = read_status(folder)
  lines = read_metrics(folder / 'metrics.jsonl') if (folder / 'metrics.jsonl').is_file() else []
  points = [(line[metric], line['step']) for line in lines if math.isfinite(line.get(metric, math.nan))]
  best = (min if mode == 'min' else max)(points, default=(None, None))
  return {'name': name, 'settings': public(trial), 'state': status['state'],
          'best': best[0], 'best_step': best[1], 'last': points[-1][0] if points else None,
          'minutes': round(status['seconds'] / 60, 1) if 'seconds' in status else None}


def table(rows: list[dict[str, Any]], metric: str) -> list[str]:
  """The lines of a Markdown table of `rows`."""
  fields = list(dict.fromkeys(field for row in rows for field in row['settings']))
  lines = [[*fields, f'best {metric}', 'at step', 'last', 'minutes', 'state'],
           ['---'] * (len(fields) + 5)]
  for row in rows:
    numbers = ['' if x is None else f'{x:.4f}' for x in (row['best'], row['last'])]
    lines.append([*(plain(row['settings'].get(field, '')) for field in fields), numbers[0], str(row['best_step']),
                  numbers[1], str(row['minutes']), row['state']])
  return ['| ' + ' | '.join(line) + ' |' for line in lines]


def draw(workdir: Path, names: Iterable[str], metric: str) -> None:
  """Plots the metric of these trials; prints why if that is not possible."""
  from llm_jax.extras.commands import plot
  runs = [workdir / name for name in names if (workdir / name / 'metrics.jsonl').is_file()]
  try:
    plot.main(['--workdir', *map(str, runs), '--metric', metric, '--out', str(workdir / 'sweep.png')])
  except (ConfigError, SystemExit) as e:
    print(f'no figure: {e}')


if __name__ == '__main__':
  run_as_program(main)
