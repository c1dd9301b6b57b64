"""The scorecard: what each campaign's figures are held against."""

from __future__ import annotations

import os
from typing import Any, NamedTuple


class Row(NamedTuple):
  figure: str
  campaign: str
  target: str
  shown: str  # a format of the campaign's result


ALL = '{passed} of {trials}'
ROWS = (
    Row('runs killed by SIGKILL that end with the same bits', 'kill', 'all of 200', ALL),
    Row('of these, kills during a save', 'kill', 'about half', '{killed_in_a_save}'),
    Row('most steps lost by a kill', 'kill', 'at most 2 x interval - 1 (19)', '{most_steps_lost}'),
    Row('single bit flips found, or without effect', 'bits', 'all of 200', ALL),
    Row('flips in checkpoints that were found', 'bits', 'all', '{found_in_checkpoints} of {in_checkpoints}'),
    Row('damaged files and folders survived', 'files', 'all of 74', ALL),
    Row('signals that end a run with 75, nothing lost', 'signals', 'all of 100', ALL),
    Row('slowest exit after a signal, 1 rank', 'signals', '30 s', '{slowest_exit_seconds_1_ranks} s'),
    Row('slowest exit after a signal, 2 ranks', 'signals', '30 s', '{slowest_exit_seconds_2_ranks} s'),
    Row('lost ranks that end the run and are named', 'ranks', 'all of 35', ALL),
    Row('slowest exit after a rank was killed', 'ranks', '30 s', '{slowest_killed_seconds} s'),
    Row('slowest detection of a stuck rank', 'ranks', '60 s', '{slowest_stalled_seconds} s'),
    Row('second runs refused, stale locks taken over', 'starts', 'all of 51', ALL),
    Row('full, read-only and removed disks survived', 'disk', 'all of 12', ALL),
    Row('injected NaN, Inf, 1e30 and spikes skipped', 'numbers', 'all of 50', ALL),
    Row('non-finite values in checkpoints', 'numbers', '0', '{non_finite_committed}'),
    Row('wrong checkpoints with the right message', 'wrong', 'all of 30', ALL),
    Row('bad configs refused with one message', 'configs', 'all of 100', ALL),
    Row('2 processes x 1 device as 1 x 2', 'equal', 'bitwise', '{two_processes}'),
    Row('1, 2 and 4 devices over 30 float32 steps', 'equal', 'within 1e-5', '{largest_loss_difference}'),
    Row('growth over 3,000 steps: memory', 'leaks', 'noise', '{rss_growth_mib} MiB'),
    Row('growth over 3,000 steps: threads, descriptors', 'leaks', '0', '{threads_growth}, {descriptors_growth}'),
    Row('10 minutes of kills, no hand: goodput', 'unattended', 'at least 97% of the maximum', '{share_of_maximum}'),
)


class Missing(dict):
  def __missing__(self, name: str) -> str:
    return '-'


def rows(results: dict[str, Any]) -> list[dict[str, str]]:
  """The rows of the campaigns that have run."""
  return [{'figure': row.figure, 'target': row.target, 'measured': row.shown.format_map(
      Missing(results[row.campaign] | results[row.campaign]['figures']))} for row in ROWS if row.campaign in results]


def table(card: list[dict[str, str]]) -> str:
  """As Markdown."""
  lines = ['| Figure | Target | Measured |', '|---|---|---|']
  return '\n'.join(lines + [f'| {row["figure"]} | {row["target"]} | {row["measured"]} |' for row in card])


def cores() -> int:
  return len(os.sched_getaffinity(0))
