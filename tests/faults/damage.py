"""Damage to the files of a run, and what a resumed run may make of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from faults.lab import STEPS, Lab, arrays_hash, has_traceback, last_lines, metrics_of, resumed_from, saved_steps


def kinds(run: Path, step: int) -> dict[str, list[Path]]:
  """The files of a run by kind, of its checkpoints those of one step; files of hashed names are one kind."""
  found: dict[str, list[Path]] = {}
  for path in sorted(path for path in run.rglob('*') if path.is_file() and path.stat().st_size):
    name = path.relative_to(run).as_posix()
    parts = name.split('/')
    if parts[0] == 'checkpoints' and parts[1].partition('.')[0] != str(step):
      continue
    kind = re.sub(r'/\d+', '/STEP', re.sub(r'[0-9a-f]{32}', 'HASH', re.sub(r'(events\.out\.tfevents).*', r'\1', name)))
    found.setdefault(kind, []).append(path)
  return found


def of_checkpoint(path: Path) -> bool:
  """Whether a file belongs to the arrays, metadata or manifest of a checkpoint."""
  return bool(re.search(r'checkpoints/\d+/', path.as_posix()))


def flip(path: Path, bit: int) -> None:
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def survived(lab: Lab, run: Path, path: Path, step: int) -> tuple[bool, str]:
  """(whether the damage was found, what is wrong) of a run that is resumed to its end after `path` was damaged.

  Damage to a checkpoint must be found, named and set aside, and an older step used. Damage to another file must be
  reported or have no effect. In both cases the run ends with the arrays of an undisturbed one, and all lines of metrics
  that were not damaged themselves are there.
  """
  name, in_checkpoint = path.relative_to(run).as_posix(), of_checkpoint(path)
  before = path.read_bytes() if path.exists() else b''
  job = lab.start(run)
  codes, text = job.wait(), job.text()
  job.end()
  if codes != [0]:
    return False, f'exit codes {codes}: {last_lines(text)}'
  named = path.name in text and 'WARNING' in text
  aside = [p.name for p in (run / 'checkpoints').glob(f'{step}.corrupt-*')]
  found = named and bool(aside) and resumed_from(text) < step if in_checkpoint else named
  problems = ['a traceback' if has_traceback(text) else '',
              'other arrays at the end' if arrays_hash(run, STEPS) != lab.reference().final else '',
              broken_metrics(lab, run, name)]
  if in_checkpoint and not found:
    problems.append(f'used in silence: named {named}, set aside {aside}, resumed from {resumed_from(text)}')
  if not in_checkpoint and not found and before and not harmless(lab, run, path):
    problems.append('changed in silence')
  return found, '; '.join(filter(None, problems))


def broken_metrics(lab: Lab, run: Path, damaged: str) -> str:
  """What is wrong with metrics.jsonl: each step once, in order, as in an undisturbed run. '' if nothing is.

  If metrics.jsonl itself was damaged, the lines up to the step that the run resumed from may be gone.
  """
  try:
    lines = metrics_of(run)
  except ValueError as e:
    return f'metrics.jsonl cannot be read: {e}'
  wanted = lab.reference().lines
  if damaged == 'metrics.jsonl':
    return '' if lines[-10:] == wanted[-10:] else 'the lines after the resumed step differ'
  return '' if lines == wanted else f'{len(lines)} lines of metrics, which differ'


def harmless(lab: Lab, run: Path, path: Path) -> bool:
  """Whether a file that was not reported has been written again as an undisturbed run has it, or is only a record.

  Records of what was, which nothing reads to train or to infer: events for TensorBoard, the history of launches, the
  metrics, the status and the reports of processes.
  """
  if path.parent.name == 'processes':
    return True
  if path.name.startswith(('events.', 'launches', 'metrics', 'status')) or path.name.endswith('.score.json'):
    return True
  wanted = lab.reference().workdir / path.relative_to(run)
  return path.exists() and wanted.exists() and comparable(path) == comparable(wanted)


def comparable(path: Path) -> object:
  content = path.read_bytes()
  return json.loads(content) if path.suffix == '.json' else content


def checked(lab: Lab, run: Path, path: Path) -> str:
  """What is wrong if `llm-jax check` does not find a damaged file of an older step; '' if it does."""
  program = lab.program('check', f'--workdir={run}')
  code, text = program.wait(), program.text()
  program.end()
  return '' if code and path.name in text and not has_traceback(text) else (
      f'llm-jax check --workdir: exit code {code}, the file is not named: {last_lines(text, 3)}')


def older_step(run: Path) -> int:
  return saved_steps(run)[0]
