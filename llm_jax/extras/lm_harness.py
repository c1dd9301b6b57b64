"""Tasks of EleutherAI's harness (the package lm_eval), for a run and during a training.

  llm-jax evaluate runs/gpt_small --tasks=arc_easy,hellaswag
  llm-jax train --config=gpt_small --config.log.callbacks=lm_eval --config.log.lm_eval.tasks=arc_easy

Most of its tasks download their data from the Hugging Face Hub. A folder with tasks of one's own needs no network.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from llm_jax.base.activity import ACTIVITY
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.errors import ConfigError, DataError, UserError
from llm_jax.base.nearest import nearest
from llm_jax.base.registry import NoSettings, register
from llm_jax.extras.lm_scores import Scorer
from llm_jax.infer.harness import HARNESSES, TaskOptions, TaskReport
from llm_jax.infer.load import Loaded

Rows = list[tuple[str, str, float, float | None]]  # task, metric, value, standard error


def load_package(flag: str) -> Any:
  """The package lm_eval. Raises ConfigError if it is not installed."""
  try:
    importlib.import_module('lm_eval.tasks')
    return importlib.import_module('lm_eval')
  except ModuleNotFoundError as e:
    if (e.name or '').partition('.')[0] == 'lm_eval':
      raise ConfigError(f"{flag}: the package lm_eval is not installed; run pip install 'llm_jax[lm-eval]'") from None
    raise ConfigError(f'{flag}: lm_eval lacks the package {e.name}; run pip install {e.name}') from None


def find_tasks(options: TaskOptions, flag: str) -> Any:
  """lm_eval's index of tasks, which has all that the options name. Raises ConfigError, with the nearest names."""
  load_package(flag)
  if options.include_path and not Path(options.include_path).is_dir():
    raise ConfigError(f'{flag}: the folder of tasks {options.include_path} does not exist')
  make, problems = importlib.import_module('lm_eval.tasks').TaskManager, []
  if options.include_path:  # the package's own thousands of tasks take seconds to list
    manager = make(include_path=options.include_path, include_defaults=False)
    if options.tasks and all(manager.match_tasks([name]) for name in options.tasks):
      return manager
  manager = make(include_path=options.include_path or None)
  for name in options.tasks:
    if not manager.match_tasks([name]):
      near = nearest(name, manager.all_tasks)
      problems.append(f'{flag}: lm_eval has no task {name!r}'
                      + (f'; did you mean {near}?' if near else '; `lm_eval ls tasks` lists all'))
  if problems or not options.tasks:
    raise ConfigError('\n'.join(problems) or f'{flag}: names no task; set it to arc_easy, for example')
  return manager


def model_of(scorer: Scorer) -> Any:
  """The scorer as a model of lm_eval, which must be installed."""
  return importlib.import_module('llm_jax.extras.lm_harness_model').RunModel(scorer=scorer)


def run_tasks(scorer: Scorer, options: TaskOptions, manager: Any, flag: str, **more: Any) -> dict[str, Any]:
  """What lm_eval's simple_evaluate returns. Raises UserErrors; global random states are as before afterwards."""
  lm_eval = load_package(flag)
  states = random.getstate(), np.random.get_state()
  try:
    return lm_eval.simple_evaluate(
        model=model_of(scorer), tasks=list(options.tasks), num_fewshot=options.num_fewshot, limit=options.limit,
        task_manager=manager, log_samples=False, **more)
  except UserError:
    raise
  except (ConnectionError, FileNotFoundError, ImportError, KeyError, TypeError, ValueError) as e:
    words = (str(e).splitlines() or [''])[0]
    raise DataError(f'{flag}: lm_eval cannot run {", ".join(options.tasks)}: {type(e).__name__}: {words}; if its data '
                    'cannot be downloaded here, name a folder of tasks with data of your own (include_path)') from e
  finally:
    random.setstate(states[0])
    np.random.set_state(states[1])


