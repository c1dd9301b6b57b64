"""Metrics: one line per step, no duplicates after a restart, and a full disk stops only the log."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from llm_jax.base.loggers import LoggedRun
from llm_jax.base.progress import duration
from llm_jax.config import LogConfig
from llm_jax.training.launches import read_launches
from llm_jax.training.log import MetricsWriter, read_metrics
from llm_jax.training.status import Status, read_status
from llm_jax.training.throughput import Throughput


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
  """TensorBoard sorts event files by name: second, then a number of the process, whose 10 is before its 9."""
  monkeypatch.setattr(event_file_writer, '_global_uid', event_file_writer.AtomicCounter(100))


def open_writer(workdir, step, *loggers, config=None):
  return MetricsWriter(LoggedRun(workdir, step, config or {'num_steps': 9}), LogConfig(
      loggers=loggers or ('tensorboard', 'jsonl')))


def write(workdir, begin, end, scale=1.0, text=None):
  """Writes the metrics of a run from `begin` to `end`: a loss at each step, a val/loss at every third."""
  writer = open_writer(workdir, begin)
  for step in range(begin + 1, end + 1):
    writer.scalars(step, {'train/loss': scale * step, **({'val/loss': -scale * step} if step % 3 == 0 else {})})
    if text:
      writer.text(step, 'sample', f'{text} {step}\n  second line')
  writer.close()


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def curves(workdir, reader=event_accumulator):
  """[(step, value)] as read by TensorBoard's API for scripts, or by that for its pages (plugin_event_accumulator)."""
  accumulator = reader.EventAccumulator(str(workdir), size_guidance={'tensors': 0, 'scalars': 0})
  accumulator.Reload()
  tags = accumulator.Tags()
  read = {tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in accumulator.Tensors(tag)]
          for tag in tags['tensors'] if not tag.startswith('_hparams_')}
  return read | {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags.get('scalars', [])}


def test_jsonl_has_one_line_per_step(tmp_path):
  write(tmp_path, 0, 7)
  assert [line['step'] for line in lines_of(tmp_path)] == list(range(1, 8))
  assert lines_of(tmp_path)[2] == {'step': 3, 'train/loss': 3.0, 'val/loss': -3.0}
  assert read_metrics(tmp_path / 'metrics.jsonl') == lines_of(tmp_path)


def test_later_values_of_a_step_extend_its_line(tmp_path):
  write(tmp_path, 0, 2)
  writer = open_writer(tmp_path, 2)
  writer.scalars(2, {'val/loss': 9.0})
  writer.scalars(3, {'train/loss': 3.0})
  writer.scalars(3, {'val/loss': 8.0})
  writer.close()
  assert lines_of(tmp_path) == [{'step': 1, 'train/loss': 1.0}, {'step': 2, 'train/loss': 2.0, 'val/loss': 9.0},
                                {'step': 3, 'train/loss': 3.0, 'val/loss': 8.0}]


def test_lines_can_be_read_during_the_run(tmp_path):
  writer = open_writer(tmp_path, 0)
  for step in range(1, 4):
    writer.scalars(step, {'train/loss': 1.0})
    writer.scalars(step, {})  # nothing to say: no line
    assert len(lines_of(tmp_path)) == step
  writer.close()


@pytest.mark.parametrize('step', [0, 3, 4, 7, 9])
def test_resuming_removes_later_lines(tmp_path, step):
  write(tmp_path, 0, 7)
  before = lines_of(tmp_path)
  open_writer(tmp_path, step).close()
  assert lines_of(tmp_path) == before[:step]
  write(tmp_path, step, 10, scale=100.0)
  after = lines_of(tmp_path)
  assert [line['step'] for line in after] == [*range(1, min(step, 7) + 1), *range(step + 1, 11)]
  assert [line['train/loss'] for line in after if line['step'] > step] == [100.0 * s for s in range(step + 1, 11)]


