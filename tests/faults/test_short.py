"""A short selection of the campaigns of faults; `make test-faults` runs all of them. Each test prints its seed."""

import json
import os
import time

import pytest

from faults import __main__ as program
from faults import kill, scorecard
from faults.damage import flip, kinds
from faults.lab import Lab, arrays_of, metrics_of
from faults.tally import Tally
from faults.unattended import CYCLE, Life, maximum, seconds_of_a_step


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
  seed = int(os.environ.get('TEST_FAULTS_SEED', time.time_ns() % 2**32))
  print(f'TEST_FAULTS_SEED={seed}')
  with Lab(tmp_path_factory.mktemp('faults'), seed) as lab:
    yield lab


def test_a_run_killed_at_random_and_in_a_save_ends_with_the_same_bits(lab):
  lab.reference()
  tally, run = Tally('kill'), lab.new('killed')
  problems = [kill.kill_once(lab, tally, run, 3.0, in_save=in_save) for in_save in (True, False)]
  assert [problem for _, problem in problems] == ['', '']
  assert lab.finish(run) == ''


def test_a_difference_of_one_bit_is_seen(lab):
  """The comparison can fail: one bit in a metric, or in an array of the last checkpoint."""
  run = lab.copy(lab.reference().workdir, 'altered')
  assert lab.differences(run) == ''
  path = run / 'metrics.jsonl'
  line = json.loads(path.read_bytes().splitlines()[20])
  path.write_text(path.read_text().replace(repr(line['train/loss']), repr(line['train/loss'] + 1e-15)))
  assert 'first difference' in lab.differences(run)
  path.write_bytes((lab.reference().workdir / 'metrics.jsonl').read_bytes())
  before = arrays_of(run / 'checkpoints' / '40')
  arrays = max(kinds(run, 40)['checkpoints/STEP/params/ocdbt.process_0/d/HASH'], key=lambda p: p.stat().st_size)
  flip(arrays, 8 * (arrays.stat().st_size // 2))
  after = arrays_of(run / 'checkpoints' / '40')
  assert any((before[name] != after[name]).any() for name in before)
  assert lab.differences(run) == 'the arrays of the last checkpoint differ'


def test_metrics_of_an_incomplete_line_are_left_out(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "train/loss": 2.5, "other": 1}\n{"step": 2, "tra')
  assert metrics_of(tmp_path) == [{'step': 1, 'train/loss': 2.5}]


def test_the_most_steps_that_can_be_kept():
  """By hand: 2 s to start, 1 s a step, a save every 10 steps."""
  lives = [Life(0, 2, 37), Life(40, 42, 60), Life(61, 63, 75)]
  assert maximum(lives, 1.0, 10) == 30 + 20 + 13
  assert maximum([Life(0, 2, 37), Life(37, float('inf'), 38), Life(38, 40, 50)], 1.0, 10) == 30 + 0 + 10


def test_the_duration_of_a_step_is_that_between_kills():
  first = [(step * 0.5, step) for step in range(CYCLE + 20)]
  resumed = [(1000 + step * 0.5, step) for step in range(100, 130)]
  assert seconds_of_a_step(first + resumed) == 0.5 and seconds_of_a_step(first[:CYCLE]) == 0


def test_every_campaign_exists_and_the_scorecard_shows_its_figures():
  for name in program.CAMPAIGNS:
    module = __import__(f'faults.{name}', fromlist=['run'])
    assert callable(module.run) and module.TRIALS > 0, name
  assert {row.campaign for row in scorecard.ROWS} == set(program.CAMPAIGNS)
  tally = Tally('kill')
  tally.add('one', '')
  tally.add('two', 'other bits')
  [first, *_] = scorecard.rows({'kill': tally.to_json()})
  assert first['measured'] == '1 of 2' and tally.failures == ['two: other bits']
  assert '| 1 of 2 |' in scorecard.table([first])
