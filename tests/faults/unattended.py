"""Minutes of random kills of two ranks under launch/supervise.py, without a hand: goodput against its maximum.

The maximum is what arithmetic leaves to any system that saves every I steps and takes R seconds from a kill to the
first new step: of each period between two kills, the steps that fit into it after R, down to a multiple of I; of the
last period, all of them. R is measured for each restart, from the start of its processes to the first new step. The
duration of a step is the median over the run, with its share of saves and evaluations. What remains below 100% is what
the supervisor adds: to notice the loss, to end the other rank, to wait before a restart, and steps that were done but
whose save was not committed.
"""

from __future__ import annotations

import itertools
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from faults.lab import Lab, last_lines, last_step, metrics_of
from faults.processes import ROOT, environment
from faults.tally import Tally

TRIALS = 10  # minutes
BETWEEN = (45.0, 120.0)  # seconds between two kills
PACE = 0.1  # seconds that a step sleeps, so that other programs on the machine change its duration little
LEAST = 0.97
EVERY, CYCLE = 20, 100  # steps between saves, and between evaluations, after which their share of the time repeats


class Life(NamedTuple):
  """The processes between two kills: seconds since the first start."""

  started: float  # of the processes
  first_step: float  # done; infinity if they were killed before
  ended: float


def maximum(lives: list[Life], step_seconds: float, interval: int) -> int:
  """The most steps that can be kept. A pure function; see above."""
  restarts = [life.first_step - life.started for life in lives]
  usual = statistics.median([seconds for seconds in restarts if seconds < float('inf')] or [0.0])
  kept, begin = 0, lives[0].started
  for life, restart in zip(lives, restarts, strict=True):
    steps = int(max(0.0, life.ended - begin - (restart if restart < float('inf') else usual)) / step_seconds)
    kept += steps if life is lives[-1] else steps // interval * interval
    begin = life.ended
  return kept


def run(lab: Lab, trials: int) -> Tally:
  tally, workdir, seconds = Tally('unattended'), lab.new('unattended'), 60.0 * trials
  log = lab.folder / 'supervise.txt'
  with log.open('w') as output:
    process = subprocess.Popen(
        [sys.executable, ROOT / 'launch' / 'supervise.py', f'--workdir={workdir}', '--', sys.executable,
         ROOT / 'launch' / 'local.py', '--num_processes=2', '--', f'--config={lab.folder}/tiny.py',
         f'--workdir={workdir}', '--config.num_steps=1000000', f'--config.checkpoint.every={EVERY}',
         f'--config.eval.every={CYCLE}'],
        cwd=lab.folder, env=environment(lab.folder / 'cache') | {'FAULTS': f'{{"pace": {PACE}}}'}, stdout=output,
        stderr=subprocess.STDOUT, start_new_session=True)
  try:
    lives, seen = watch(lab, process, workdir, seconds)
    kept = last_step(workdir)
    alive = process.poll() is None
    process.send_signal(signal.SIGTERM)
    stopped = wait(process, 60)
  finally:
    end(process)
  if not lives or seconds_of_a_step(seen) == 0:
    tally.add('the run', f'no {CYCLE} steps in a row were seen; the supervisor runs: {alive}: '
              f'{last_lines(log.read_text())}')
    return tally
  step_seconds = seconds_of_a_step(seen)
  most = maximum(lives, step_seconds, EVERY)
  tally.figures |= {'kills': len(lives) - 1, 'steps_kept': kept, 'most_steps': most, 'share_of_maximum': round(
      kept / max(1, most), 4), 'step_seconds': round(step_seconds, 4),
      'share_of_time': round(kept * step_seconds / seconds, 4)}
  tally.figures |= {
      'start_seconds': [round(life.first_step - life.started, 1) for life in lives if life.first_step < float('inf')],
      'seconds_from_kill_to_start': [round(b.started - a.ended, 1) for a, b in itertools.pairwise(lives)]}
  tally.add('the supervisor', '' if alive else f'it ended before {seconds:.0f} s: {last_lines(log.read_text())}',
            '' if stopped else 'it was still there 60 s after SIGTERM')
  tally.add('goodput', '' if kept >= LEAST * most else f'{kept} steps of at most {most} were kept')
  tally.add('the kept steps', differences(lab, workdir, kept))
  return tally


