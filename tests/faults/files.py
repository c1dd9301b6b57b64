"""Each kind of file of a run truncated, emptied, deleted, zeroed or swapped, and damaged folders of checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from faults.damage import kinds, of_checkpoint, survived
from faults.lab import STEPS, Lab, arrays_hash, has_traceback, last_lines, resumed_from, saved_steps
from faults.tally import Tally

# Of each kind of file one, if the run has it; the first five of checkpoint.py's own files are those with content.
KINDS = ('config.json', 'tokenizer.json', 'metrics.jsonl', 'status.json', 'launches.jsonl', 'plugins.json',
         'checkpoints/STEP/manifest.json', 'checkpoints/STEP/params/manifest.ocdbt',
         'checkpoints/STEP/params/_METADATA', 'checkpoints/STEP/params/ocdbt.process_0/d/HASH',
         'checkpoints/STEP/opt_state/ocdbt.process_0/d/HASH', 'checkpoints/STEP/meta/metadata',
         'checkpoints/STEP/_CHECKPOINT_METADATA')
TRIALS = 5 * len(KINDS) + 9


def truncate(path: Path, other: Path) -> None:
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def empty(path: Path, other: Path) -> None:
  path.write_bytes(b'')


def delete(path: Path, other: Path) -> None:
  path.unlink()


def zero(path: Path, other: Path) -> None:
  path.write_bytes(bytes(path.stat().st_size))


def swap(path: Path, other: Path) -> None:
  """Replaces a file by one that was valid elsewhere: that of another step, or of another run."""
  shutil.copyfile(other, path)


FAULTS = (truncate, empty, delete, zero, swap)


def run(lab: Lab, trials: int) -> Tally:
  tally, base = Tally('files'), lab.interrupted()
  cases: list[tuple] = [(damage_file, kind, fault) for kind in KINDS for fault in FAULTS]
  cases += [(damage_folder, case, None) for case in FOLDERS]
  for trial, what, fault in cases if trials >= len(cases) else lab.rng.sample(cases, trials):
    folder = lab.copy(base, 'damaged')
    label, problem = trial(lab, folder, what, fault)
    tally.add(label, problem)
    shutil.rmtree(folder)
  return tally


def damage_file(lab: Lab, folder: Path, kind: str, fault: Callable) -> tuple[str, str]:
  older, newest = saved_steps(folder)[-2:]
  found = kinds(folder, newest).get(kind)
  if not found:
    return f'{fault.__name__} {kind}', 'the run has no such file'
  path = max(found, key=lambda path: path.stat().st_size)
  if of_checkpoint(path):
    other = max(kinds(folder, older)[kind], key=lambda path: path.stat().st_size)
  else:
    other = other_run(lab) / path.name
  label, before = f'{fault.__name__} {path.relative_to(folder)}', path.read_bytes()
  fault(path, other)
  if path.exists() and path.read_bytes() == before:
    return label, ''  # the other step's file is the same
  return label, survived(lab, folder, path, newest)[1]


def other_run(lab: Lab) -> Path:
  """A run with another tokenizer and another seed, of one step."""
  workdir = lab.folder / 'other'
  if not workdir.exists():
    job = lab.start(workdir, '--config.seed=5', '--config.num_steps=1', '--config.data.tokenizer=char')
    if job.wait() != [0]:
      raise RuntimeError(job.text()[-3000:])
  return workdir


# Folder cases: each damages `checkpoints` and returns the step that the run must resume from, or 74 for a refusal.
def empty_newer_step(steps: Path) -> int:
  (steps / '30').mkdir()
  return 20


def half_copied_step(steps: Path) -> int:
  shutil.copytree(steps / '20', steps / '30')
  for path in sorted(p for p in (steps / '30').rglob('*') if p.is_file())[::2]:
    path.unlink()
  return 20


def copy_under_another_name(steps: Path) -> int:
  shutil.copytree(steps / '20', steps / '30')
  return 20


def no_manifest(steps: Path) -> int:
  shutil.copytree(steps / '20', steps / '30')
  (steps / '30' / 'manifest.json').unlink(missing_ok=True)
  return 20


def left_over_of_a_save(steps: Path) -> int:
  shutil.copytree(steps / '20', steps / '30.orbax-checkpoint-tmp')
  return 20


def foreign_files(steps: Path) -> int:
  shutil.copytree(steps / '20', steps / 'backup_30')
  (steps / 'notes.txt').write_text('do not delete')
  (steps / '35').write_text('a file with the name of a step')
  return 20


def all_steps_damaged(steps: Path) -> int:
  for step in ('10', '20'):
    for path in (steps / step).rglob('d/*'):
      zero(path, path)
  return 74


def folder_emptied(steps: Path) -> int:
  shutil.rmtree(steps)
  steps.mkdir()
  return 74


def folder_gone(steps: Path) -> int:
  shutil.rmtree(steps)
  return 74


FOLDERS = (empty_newer_step, half_copied_step, copy_under_another_name, no_manifest, left_over_of_a_save, foreign_files,
           all_steps_damaged, folder_emptied, folder_gone)


def damage_folder(lab: Lab, folder: Path, case: Callable[[Path], int], _: None) -> tuple[str, str]:
  wanted = case(folder / 'checkpoints')
  lines = (folder / 'metrics.jsonl').read_bytes()
  job = lab.start(folder)
  [code], text = job.wait(), job.text()
  job.end()
  problems = ['a traceback' if has_traceback(text) else '']
  if wanted == 74:
    problems += [f'exit code {code}: {last_lines(text)}' if code != 74 else '',
                 '--start_over is not named' if code == 74 and '--start_over' not in text else '',
                 'the history was cut' if (folder / 'metrics.jsonl').read_bytes() != lines else '']
  elif code != 0:
    problems += [f'exit code {code}: {last_lines(text)}']
  else:
    problems += [f'resumed from {resumed_from(text)}' if resumed_from(text) != wanted else '',
                 'other arrays at the end' if arrays_hash(folder, STEPS) != lab.reference().final else '']
  return case.__name__.replace('_', ' '), '; '.join(filter(None, problems))
