"""A disk that is full at ten moments, read-only, or removed: training goes on while it can, else exit 74, one message.

Needs the right to mount (root, or a user namespace); without it the trials fail and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from faults.lab import STEPS, Job, Lab, has_traceback, is_saving, last_lines, last_step, metrics_of, saved_steps
from faults.tally import Tally

MIB = 8  # of the disk; a checkpoint takes about 0.2
PACE = {'pace': 0.2}
# The moments at which the disk becomes full, and whether there is room again 10 steps later.
MOMENTS = ('before the start', 'while preparing', 'at step 2', 'before the first save', 'in a save', 'after a save',
           'before the evaluation', 'at step 22', 'in a save, for good', 'at step 12, for good')
TRIALS = len(MOMENTS) + 2


def run(lab: Lab, trials: int) -> Tally:
  tally = Tally('disk')
  lab.reference()
  cases = [*MOMENTS, 'read-only', 'removed']
  for case in cases if trials >= len(cases) else lab.rng.sample(cases, trials):
    disk = lab.new('disk')
    disk.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={MIB}m', 'tmpfs', disk], check=True)
    try:
      tally.add(case, {'read-only': read_only, 'removed': removed}.get(case, full)(lab, disk / 'run', case))
    finally:
      while subprocess.run(['umount', '-l', disk], capture_output=True).returncode == 0:
        pass
  return tally


def reached(job: Job, moment: str) -> bool:
  workdir, text = job.workdir, job.text()
  step = last_step(workdir)
  return {'while preparing': 'runtime:' in text, 'at step 2': step >= 2, 'before the first save': step >= 8,
          'in a save': is_saving(workdir), 'after a save': 10 in saved_steps(workdir), 'at step 22': step >= 22,
          'before the evaluation': step >= 18, 'in a save, for good': is_saving(workdir),
          'at step 12, for good': step >= 12}[moment]


def fill(disk: Path) -> None:
  with open(disk / 'filler', 'wb', buffering=0) as f:
    block = bytes(1 << 16)
    try:
      while True:
        f.write(block)
    except OSError:
      pass
    try:
      while True:
        f.write(b'0')  # to the last byte
    except OSError:
      pass


def full(lab: Lab, workdir: Path, moment: str) -> str:
  """With room again, the run ends with 0 and loses nothing; without, with 74 and a warning before. Both resume."""
  disk = workdir.parent
  if moment == 'before the start':
    fill(disk)
    return refused(lab, workdir) or (free(disk) or lab.finish(workdir))
  job = lab.start(workdir, faults=PACE)
  if not job.until(lambda: reached(job, moment)):
    job.end()
    return f'the moment was not reached: {last_lines(job.text())}'
  fill(disk)
  begun = last_step(workdir)
  if 'for good' in moment:
    [code] = job.wait(60)
  else:
    time.sleep(2 if 'save' in moment else 0.7)  # in 2 s a save is due, which fails
    free(disk)
    [code] = job.wait()
  job.end()
  free(disk)
  text = job.text()
  problems = ['a traceback' if has_traceback(text) else '']
  if code == 74 and moment == 'while preparing':  # nothing was trained, so nothing is lost
    problems += ['' if 'cannot be written' in text else last_lines(text)]
  elif 'for good' in moment:
    problems += [f'exit code {code}: {last_lines(text)}' if code != 74 else '',
                 '' if 'WARNING' in text else 'no warning before the end']
  else:
    problems += [f'exit code {code}: {last_lines(text)}' if code != 0 else '',
                 gap(workdir, begun) if code == 0 else '']
  return '; '.join(filter(None, (*problems, after(lab, workdir))))


def gap(workdir: Path, begun: int) -> str:
  """What is wrong with the metrics of a run that had no room for a while: they must go on afterwards."""
  steps = [int(line['step']) for line in metrics_of(workdir)]
  good = steps[-1:] == [STEPS] and steps == sorted(set(steps))
  return '' if good else f'metrics end at step {steps[-1:]}; the disk was full at step {begun}'


def after(lab: Lab, workdir: Path) -> str:
  """Resumes to the end: the final arrays must be those of an undisturbed run; lines of metrics may be missing."""
  problem = lab.finish(workdir)
  return '' if 'lines of metrics' in problem else problem


def free(disk: Path) -> str:
  (disk / 'filler').unlink(missing_ok=True)
  return ''


def refused(lab: Lab, workdir: Path) -> str:
  """A start that must end with 74 and one message."""
  job = lab.start(workdir, faults=PACE)
  [code] = job.wait(60)
  job.end()
  text = job.text()
  return '; '.join(filter(None, (f'exit code {code}: {last_lines(text)}' if code != 74 else '',
                                 'a traceback' if has_traceback(text) else '')))


def read_only(lab: Lab, workdir: Path, _: str) -> str:
  """A start is refused; a disk that becomes read-only while the run trains ends it with 74, and it resumes."""
  disk = workdir.parent
  subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
  problem = refused(lab, workdir)
  subprocess.run(['mount', '-o', 'remount,rw', disk], check=True)
  return '; '.join(filter(None, (problem, lab.finish(workdir))))


def removed(lab: Lab, workdir: Path, _: str) -> str:
  """The folder is deleted while the run trains: exit 74 or training to the end, with one message."""
  job = lab.start(workdir, faults=PACE)
  job.until(lambda: last_step(workdir) >= 5)
  shutil.move(workdir, workdir.with_name('moved'))
  [code] = job.wait(60)
  job.end()
  text = job.text()
  return '; '.join(filter(None, (f'exit code {code}: {last_lines(text)}' if code != 74 else '',
                                 'a traceback' if has_traceback(text) else '')))


def can_mount() -> bool:
  return os.geteuid() == 0
