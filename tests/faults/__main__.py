"""Runs campaigns of faults and prints the scorecard: `make test-faults`, or

  PYTHONPATH=tests python -m faults [--only=kill,bits] [--seed=7] [--trials=20] [--out=results.json]

Exits with 1 if a trial failed. The seed is printed; the same one repeats all random choices. The file is written after
each campaign; those that it has from before are kept, so that a run can be made in parts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

from faults import scorecard
from faults.lab import Lab
from faults.processes import ROOT
from faults.tally import Tally

CAMPAIGNS = ('kill', 'bits', 'files', 'signals', 'ranks', 'starts', 'disk', 'numbers', 'wrong', 'configs', 'equal',
             'leaks', 'unattended')


def run_campaign(name: str, folder: Path, seed: int, trials: int) -> Tally:
  """One campaign; an error of the campaign itself is a failed trial. 0 trials: the number that the campaign sets."""
  campaign = importlib.import_module(f'faults.{name}')
  print(f'{name}: {(campaign.__doc__ or "").splitlines()[0]}', flush=True)
  with Lab(folder, seed) as lab:
    try:
      return campaign.run(lab, trials or campaign.TRIALS)
    except Exception as e:
      traceback.print_exc()
      tally = Tally(name)
      tally.add('the campaign itself', f'{type(e).__name__}: {e}')
      return tally


def main() -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('--only', default=','.join(CAMPAIGNS), help='campaigns, separated by commas')
  parser.add_argument('--seed', type=int, default=time.time_ns() % 2**32)
  parser.add_argument('--trials', type=int, default=0, help='of each campaign; 0: the numbers of the scorecard')
  parser.add_argument('--out', type=Path, help='the JSON file; default: benchmarks/results/faults-DATE.json')
  args = parser.parse_args()
  print(f'--seed={args.seed}', flush=True)
  out = args.out or ROOT / 'benchmarks' / 'results' / f'faults-{datetime.date.today()}.json'
  results = json.loads(out.read_text())['campaigns'] if out.exists() else {}
  for name in args.only.split(','):
    with tempfile.TemporaryDirectory(prefix=f'faults_{name}_') as folder:
      results[name] = {'seed': args.seed} | run_campaign(name, Path(folder), args.seed, args.trials).to_json()
    card = scorecard.rows(results)
    about = {'date': str(datetime.date.today()), 'machine': f'{platform.machine()}, {scorecard.cores()} cores',
             'python': platform.python_version()}
    out.write_text(json.dumps(about | {'scorecard': card, 'campaigns': results}, indent=1) + '\n')
  print(scorecard.table(card))
  failed = {name: found for name in args.only.split(',') if (found := results[name]['failures'])}
  for name, failures in failed.items():
    print(f'{name}: {len(failures)} failed:\n  ' + '\n  '.join(failures[:20]))
  print(f'written to {out}')
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
