"""Bad configs: each is refused with one message that names the field, the value and the legal ones."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from faults.lab import Lab
from faults.processes import ROOT, environment
from faults.tally import Tally

TRIALS = 100
TABLE = 'tests/test_bad_configs.py'  # one test for each config


def run(lab: Lab, trials: int) -> Tally:
  """Counts the tests of the table, of which there must be as many as trials are asked for."""
  tally, report = Tally('configs'), lab.folder / 'report.xml'
  done = subprocess.run([sys.executable, '-m', 'pytest', TABLE, '-n', '0', f'--junitxml={report}'], cwd=ROOT,
                        env=environment(lab.folder / 'cache'), capture_output=True, text=True)
  cases = [*ElementTree.parse(report).iter('testcase')] if report.exists() else []
  for case in cases:
    problems = [each.get('message') or each.tag for each in case if each.tag in ('failure', 'error', 'skipped')]
    tally.add(case.get('name') or '', *(problem[:300] for problem in problems))
  if len(cases) < trials:
    tally.add(f'{trials} configs are wanted', f'{TABLE} has {len(cases)}: {done.stdout[-300:]}')
  return tally