def test_a_truncated_last_line_is_removed(tmp_path):
  write(tmp_path, 0, 4)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  last = len(whole.splitlines(keepends=True)[-1])
  for cut in range(1, last + 1):  # 1: only the line's end is gone
    path.write_bytes(whole[:-cut])
    assert [line['step'] for line in read_metrics(path)] == ([1, 2, 3] if cut > 1 else [1, 2, 3, 4])
    writer = open_writer(tmp_path, 4)
    writer.scalars(5, {'train/loss': 5.0})
    writer.close()
    assert [line['step'] for line in lines_of(tmp_path)] in ([1, 2, 3, 5], [1, 2, 3, 4, 5]), cut


def test_non_finite_values_survive(tmp_path):
  writer = open_writer(tmp_path, 0)
  writer.scalars(1, {'train/loss': float('nan'), 'train/grad_norm': float('inf')})
  writer.close()
  [line] = read_metrics(tmp_path / 'metrics.jsonl')
  assert line['train/loss'] != line['train/loss']
  assert line['train/grad_norm'] == float('inf')


READERS = pytest.mark.parametrize('reader', [event_accumulator, plugin_event_accumulator],
                                  ids=lambda module: module.__name__.rsplit('.')[-1])


@READERS
def test_tensorboard_reads_scalars_and_texts(tmp_path, reader):
  write(tmp_path, 0, 6, text='once upon')
  read = curves(tmp_path, reader)
  assert read['loss/train'] == [(step, step) for step in range(1, 7)]
  assert read['loss/val'] == [(3, -3), (6, -6)]
  texts = dict(next(values for tag, values in read.items() if tag.startswith('sample')))
  assert sorted(texts) == list(range(1, 7))
  assert texts[4].decode().split('\n') == ['**step 4**, sample', '', '> once upon 4  ', '> &nbsp;&nbsp;second line  ']


@READERS
@pytest.mark.parametrize('step', [1, 3, 4])
def test_tensorboard_drops_points_after_a_resume(tmp_path, step, reader):
  write(tmp_path, 0, 8)
  open_writer(tmp_path, step).close()  # even before a new point is written, and for curves that get none
  read = curves(tmp_path, reader)
  assert [s for s, _ in read['loss/train']] == list(range(1, step + 1))
  assert [s for s, _ in read['loss/val']] == [s for s in (3, 6) if s <= step]
  write(tmp_path, step, 6, scale=100.0)
  assert curves(tmp_path, reader)['loss/train'] == [(s, s if s <= step else 100 * s) for s in range(1, 7)]


FULL_DISK = '''
import resource, signal, sys, time
from pathlib import Path
from llm_jax.base.loggers import LoggedRun
from llm_jax.config import LogConfig
from llm_jax.training.log import MetricsWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails with an OSError, as on a full disk

def limit(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

workdir = Path(sys.argv[1])
for name, size, begin in (('later', 4000, 0), ('from_the_start', 0, 0), ('going_on', 10, 2)):
  folder = workdir / name
  folder.mkdir()
  if begin:
    limit(resource.RLIM_INFINITY)
    (folder / 'metrics.jsonl').write_text(''.join('{"step": %d, "train/loss": 0.5}\\n' % i for i in (1, 2, 3)))
  limit(size)
  writer = MetricsWriter(LoggedRun(folder, begin, {}), LogConfig())
  for step in range(begin + 1, 200):
    writer.scalars(step, {'train/loss': 0.5, 'train/grad_norm': 1.0})
    writer.text(step, 'sample', 'text ' * 10)
  writer.close()
print('goes on')
'''


def test_a_full_disk_stops_only_the_log(tmp_path):
  done = subprocess.run([sys.executable, '-c', FULL_DISK, tmp_path], text=True, timeout=120,
                        env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True)
  assert (done.returncode, done.stdout) == (0, 'goes on\n'), done.stderr
  assert done.stderr.count('WARNING: jsonl: metrics cannot be written') == 3, done.stderr  # one for each writer
  assert done.stderr.count('WARNING: tensorboard: metrics') <= 3, done.stderr
  steps = [line['step'] for line in read_metrics(tmp_path / 'later/metrics.jsonl')]
  assert steps == list(range(1, len(steps) + 1))
  assert 0 < len(steps) < 199
  # What is there from before is not lost to a rewrite that fails.
  assert [line['step'] for line in read_metrics(tmp_path / 'going_on/metrics.jsonl')] == [1, 2, 3]