def seconds_of_a_step(seen: list[tuple[float, int]]) -> float:
  """The median duration of CYCLE steps without a kill, divided by CYCLE; 0 if there were none."""
  found, times = list[float](), dict[int, float]()
  for now, step in seen:
    if times and step <= max(times):  # resumed
      times = {}
    times[step] = now
    if step - CYCLE in times:
      found.append((now - times[step - CYCLE]) / CYCLE)
  return statistics.median(found) if found else 0.0


def watch(lab: Lab, process: subprocess.Popen, workdir: Path, seconds: float) -> tuple[list[Life], list[tuple]]:
  """Kills one rank or both at random times. Returns the lives, and (time, step) of each step that was seen."""
  begin, begin_epoch = time.monotonic(), time.time()  # psutil gives times of the second clock
  lives, seen, old = list[Life](), list[tuple[float, int]](), set[int]()
  started, first, next_kill, next_look, known = None, float('inf'), lab.rng.uniform(*BETWEEN), 0.0, 0
  while (now := time.monotonic() - begin) < seconds and process.poll() is None:
    step = last_step(workdir)
    if step > known and started is not None:  # a resumed run cuts its metrics first
      first = min(first, now)
    if step != known:
      known = step
      seen.append((now, step))
    if now >= next_look or now >= next_kill:
      next_look = now + 0.5  # looking at all processes takes some milliseconds
      ranks = [rank for rank in ranks_of(process) if rank.pid not in old]
      if ranks and started is None:
        started = ranks[0].create_time() - begin_epoch
      if ranks and now >= next_kill:
        victims = lab.rng.choice([ranks[:1], ranks[-1:], ranks])
        for victim in victims:
          victim.kill()
        old |= {rank.pid for rank in ranks}  # those that remain of this life are not those of the next one
        lives.append(Life(started, first, now))
        started, first, next_kill = None, float('inf'), now + lab.rng.uniform(*BETWEEN)
        print(f'  unattended: killed {len(victims)} rank(s) at {now:.0f} s, step {step}', flush=True)
    time.sleep(0.02)
  now = time.monotonic() - begin
  return [*lives, Life(now if started is None else started, first, now)], seen


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
  """The processes that train, in the order of their start."""
  found = []
  try:
    for child in psutil.Process(process.pid).children(recursive=True):
      if 'llm_jax.main' in child.cmdline() and '--distributed' in child.cmdline():
        found.append(child)
  except psutil.Error:
    return []
  return sorted(found, key=lambda child: child.create_time())


def wait(process: subprocess.Popen, seconds: float) -> bool:
  try:
    process.wait(seconds)
    return True
  except subprocess.TimeoutExpired:
    return False


def end(process: subprocess.Popen) -> None:
  """Kills the supervisor and all that it started."""
  try:
    tree = psutil.Process(process.pid).children(recursive=True)
  except psutil.Error:
    tree = []
  process.kill()
  for child in tree:
    try:
      child.kill()
    except psutil.Error:
      continue
  process.wait()


def differences(lab: Lab, workdir: Path, kept: int) -> str:
  """How the kept steps differ from those of an undisturbed run on two devices."""
  reference = lab.new('undisturbed')
  job = lab.start(reference, f'--config.num_steps={kept}', f'--config.checkpoint.every={EVERY}',
                  f'--config.eval.every={CYCLE}', devices=2)
  if job.wait() != [0]:
    return f'the undisturbed run failed: {last_lines(job.text())}'
  wanted = [line for line in metrics_of(reference) if line['step'] < kept]  # the last one is evaluated there
  found = [line for line in metrics_of(workdir) if line['step'] < kept]
  return '' if found == wanted else f'{len(found)} lines of metrics, which differ from the {len(wanted)} wanted'
