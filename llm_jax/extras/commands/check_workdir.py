"""Verifies the checkpoints of a run: `llm-jax check --workdir=RUN`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import saved_steps, unverified_steps
from llm_jax.base.process import gib
from llm_jax.training.finite import non_finite
from llm_jax.training.manifest import check_run_files, damage, reason, step_manifest, write_manifest
from llm_jax.training.retention import read_results, write_results

Row = dict[str, Any]  # step, state, files, bytes, score, problems


def verify(workdir: Path, adopt: bool, as_json: bool) -> None:
  """Prints a table of all steps. Raises StorageError if a step or a file of the run is damaged."""
  folder = workdir / 'checkpoints'
  if not folder.is_dir():
    raise ConfigError(f'--workdir: {folder} does not exist, so there are no checkpoints to verify')
  rows = []
  if not as_json:
    print(f'{"step":>10}  {"state":10} {"files":>6} {"size":>10} {"score":>12}')
  for row in check_steps(folder, adopt):
    rows.append(row)
    if not as_json:
      print(line_of(row), flush=True)
  problem = ''
  try:
    check_run_files(workdir)
  except StorageError as e:
    problem = str(e)
  if as_json:
    print(json.dumps({'workdir': str(workdir), 'steps': rows, 'run': problem or 'intact'}, indent=2), flush=True)
  damaged = [row for row in rows if row['state'] == 'damaged']
  if damaged or problem:
    steps = f'{folder}: damaged: {", ".join(str(row["step"]) for row in damaged)}' if damaged else ''
    raise StorageError('\n'.join(filter(None, [steps, problem])))


def check_steps(folder: Path, adopt: bool) -> Iterator[Row]:
  """A row for each step, as soon as it is read."""
  without = unverified_steps(folder)
  for step in sorted([*saved_steps(folder), *without]):
    problems, state = [], 'adopted'
    if step not in without:
      problems, state = damage(folder / str(step)), 'intact'
    elif adopt:
      problems = adopt_step(folder, step)
    else:
      state = 'unverified'
    yield row_of(folder, step, 'damaged' if problems else state, problems)
  for path in sorted(path for why in ('corrupt', 'rewound') for path in folder.glob(f'*.{why}-*')):
    yield {'step': path.name, 'state': 'set aside', 'files': None, 'bytes': None, 'score': None, 'problems': []}


def row_of(folder: Path, step: int, state: str, problems: list[str]) -> Row:
  row: Row = {'step': step, 'state': state, 'files': None, 'bytes': None, 'score': None, 'problems': problems}
  if state in ('intact', 'adopted'):
    files, results = step_manifest(folder / str(step))['files'].values(), read_results(folder, step)
    row |= {'files': len(files), 'bytes': sum(file['bytes'] for file in files), 'score': results and results['score']}
  return row


def adopt_step(folder: Path, step: int) -> list[str]:
  """Writes the manifest of a step that has none, after all of it was read; returns what is wrong with it."""
  from llm_jax.training import orbax_io
  path = folder / str(step)
  try:
    meta = orbax_io.read_meta(path)
    if meta.get('step') != step:
      return [f'meta: is of step {meta.get("step")}']
    for item in ('params', 'opt_state'):
      if names := non_finite(jax.tree.map(jax.numpy.asarray, {item: orbax_io.read_stored(path, item)})):
        return [f'{name}: not finite' for name in names]
    write_manifest(path, {'step': step, 'versions': meta.get('versions', {}), 'adopted': True})
    scores = path / 'metrics' / 'metrics'  # of an earlier version
    if scores.is_file():
      found = json.loads(scores.read_text())
      write_results(folder, step, float(found['score']), int(found.get('since', 0)), {})
  except Exception as e:  # Orbax raises many types for a folder that it cannot read
    return [f'{type(e).__name__}: {reason(e)}']
  return []


def line_of(row: Row) -> str:
  size = '' if row['bytes'] is None else gib(row['bytes'])
  score = '' if row['score'] is None else f'{row["score"]:.4f}'
  return '\n'.join([f'{row["step"]:>10}  {row["state"]:10} {row["files"] or "":>6} {size:>10} {score:>12}'.rstrip(),
                    *(f'{"":12}{problem}' for problem in row['problems'])])
