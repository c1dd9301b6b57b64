"""The loggers csv and wandb, and a logger of a user's own."""

import csv
import math
import struct
from typing import ClassVar

import pytest
from program import write_config

import llm_jax
from llm_jax.base.errors import ConfigError
from llm_jax.base.loggers import LOGGERS, LoggedRun, Logger
from llm_jax.base.registry import register
from llm_jax.extras.loggers import Csv
from llm_jax.training.log import read_metrics


def rows_of(workdir):
  with (workdir / 'metrics.csv').open() as file:
    return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]


@pytest.mark.parametrize('step', [0, 2, 5, 9])
def test_csv_has_a_row_for_each_step_and_drops_later_ones_on_resume(tmp_path, step):
  logger, expected = Csv(LoggedRun(tmp_path, 0, {})), []
  for n in range(1, 6):
    values = {'train/loss': n / 2} | ({'val/loss': math.inf} if n == 3 else {})  # a new column in the middle
    logger.scalars(n, values)
    expected.append({'step': n} | values)
    assert rows_of(tmp_path) == expected
  logger.scalars(5, {'val/loss': 9.0})
  expected[-1]['val/loss'] = 9.0
  logger.close()
  with (tmp_path / 'metrics.csv').open('a') as file:
    file.write('6,')  # of a killed process
  logger = Csv(LoggedRun(tmp_path, step, {}))
  assert rows_of(tmp_path) == expected[:step]
  logger.scalars(step + 1, {'train/loss': 0.5})
  logger.close()
  assert rows_of(tmp_path) == [*expected[:step], {'step': step + 1, 'train/loss': 0.5}]


class Kept(Logger):
  """A logger as a user writes it: it keeps everything in memory."""

  opened: ClassVar[list] = []

  def __init__(self, run: LoggedRun, scale: float = 1.0):
    self.run, self.scale, self.seen, self.closed = run, scale, [], False
    self.opened.append(self)

  def scalars(self, step, values):
    self.seen.append((step, self.scale * values['train/loss']))

  def close(self):
    self.closed = True


register(LOGGERS, 'kept', Kept)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('loggers')
  write_config(folder)
  return folder


def config(folder, *loggers, **settings):
  return llm_jax.load_config(folder / 'tiny.py', **{
      'num_steps': 4, 'eval.every': 0, 'checkpoint.every': 2, 'log.loggers': loggers, 'model.num_layers': 1,
      'model.scan_unroll': 1} | settings)


def test_a_logger_from_outside_and_a_run_without_jsonl(folder):
  lines = list(llm_jax.train(config(folder, 'kept', 'csv', **{'log.kept.scale': 2.0}), folder / 'own'))
  [kept] = Kept.opened
  assert kept.seen == [(line['step'], 2 * line['train/loss']) for line in lines] and kept.closed
  assert kept.run.config['num_steps'] == 4 and kept.run.step == 0
  assert [row['train/loss'] for row in rows_of(folder / 'own')] == [line['train/loss'] for line in lines]
  names = {path.name.split('.')[0] for path in (folder / 'own').iterdir()}
  assert 'metrics' in names and 'events' not in names and not (folder / 'own' / 'metrics.jsonl').exists()


def test_an_unknown_logger_is_an_error_with_the_nearest_name(folder):
  with pytest.raises(ConfigError, match=r"config.log.*'wandbb', which is unknown; .*did you mean 'wandb'"):
    config(folder, 'wandbb')
  with pytest.raises(ConfigError, match='neither loggers nor callbacks names it'):
    config(folder, 'jsonl', **{'log.wandb.project': 'x'})


def records(data):
  """The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB with parts (checksum, length, kind)."""
  from wandb.proto import wandb_internal_pb2
  at, record = 7, b''  # after the header
  while at < len(data):
    if (room := 32768 - at % 32768) < 7:
      at += room
      continue
    length, kind = struct.unpack('<HB', data[at + 4:at + 7])
    record, at = record + data[at + 7:at + 7 + length], at + 7 + length
    if kind in (1, 4):  # a whole record, or its last part
      yield wandb_internal_pb2.Record.FromString(record)
      record = b''


def test_wandb_goes_on_with_the_same_run(folder, monkeypatch):
  wandb = pytest.importorskip('wandb')
  for name, value in (('MODE', 'offline'), ('DIR', ''), ('SILENT', 'true'), ('CACHE_DIR', str(folder / 'cache'))):
    monkeypatch.setenv(f'WANDB_{name}', value)
  workdir = folder / 'wandb_run'
  for num_steps in (4, 6):
    list(llm_jax.train(config(folder, 'wandb', 'jsonl', **{
        'num_steps': num_steps, 'log.wandb.project': 'ours'}), workdir))
    assert wandb.run is None
  steps, ids = [], set()
  for path in sorted(workdir.glob('wandb/offline-run-*/*.wandb')):
    for record in records(path.read_bytes()):
      if record.WhichOneof('record_type') == 'run':
        ids.add((record.run.run_id, record.run.project))
      if record.WhichOneof('record_type') == 'history':
        items = {item.key or '/'.join(item.nested_key): item.value_json for item in record.history.item}
        steps.append((int(items['step']), float(items['train/loss'])))
  assert ids == {((workdir / 'wandb_id').read_text().strip(), 'ours')}
  assert steps == [(line['step'], pytest.approx(line['train/loss'])) for line in read_metrics(
      workdir / 'metrics.jsonl')]
