"""SIGTERM, SIGINT and SIGHUP in each phase of a run of one and of two ranks: exit 75 in 30 s, nothing half done."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from faults.lab import Job, Lab, has_traceback, is_saving, last_lines, last_step, saved_steps
from faults.tally import Tally

TRIALS = 100
LIMIT = 30.0  # seconds
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PHASES = ('start', 'preparing', 'compiling', 'step', 'save', 'evaluation')
PACE = {'pace': 0.05}


def run(lab: Lab, trials: int) -> Tally:
  tally = Tally('signals')
  lab.reference()
  cases = [(number, phase, ranks) for ranks in (1, 2) for phase in PHASES for number in NUMBERS]
  while len(cases) < trials:
    cases += cases
  for number, phase, ranks in lab.rng.sample(cases, trials):
    seconds, problem = one(lab, number, phase, ranks)
    tally.most(f'slowest_exit_seconds_{ranks}_ranks', round(seconds, 2))
    tally.add(f'{number.name} in {phase}, {ranks} rank(s)', problem)
  return tally


def one(lab: Lab, number: signal.Signals, phase: str, ranks: int) -> tuple[float, str]:
  """(seconds to the exit, what is wrong) of a run that gets a signal in a phase, and is then resumed to its end."""
  workdir = lab.new('signalled')
  job = lab.start(workdir, ranks=ranks, faults=PACE)
  if not job.until(lambda: in_phase(job, phase)):
    job.end()
    return 0.0, f'the phase was not reached: {last_lines(job.text())}'
  time.sleep(lab.rng.uniform(0, 0.1))
  start = time.monotonic()
  job.programs[lab.rng.randrange(ranks)].signal(number)
  codes = job.wait(LIMIT)
  seconds, late = time.monotonic() - start, job.running()
  job.end()
  text, step = job.text(), last_step(workdir)
  lost = step - max(saved_steps(workdir), default=0)
  return seconds, '; '.join(filter(None, (
      f'still running after {LIMIT:.0f} s' if late else '',
      f'exit codes {codes}: {last_lines(text)}' if set(codes) != {75} and not late else '',
      'a traceback' if has_traceback(text) else '',
      f'{lost} steps lost' if lost > 0 else '',
      lab.finish(workdir, ranks=ranks))))


def handles(pid: int, number: signal.Signals) -> bool:
  """Whether a process has a handler for a signal."""
  caught = re.search(r'SigCgt:\s*([0-9a-f]+)', Path(f'/proc/{pid}/status').read_text())
  return bool(caught and int(caught[1], 16) >> number - 1 & 1)


def in_phase(job: Job, phase: str) -> bool:
  text, workdir = job.programs[0].text(), job.workdir
  if phase == 'start':  # until a program handles signals, the system's default ends it
    return all(handles(program.pid, signal.SIGTERM) for program in job.programs)
  if phase == 'preparing':
    return 'runtime:' in text
  if phase == 'compiling':
    return bool(re.search(r'compiling|workdir: ', text))
  if phase == 'step':
    return last_step(workdir) >= 3
  if phase == 'save':
    return is_saving(workdir)
  return 'evaluat' in text or last_step(workdir) >= 19  # the evaluation is that of step 20
