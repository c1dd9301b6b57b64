"""Simultaneous starts of one run: one trains, all others are refused; a lock that a killed run leaves is taken over."""

from __future__ import annotations

import signal

from faults.lab import Lab, has_traceback, last_lines, last_step
from faults.tally import Tally

TRIALS = 50
AT_ONCE = 10


def run(lab: Lab, trials: int) -> Tally:
  tally = Tally('starts')
  lab.reference()
  while tally.trials < trials:
    num = min(AT_ONCE, trials - tally.trials)
    workdir = lab.new('contested')
    first = lab.start(workdir, faults={'pace': 1.0})
    first.until(lambda run=workdir: last_step(run) >= 1)
    if lab.rng.random() < 0.5:  # the lock's file does not make the lock
      (workdir / '.lock').unlink(missing_ok=True)
    others = [lab.start(workdir, faults={'pace': 1.0}) for _ in range(num)]
    codes = [other.wait(60)[0] for other in others]
    for other in others:
      other.end()
    first.signal(signal.SIGKILL)
    first.wait()
    problem = lab.finish(workdir)  # the lock is stale now
    for code, other in zip(codes, others, strict=True):
      text = other.text()
      refused = '' if code == 74 and 'another run' in text else f'exit code {code}: {last_lines(text)}'
      tally.add('a start beside a run', refused, 'a traceback' if has_traceback(text) else '', problem)
  race(lab, tally)
  return tally


def race(lab: Lab, tally: Tally) -> None:
  """Five starts at the same moment in a new folder: exactly one trains."""
  workdir = lab.new('raced')
  jobs = [lab.start(workdir) for _ in range(5)]
  codes = sorted(job.wait()[0] or 0 for job in jobs)
  tally.add('five starts at once in a new folder', '' if codes == [0, 74, 74, 74, 74] else f'exit codes {codes}',
            lab.differences(workdir))
