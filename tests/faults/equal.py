"""The same run on other devices: 2 processes x 1 device bitwise as 1 x 2; 1, 2 and 4 devices within 1e-5."""

from __future__ import annotations

from faults.lab import Lab, last_lines, metrics_of
from faults.tally import Tally

TRIALS = 3
MESHES = 30  # float32 steps that are compared between numbers of devices
TOLERANCE = 1e-5


def run(lab: Lab, trials: int) -> Tally:
  tally = Tally('equal')
  workdir = lab.new('processes')
  job = lab.start(workdir, ranks=2)
  problem = f'{last_lines(job.text())}' if job.wait() != [0, 0] else lab.differences(workdir, devices=2)
  job.end()
  tally.figures['two_processes'] = problem or 'bitwise'
  tally.add('2 processes x 1 device and 1 x 2', problem)
  losses = {devices: losses_on(lab, devices) for devices in (1, 2, 4)}
  for devices in (2, 4):
    largest = max(abs(a - b) for a, b in zip(losses[1], losses[devices], strict=True))
    tally.most('largest_loss_difference', largest)
    tally.add(f'{devices} devices and 1', '' if largest <= TOLERANCE else f'losses differ by {largest:.2e}')
  return tally


def losses_on(lab: Lab, devices: int) -> list[float]:
  """The losses of the steps without dropout, whose masks would be those of other shards."""
  workdir = lab.new('mesh')
  job = lab.start(workdir, f'--config.num_steps={MESHES}', '--config.model.dropout=0', devices=devices)
  if job.wait() != [0]:
    raise RuntimeError(last_lines(job.text()))
  found = [line['train/loss'] for line in metrics_of(workdir)]
  assert len(found) == MESHES
  return found
