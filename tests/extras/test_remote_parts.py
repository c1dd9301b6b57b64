"""Runs in storage of hosts that share no folder: the parts that processes copy are one checkpoint, for any number."""

import json
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from program import environment, finish, write_config

from llm_jax.training.log import read_metrics
from llm_jax.training.orbax_io import is_shard, make_writer, read_arrays, shards_here, write

# In shards over the processes; 16 rows, and no dropout, whose masks depend on the number of microbatches.
FLAGS = ('--config.mesh.data=1', '--config.mesh.fsdp=-1', '--config.batch_tokens=512', '--config.tokens_per_device=64',
         '--config.model.dropout=0', '--config.model.dtype=float32', '--config.checkpoint.every=3',
         '--config.eval.every=0')


@pytest.fixture
def folder(tmp_path):
  write_config(tmp_path)
  return tmp_path


def start_hosts(folder, count, *flags, shift=0):
  """Processes that share nothing but the storage: each has a cache and a folder of its own."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  processes = []
  for i in range(count):
    host = folder / f'host{i + shift}'
    host.mkdir(exist_ok=True)
    own = {'LLM_JAX_CACHE': str(host / 'cache')}
    joined = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(count), 'JAX_PROCESS_ID': str(i)}
    processes.append(subprocess.Popen(
        [sys.executable, '-m', 'llm_jax.main', f'--config={folder}/tiny.py', *FLAGS, *flags], cwd=host,
        env=environment(folder) | own | (joined if count > 1 else {}), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True))
  return processes


def losses(path):
  return [(line['step'], line['train/loss']) for line in read_metrics(path)]


def check_losses(folder, bucket, num_steps):
  """Compares the run in storage with one of one process that nothing has disturbed."""
  finish(start_hosts(folder, 1, f'--workdir={folder}/whole', f'--config.num_steps={num_steps}')[0])
  (run, whole) = (dict(losses(path / 'metrics.jsonl')) for path in (bucket, folder / 'whole'))
  assert list(run) == list(whole) == list(range(1, num_steps + 1))
  np.testing.assert_allclose(list(run.values()), list(whole.values()), atol=1e-5)


def test_hosts_without_a_common_folder_train_one_run(folder):
  bucket = folder / 'bucket' / 'run'
  first, second = start_hosts(folder, 2, f'--workdir=file://{bucket}', '--config.num_steps=6')
  assert 'each process copies its part' in finish(first)
  finish(second)
  files = {path.relative_to(bucket / 'checkpoints' / '6').as_posix()
           for path in (bucket / 'checkpoints' / '6').rglob('*') if path.is_file()}
  assert files == {*json.loads((bucket / 'checkpoints' / '6' / 'manifest.json').read_text())['files'], 'manifest.json'}
  shards = {name for name in files if is_shard(name, files)}
  parts = []
  for i in range(2):
    part = next((folder / f'host{i}' / 'cache' / 'runs').glob(f'*.process_{i}')) / 'checkpoints' / '6'
    parts.append({name for name in shards if (part / name).exists()})
  assert all(parts) and not parts[0] & parts[1] and parts[0] | parts[1] == shards, 'each shard is of one process'
  assert (bucket / 'logs' / 'process_1.jsonl').exists()

  # One host is new.
  first, second = start_hosts(folder, 2, f'--workdir=file://{bucket}', '--config.num_steps=9', shift=1)
  assert 'resuming from step 6' in finish(first)
  finish(second)
  check_losses(folder, bucket, 9)


@pytest.mark.slow
def test_other_numbers_of_hosts_go_on_after_one_was_killed(folder):
  bucket = folder / 'bucket' / 'run'
  flags = f'--workdir=file://{bucket}', '--config.num_steps=100000'

  def train(count, kill=None, **options):
    processes, steps = start_hosts(folder, count, *flags, **options), []
    for line in processes[0].stdout:
      if found := re.match(r'step (\d+)/', line):
        steps.append(int(found[1]))
        if len(steps) >= 5:
          break
    assert steps, [finish(process, code=0) for process in processes]
    processes[kill or 0].send_signal(signal.SIGTERM if kill is None else signal.SIGKILL)
    for i, process in enumerate(processes):
      finish(process, code=75 if kill is None else -9 if i == kill else 76)

  train(4, kill=2)
  train(2)
  train(8)
  train(2, kill=0, shift=8)
  last = max(int(path.name) for path in (bucket / 'checkpoints').iterdir() if path.name.isdigit())
  finish(start_hosts(folder, 1, f'--workdir=file://{bucket}', f'--config.num_steps={last + 3}')[0])
  check_losses(folder, bucket, last + 3)
  for process in start_hosts(folder, 2, flags[0], '--config.data.seq_len=16'):
    assert f'--workdir=file://{bucket}_2' in finish(process, code=78)
  leftovers = [path for path in bucket.rglob('*') if 'part_' in path.name or '.lock' in path.name]
  assert not leftovers, leftovers


@pytest.mark.slow
def test_a_run_whose_lock_was_taken_writes_nothing_more(folder):
  bucket = folder / 'bucket' / 'run'
  processes = start_hosts(folder, 2, f'--workdir=file://{bucket}', '--config.num_steps=100000',
                          '--config.checkpoint.every=20000')
  for line in processes[0].stdout:
    if line.startswith('step 5/'):
      break
  theirs = [bucket / 'checkpoints' / str(step) / 'manifest.json' for step in range(5, 2000)]
  for path in theirs:
    path.parent.mkdir(parents=True)
    path.write_text('of the other run')
  (bucket / '.lock.json').write_text(json.dumps({'launch': 'another', 'host': 'other', 'process': 1}))
  for process in processes:
    assert 'another run has taken the lock' in finish(process, code=74)
  assert all(path.read_text() == 'of the other run' for path in theirs)
  assert {path.name for path in (bucket / 'checkpoints').rglob('*') if path.is_file()} == {'manifest.json'}
  assert not (bucket / 'metrics.jsonl').exists()


def test_a_folder_that_hosts_do_not_share_is_refused(folder):
  for process in start_hosts(folder, 2, '--workdir=run'):
    output = finish(process, code=78)
    assert 'is another folder on each host' in output and 'bucket' in output, output[-2000:]
  assert not [*folder.glob('host*/run')]


def test_shards_of_a_process_are_those_of_its_devices(tmp_path):
  def put(num_devices, *axes):
    mesh = jax.make_mesh((num_devices,), ('x',), devices=jax.devices()[:num_devices])
    values = np.arange(48, dtype=np.float32).reshape(8, 6), np.arange(4, dtype=np.float32), np.float32(3)
    return [jax.device_put(value, NamedSharding(mesh, spec)) for value, spec in zip(values, axes, strict=True)]

  arrays = put(4, P('x', None), P(), P())
  writer = make_writer(in_parts=True)
  write(writer, tmp_path / '1', arrays, {'n': arrays[0]}, {'step': 1})
  writer.wait_until_finished()
  writer.close()
  make_writer().close()  # registers the handler that other tests use
  names = {path.relative_to(tmp_path / '1').as_posix() for path in (tmp_path / '1').rglob('*') if path.is_file()}
  shards = {name for name in names if is_shard(name, names)}
  assert len(shards) == 4 + 1 + 1 + 4
  other = put(2, P(None, 'x'), P('x'), P())
  trees = {'params': jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), other)}
  assert shards_here(tmp_path / '1', trees) == {name for name in shards if name.startswith('params/')}
  for wanted, found in zip(other, read_arrays(tmp_path / '1', trees)['params'], strict=True):
    np.testing.assert_array_equal(wanted, found)
    assert wanted.sharding == found.sharding