def test_a_deleted_workdir_stops_only_the_log(tmp_path, capsys):
  writer = open_writer(tmp_path / 'gone', 0)
  writer.scalars(1, {'train/loss': 1.0})
  writer.text(1, 'sample', 'text')
  writer.close()
  cannot, missing = capsys.readouterr().err.splitlines()
  assert 'jsonl: metrics cannot be written' in cannot and missing == 'WARNING: jsonl: 2 entries were not written'


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  write(tmp_path, 0, 3, text='text')
  assert not list(tmp_path.iterdir())


def test_durations_are_formatted():
  for seconds, text in ((0, '0:00'), (9, '0:09'), (59.6, '1:00'), (61, '1:01'), (3599, '59:59'), (3599.5, '1:00:00'),
                        (3661, '1:01:01'), (100 * 3600, '100:00:00')):
    assert duration(seconds) == text


# Throughput, by the real clock: what it counts lies between what was slept and what passed here.

def steps(throughput, count, seconds, tokens):
  """Restarts and makes `count` steps; returns the time that passed."""
  begin = time.perf_counter()
  throughput.restart()
  for _ in range(count):
    time.sleep(seconds)
    throughput.waited(seconds / 2)
    throughput.step_done(tokens)
  return time.perf_counter() - begin


def test_throughput_excludes_the_first_step():
  throughput = Throughput(flops_per_token=2.0, peak=1000.0)
  time.sleep(0.1)  # compiling
  throughput.waited(0.1)
  throughput.step_done(10**6)
  assert throughput.take() == {}
  passed = steps(throughput, 3, 0.01, tokens=100)
  values = throughput.take()
  assert 0.01 <= values['seconds_per_step'] <= passed / 3
  assert values['tokens_per_second'] == pytest.approx(100 / values['seconds_per_step'])
  assert values['mfu'] == pytest.approx(values['tokens_per_second'] * 2.0 / 1000.0)
  assert values['data_wait'] == pytest.approx(0.005 / values['seconds_per_step'])
  assert throughput.take() == {}


def test_throughput_excludes_steps_delayed_by_the_caller():
  throughput = Throughput(flops_per_token=1.0, peak=None)
  throughput.away(1.0)  # before the time begins, as after an evaluation
  throughput.restart()
  for away, tokens in ((0.0, 100), (0.05, 300)):
    time.sleep(0.01 + away)
    throughput.away(away)
    throughput.step_done(tokens)
  values = throughput.take()
  assert values['tokens_per_second'] * values['seconds_per_step'] == pytest.approx(100), 'of the first alone'


def test_throughput_excludes_time_between_steps():
  throughput = Throughput(flops_per_token=1.0, peak=None)
  throughput.step_done(1)
  passed = steps(throughput, 1, 0.01, tokens=100)
  time.sleep(0.1)  # evaluation, a save
  passed += steps(throughput, 2, 0.01, tokens=100)
  values = throughput.take()
  assert 0.01 <= values['seconds_per_step'] <= passed / 3
  assert 'mfu' not in values
  # Each take is of the steps since the last.
  passed = steps(throughput, 1, 0.01, tokens=50)
  assert 50 / passed <= throughput.take()['tokens_per_second'] <= 50 / 0.01


def test_status_is_written_at_most_once_per_second(tmp_path, monkeypatch):
  with Status(tmp_path, 10) as status:
    status.update(at_once=False, step=3)
    assert read_status(tmp_path)['step'] == 0 and status.values['step'] == 3
    status.update(step=4)
    assert read_status(tmp_path)['step'] == 4
    monkeypatch.setattr('llm_jax.training.status.SECONDS', 0.0)
    status.update(at_once=False, step=5)
    assert read_status(tmp_path)['step'] == 5
    monkeypatch.setattr('llm_jax.training.status.SECONDS', 60.0)
    status.update(at_once=False, step=6)
  assert read_status(tmp_path) == status.values and status.values['step'] == 6


def test_a_jump_of_the_clock_is_no_time_of_training(tmp_path, monkeypatch):
  with Status(tmp_path, 9) as status:
    later = time.time() + 3600
    monkeypatch.setattr(time, 'time', lambda: later)
    status.update(step=1)
    assert read_status(tmp_path)['seconds'] < 60
  assert read_launches(tmp_path)[-1]['seconds'] < 60
