"""One of two ranks is killed, stuck or stopped: all ranks end in time, the culprit is named, and the run resumes."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from faults.lab import Job, Lab, last_lines, last_step
from faults.tally import Tally

# Of 7 trials 4 kill a rank, 2 let it sleep in its main thread, and one stops it by SIGSTOP.
KINDS = ('killed', 'stalled', 'killed', 'stopped', 'killed', 'stalled', 'killed')
TRIALS = 35
RESTARTED = {75, 76}  # exit codes after which a supervisor starts the run again
DETECTED = {'killed': 30.0, 'stalled': 60.0, 'stopped': 30.0}  # seconds to the last rank's exit, or to the report
OUT = {'killed': 30.0, 'stalled': 90.0, 'stopped': 30.0}  # seconds until all ranks that can end have ended


def run(lab: Lab, trials: int) -> Tally:
  tally = Tally('ranks')
  lab.reference(2)
  for kind in (KINDS * -(-trials // len(KINDS)))[:trials]:
    rank, step = lab.rng.randrange(2), lab.rng.randint(2, 30)
    seconds, problem = one(lab, kind, rank, step)
    tally.count(f'trials_{kind}')
    tally.most(f'slowest_{kind}_seconds', round(seconds, 1))
    tally.add(f'rank {rank} {kind} at step {step}', problem)
  return tally


def one(lab: Lab, kind: str, rank: int, step: int) -> tuple[float, str]:
  """(seconds until it was detected, what is wrong)."""
  workdir = lab.new(kind)
  faults: dict = {'pace': 0.05}
  if kind == 'stalled':
    faults = {'only': rank, 'stall': [step, 10_000]}
  job = lab.start(workdir, ranks=2, faults=faults)
  if not job.until(lambda: last_step(workdir) >= step - (kind == 'stalled')):
    job.end()
    return 0.0, f'step {step} was not reached: {last_lines(job.text())}'
  start = time.monotonic()
  if kind != 'stalled':
    job.programs[rank].signal(signal.SIGKILL if kind == 'killed' else signal.SIGSTOP)
  other = job.programs[1 - rank]
  ending = [other] if kind != 'stalled' else job.programs
  for program in ending:
    program.wait(max(0.0, start + OUT[kind] - time.monotonic()))
  seconds = reported_after(job, kind, start)
  late = [program.poll() is None for program in ending]
  codes = [program.poll() for program in job.programs]
  job.end()
  text = job.text() + logs(workdir)
  return seconds, '; '.join(filter(None, (
      f'ranks still run after {OUT[kind]:.0f} s' if any(late) else '',
      f'exit codes {codes}: {last_lines(other.text())}' if not any(late) and other.code not in RESTARTED else '',
      '' if re.search(rf'(rank|process|host)\s*{rank}\b', text, re.IGNORECASE) else f'rank {rank} is not named',
      '' if kind != 'stalled' or has_stacks(workdir) else 'no file has the stacks of both ranks',
      f'{seconds:.0f} s until it was detected' if seconds > DETECTED[kind] else '',
      lab.finish(workdir, ranks=2))))


def reported_after(job: Job, kind: str, start: float) -> float:
  """Seconds to the file of stacks of a stuck rank, or else to the end of the ranks."""
  reports = [path.stat().st_mtime for path in reports_of(job.workdir)]
  ended = time.monotonic() - start
  if kind == 'stalled' and reports:
    return max(0.0, min(ended, min(reports) - (time.time() - ended)))
  return ended


def logs(workdir: Path) -> str:
  return '\n'.join(path.read_text(errors='replace') for path in reports_of(workdir))


def reports_of(workdir: Path) -> list[Path]:
  return [path for path in workdir.rglob('*') if path.is_file() and path.suffix in ('.txt', '.log', '.stacks')]


def has_stacks(workdir: Path) -> bool:
  """Whether both ranks have written the stacks of their threads, among them that of the sleeping one."""
  texts = [path.read_text(errors='replace') for path in reports_of(workdir)]
  return sum('File "' in text for text in texts) >= 2 and any('plugin.py' in text for text in texts)
