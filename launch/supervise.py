"""Runs a command again until it is finished: after a stop, a lost process or a crash, with a bound.

  python launch/supervise.py --workdir=runs/a -- llm-jax train --config=gpt_small --workdir=runs/a

The exit code decides: 0 ends; 75, 76 (stopped, lost) and a death by a signal start again at once, or after a pause if
nothing gets on; 74 (storage) and any other code start again after a pause that doubles; 65, 70 and 78 (data,
divergence, config) end, as a repetition would fail too. With --workdir it also ends after --tries starts in a row
without a new checkpoint, else after --tries failures in a row. Signals are forwarded, and after SIGTERM, SIGINT or
SIGHUP nothing is started again. Each start and its end is a line of --log. Uses the standard library alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

FINAL = {0: 'finished', 65: 'data error', 70: 'diverged', 78: 'config error', 126: 'cannot be run', 127: 'not found'}
AT_ONCE = {75: 'stopped and saved', 76: 'a process was lost or stuck'}
PAUSED = {74: 'storage error'}
PAUSE_SECONDS, LONGEST_PAUSE = 5.0, 600.0


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path, help='the folder of the run, whose checkpoints show its progress')
  parser.add_argument('--log', type=Path, help='(default: WORKDIR_supervise.jsonl, or supervise.jsonl)')
  parser.add_argument('--tries', type=int, default=8, help='starts in a row without progress after which it ends')
  parser.add_argument('--pause', type=float, default=PAUSE_SECONDS, help='seconds of the first pause')
  parser.add_argument('command', nargs=argparse.REMAINDER, help='-- and the command')
  args = parser.parse_args()
  args.command = args.command[args.command[:1] == ['--']:]
  if not args.command or args.tries < 1:
    parser.error('name a command after --, and --tries of at least 1')
  return args


def latest_step(workdir: Path | None) -> int:
  """The newest checkpoint; -1 without one."""
  paths = (workdir / 'checkpoints').glob('*') if workdir else ()
  return max((int(path.name) for path in paths if path.name.isdigit() and (path / 'manifest.json').is_file()),
             default=-1)


def cause(code: int) -> str:
  if code < 0 or code > 128:
    number = -code if code < 0 else code - 128
    return f'signal {signal.Signals(number).name if number in set(signal.Signals) else number}'
  return {**FINAL, **AT_ONCE, **PAUSED}.get(code, 'crashed')


class Supervisor:
  """Starts the command; `stopped` is the signal that this program got."""

  def __init__(self, args: argparse.Namespace):
    self._args, self.stopped = args, 0
    beside = args.workdir and args.workdir.with_name(f'{args.workdir.name}_supervise.jsonl')
    self._log = args.log or beside or Path('supervise.jsonl')
    self._process: subprocess.Popen | None = None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
        signal.signal(number, self._forward)

  def _forward(self, number: int, frame: object) -> None:
    self.stopped = number
    if self._process is not None and self._process.poll() is None:
      self._process.send_signal(number)

  def run(self) -> int:
    fruitless, pause = 0, self._args.pause
    for start in range(1, sys.maxsize):
      before, began = latest_step(self._args.workdir), time.monotonic()
      # Its own session: the terminal's Ctrl-C reaches it once, through this program.
      self._process = subprocess.Popen(self._args.command, start_new_session=True)
      if self.stopped:
        self._process.send_signal(self.stopped)  # it came while the process was made
      code = self._process.wait()
      after = latest_step(self._args.workdir)
      progress = after > before if self._args.workdir else code in AT_ONCE
      fruitless, pause = (0, self._args.pause) if progress else (fruitless + 1, pause)
      done = bool(self.stopped) or code in FINAL or fruitless >= self._args.tries
      wait = 0.0 if done or ((code in AT_ONCE or not 0 <= code <= 128) and fruitless < 2) else pause
      self.note(start=start, code=code, cause=cause(code), seconds=round(time.monotonic() - began, 1), step=after,
                without_progress=fruitless, then='end' if done else f'start again in {wait:.0f} s')
      if done:
        return code if code >= 0 else 128 - code
      pause = min(pause * 2, LONGEST_PAUSE) if wait else pause
      deadline = time.monotonic() + wait
      while time.monotonic() < deadline and not self.stopped:
        time.sleep(0.1)
      if self.stopped:
        return 75
    return 0

  def note(self, **values: object) -> None:
    """Prints a line and adds it to the log; a full disk stops nothing."""
    print('supervise: ' + ', '.join(f'{name} {value}' for name, value in values.items()), file=sys.stderr, flush=True)
    line = {'time': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
            'command': shlex.join(self._args.command), **values}
    try:
      self._log.parent.mkdir(parents=True, exist_ok=True)
      with open(self._log, 'a') as f:
        f.write(json.dumps(line) + '\n')
    except OSError as e:
      print(f'supervise: {self._log} cannot be written: {e}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  sys.exit(Supervisor(parse()).run())