def rows_of(found: dict[str, Any]) -> Rows:
  """The numbers of groups and tasks. A metric of the filter `none` has its own name, of another NAME_FILTER."""
  rows = []
  for name, values in {**found.get('results', {}), **found.get('groups', {})}.items():
    for key, value in values.items():
      metric, _, kind = key.partition(',')
      if not isinstance(value, int | float | np.number) or not kind or metric.endswith('_stderr'):
        continue
      error = values.get(f'{metric}_stderr,{kind}')
      shown = metric if kind == 'none' else f'{metric}_{kind.replace("-", "_")}'
      rows.append((name, shown, float(value),
                   float(error) if isinstance(error, int | float | np.number) and math.isfinite(error) else None))
  return rows


def table_of(rows: Rows, shots: dict[str, Any], counts: dict[str, Any]) -> str:
  """The rows as text."""
  lines = [('task', 'shots', 'documents', 'metric', 'value', 'std. error')]
  for name, metric, value, error in rows:
    count = counts.get(name, {}).get('effective', '')
    lines.append((name, str(shots.get(name, '')), str(count), metric, f'{value:.4f}',
                  '' if error is None else f'{error:.4f}'))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join('  '.join(cell.rjust(width) if i in (1, 2, 4, 5) else cell.ljust(width)
                             for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                   for line in lines)


def evaluate_tasks(trained: Any, options: TaskOptions) -> TaskReport:
  """Evaluates a run on tasks of lm_eval. Raises UserErrors."""
  manager = find_tasks(options, '--tasks')
  with trained.on_mesh():
    found = run_tasks(Scorer(trained.run, trained.mesh, trained.workdir), options, manager, '--tasks')
  rows, shots, counts = rows_of(found), found.get('n-shot', {}), found.get('n-samples', {})
  results: dict[str, dict[str, float]] = {}
  for name, metric, value, error in rows:
    results.setdefault(name, {})[metric] = value
    if error is not None:
      results[name][f'{metric}_stderr'] = error
  details = {'num_fewshot': shots, 'documents': {name: count.get('effective') for name, count in counts.items()},
             'task_versions': found.get('versions', {}), 'lm_eval': importlib.metadata.version('lm_eval')}
  return TaskReport(results, table_of(rows, shots, counts), details)


class LmEval:
  """A callback that logs tasks/NAME/METRIC at each logged step that is a multiple of `every`.

  `limit`: documents of each task, 0: all. `num_fewshot` -1: each task's own.
  """

  def __init__(self, tasks: tuple[str, ...] = (), include_path: str = '', every: int = 1000, limit: int = 0,
               num_fewshot: int = -1):
    if every < 1 or limit < 0 or num_fewshot < -1:
      raise ConfigError('config.log.lm_eval: every must be at least 1, limit not negative, and num_fewshot at least '
                        f'-1; got {every}, {limit} and {num_fewshot}')
    self._every = every
    self._options = TaskOptions(tuple(tasks), include_path, None if num_fewshot < 0 else num_fewshot, limit or None)
    self._manager = find_tasks(self._options, 'config.log.lm_eval.tasks')

  def __call__(self, event: Any) -> None:
    if event.step % self._every:
      return
    session = event.session
    program = session.program
    # The weights are not copied, as no step runs meanwhile.
    run = Loaded(program.config, program.data.tokenizer, program.data.encoder_tokenizer, program.model,
                 session.weights, {'step': session.step})
    with ACTIVITY.during('evaluation'):
      found = run_tasks(Scorer(run, program.shardings.step.mesh), self._options, self._manager,
                        'config.log.lm_eval.tasks', bootstrap_iters=0)  # standard errors are not logged
    values = {f'tasks/{name}/{metric}': value for name, metric, value, _ in rows_of(found)}
    session.writer.scalars(session.step, values)  # the newest, whose weights these are
    session.console.results(session.step, values)


register(HARNESSES, 'lm_eval', evaluate_tasks, NoSettings)
register(CALLBACKS, 'lm_eval', LmEval)
