"""3,000 steps with saves and evaluations: memory, threads and open files of the process do not grow."""

from __future__ import annotations

import statistics
from pathlib import Path

import psutil

from faults.lab import Lab, last_lines, last_step
from faults.tally import Tally

TRIALS = 3_000  # steps
NOISE = 8 << 20  # bytes: what glibc's heap moves by in a process that does not grow


def num_threads(pid: int) -> int:
  """Threads without TensorStore's pool, which grows and shrinks with what is written: 7 to 9 in 6,000 steps."""
  names = [path.read_text().strip() for path in Path(f'/proc/{pid}/task').glob('*/comm')]
  return sum(name != 'ts_pool_worker' for name in names)


def run(lab: Lab, trials: int) -> Tally:
  """Compares the second third of the steps with the last one, as caches fill in the first."""
  tally, workdir = Tally('leaks'), lab.new('long')
  job = lab.start(workdir, f'--config.num_steps={trials}', '--config.checkpoint.every=50', '--config.eval.every=250')
  process = psutil.Process(job.programs[0].pid)
  samples: dict[str, list[tuple[float, ...]]] = {'middle': [], 'end': []}
  while job.programs[0].wait(0.05) is None:
    step = last_step(workdir)
    part = 'end' if step >= 2 / 3 * trials else 'middle' if step >= trials / 3 else ''
    if part and step < trials - 20:  # before it closes
      try:
        samples[part].append((process.memory_info().rss, num_threads(process.pid), process.num_fds()))
      except (psutil.Error, OSError):
        break
  [code] = job.wait()
  if code != 0 or not all(samples.values()):
    tally.add('the run', f'exit code {code}, {len(samples["end"])} samples: {last_lines(job.text())}')
    return tally
  middle, end = (list(zip(*samples[part], strict=True)) for part in ('middle', 'end'))
  grown = statistics.median(end[0]) - statistics.median(middle[0])
  spread = max(middle[0]) - min(middle[0])
  threads, files = (min(end[kind]) - min(middle[kind]) for kind in (1, 2))  # a save has more of both for a while
  tally.figures |= {'rss_growth_mib': round(grown / 2**20, 1), 'rss_mib': round(statistics.median(end[0]) / 2**20),
                    'threads_growth': threads, 'descriptors_growth': files}
  tally.add('memory', '' if grown <= max(NOISE, spread) else f'{grown / 2**20:.1f} MiB more')
  tally.add('threads', '' if threads <= 0 else f'{threads} more')
  tally.add('open files', '' if files <= 0 else f'{files} more')
  return tally
