"""A full disk: a save that fails costs no step, and logs go on when there is room."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import StorageError
from llm_jax.base.loggers import LoggedRun
from llm_jax.config import CheckpointConfig, LogConfig
from llm_jax.training import log
from llm_jax.training.checkpoint import MAX_FAILED, Checkpoints
from llm_jax.training.log import MetricsWriter, read_metrics


@pytest.fixture
def disk(tmp_path):
  """A file system of 8 MB."""
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'none', str(tmp_path)], capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')
  yield tmp_path
  subprocess.run(['umount', '-l', str(tmp_path)], check=True)


def fill(disk, leave=0):
  """Writes a file that leaves so many bytes free, and returns it."""
  path = disk / 'filler'
  with open(path, 'wb', buffering=0) as f:
    try:
      while True:
        f.write(bytes(1 << 16))
    except OSError:
      pass
    f.truncate(max(0, path.stat().st_size - leave))
  return path


def tree(step):
  return {'w': jnp.asarray(np.random.default_rng(step).standard_normal(1 << 17), jnp.float32)}  # 512 KB


def save(checkpoints, step):
  return checkpoints.save(step, tree(step), {'m': tree(step)['w']}, {})


def test_a_save_that_fails_is_reported_at_once_and_the_next_one_succeeds(disk, capfd):
  with Checkpoints(disk / 'checkpoints', CheckpointConfig(keep_last=2)) as checkpoints:
    save(checkpoints, 1)
    assert checkpoints.wait()
    for leave in (0, 1 << 18, 3 << 18):  # nothing, or a part of it, can be written
      filler = fill(disk, leave)
      assert save(checkpoints, 2), 'training goes on'
      assert not checkpoints.wait() and checkpoints.steps() == [1]
      filler.unlink()
      [line] = capfd.readouterr().err.splitlines()
      assert line == (f'WARNING: {disk}/checkpoints: checkpoint 2 could not be saved (No space left on device); '
                      'training continues, and the next save is tried as usual')
      assert save(checkpoints, 2) and checkpoints.wait(), 'the step counts as not saved'
      assert checkpoints.steps() == [1, 2]
      checkpoints.set_aside_after(1)
      capfd.readouterr()
  assert not list((disk / 'checkpoints').glob('*.unfinished*'))


def test_old_steps_are_freed_for_the_next_attempt(disk):
  """After a failure the policy is applied as if the new step were saved already; one step remains always."""
  with Checkpoints(disk / 'checkpoints', CheckpointConfig(keep_last=2)) as checkpoints:
    for step in (1, 2):
      save(checkpoints, step)
    assert checkpoints.wait()
    fill(disk, 1 << 20)
    save(checkpoints, 3)
    assert not checkpoints.wait() and checkpoints.steps() == [1, 2]
    assert save(checkpoints, 4) and checkpoints.wait() and checkpoints.steps() == [2, 4]


def test_several_failures_in_a_row_end_the_run(disk):
  with Checkpoints(disk / 'checkpoints', CheckpointConfig()) as checkpoints:
    save(checkpoints, 1)
    assert checkpoints.wait()
    fill(disk)
    with pytest.raises(StorageError, match=f'{MAX_FAILED} saves in a row failed.*goes on from step 1'):
      for step in range(2, 2 + MAX_FAILED):
        save(checkpoints, step)
    assert step == 1 + MAX_FAILED
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(1)))[0], tree(1))


def test_logs_go_on_when_there_is_room_and_the_gap_is_counted(disk, monkeypatch, capfd):
  monkeypatch.setattr(log, 'MAX_WAIT', 0.0)  # tries again with each entry
  writer = MetricsWriter(LoggedRun(disk, 0, {}), LogConfig(loggers=('jsonl', 'csv', 'tensorboard')))
  writer.scalars(1, {'train/loss': 1.0})
  filler = fill(disk)
  for step in range(2, 400):  # the last page of each file has room
    writer.scalars(step, {'train/loss': float(step)})
  filler.unlink()
  written = [line['step'] for line in read_metrics(disk / 'metrics.jsonl')]
  for step in range(400, 403):
    writer.scalars(step, {'train/loss': float(step)})
  writer.scalars(402, {'val/loss': 1.0})
  writer.close()
  lines = read_metrics(disk / 'metrics.jsonl')
  assert [line['step'] for line in lines] == [*written, 400, 401, 402] and lines[-1]['val/loss'] == 1
  assert all(json.loads(line) for line in (disk / 'metrics.jsonl').read_text().splitlines()), 'no part of a line'
  printed = capfd.readouterr().err
  assert printed.count('WARNING: jsonl: metrics cannot be written') == 1 and 'Traceback' not in printed
  assert f'WARNING: jsonl: {399 - len(written)} entries are missing; metrics are written again' in printed
