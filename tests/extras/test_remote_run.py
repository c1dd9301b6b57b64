"""Runs in object storage: what is there equals the local folder, and another host goes on from it to the bit."""

import json
import shutil
import signal
import threading
import time

import fsspec
import pytest
from program import write_config
from s3 import s3_server

import llm_jax
from llm_jax import main
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import saved_steps
from llm_jax.base.seal import seal, unseal
from llm_jax.commands import evaluate
from llm_jax.extras import bucket, remote_lock, remote_run
from llm_jax.training.log import read_metrics


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('remote')
  write_config(folder)
  return folder


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
  """Each test is a host of its own, and copies often."""
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'host'))
  monkeypatch.setattr(remote_run, 'EVERY', 0.2)
  monkeypatch.setattr(bucket, 'WAIT', 0.05)
  monkeypatch.setattr(remote_lock, 'STALE', 1.0)
  monkeypatch.setattr(remote_lock, 'POLL', 0.1)
  monkeypatch.setattr(remote_lock, 'SETTLE', 0.1)


def train(folder, url, num_steps, *flags):
  main.main([f'--config={folder}/tiny.py', f'--workdir={url}', '--config.eval.sample_tokens=0',
             f'--config.num_steps={num_steps}', '--config.eval.every=6', '--config.checkpoint.every=3',
             '--config.optim.schedule=constant', *flags])


def losses(path):
  return {line['step']: (line['train/loss'], line['train/grad_norm']) for line in read_metrics(path)}


def local_folder():
  return next((remote_run.user_cache() / 'runs').iterdir())


@pytest.mark.slow
def test_another_host_resumes_the_same_bits(folder, monkeypatch, tmp_path, capsys):
  fs, url = fsspec.filesystem('memory'), 'memory://bucket/runs/one'
  train(folder, folder / 'whole', 9)
  train(folder, url, 6)
  first = local_folder()
  names = {path.removeprefix('/bucket/runs/one/') for path in fs.find('/bucket/runs/one')}
  assert {'config.json', 'metrics.jsonl', 'status.json', 'tokenizer.json', 'checkpoints/6/manifest.json'} <= names
  assert '.lock.json' not in names, 'the lock is released'
  for name in names - {'launch.json'}:
    assert fs.cat_file(f'/bucket/runs/one/{name}') == (first / name).read_bytes()
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'other_host'))
  train(folder, url, 9)
  assert 'resuming from step 6' in capsys.readouterr().out
  assert losses(local_folder() / 'metrics.jsonl') == losses(folder / 'whole' / 'metrics.jsonl')
  steps = remote_run.steps_in([path.removeprefix('/bucket/runs/one/') for path in fs.find('/bucket/runs/one')])
  assert steps == saved_steps(local_folder() / 'checkpoints') or set(steps) > set(
      saved_steps(local_folder() / 'checkpoints')), 'the best one of the first host may be there alone'
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'third_host'))
  evaluate.main([url])
  assert llm_jax.load(url, 6).generate('def', num_tokens=3)
  with pytest.raises(ConfigError, match='does not contain a run'):
    evaluate.main(['memory://bucket/runs/none'])

  newest = max(fs.find('/bucket/runs/one/checkpoints/9'), key=fs.size)
  content = bytearray(fs.cat_file(newest))
  content[len(content) // 2] ^= 1
  fs.pipe_file(newest, bytes(content))
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'fourth_host'))
  capsys.readouterr()
  train(folder, url, 9)
  captured = capsys.readouterr()
  assert 'damaged: step 9' in captured.err and 'its content has changed' in captured.err
  assert 'resuming from step 6' in captured.out


def test_a_reader_copies_what_it_needs(folder, monkeypatch, tmp_path, capsys):
  url = 'memory://bucket/runs/read'
  train(folder, url, 6)
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'reader'))
  assert llm_jax.load(url).run.meta['step'] == 6
  read = next((remote_run.user_cache() / 'read').glob('read-*'))
  here = [path.relative_to(read / 'checkpoints').parts for path in (read / 'checkpoints').rglob('*') if path.is_file()]
  assert {parts[1] for parts in here if parts[0] == '6'} >= {'params', 'meta', 'manifest.json'}
  assert not [parts for parts in here if 'opt_state' in parts or ('3' in parts and 'params' in parts)]
  assert llm_jax.load(url, 3).run.meta['step'] == 3
  with pytest.raises(ConfigError, match=r'--checkpoint: must be latest, best, or a step of \[3, 6\]'):
    llm_jax.load(url, 4)

  fs = fsspec.filesystem('memory')
  shutil.rmtree(read)
  with monkeypatch.context() as patch:
    patch.setattr(type(fs), 'get_file', lambda *args, **kwargs: (_ for _ in ()).throw(OSError('connection reset')))
    with pytest.raises(StorageError, match='connection reset'):
      llm_jax.load(url)
  for damage in ('', None):  # of metadata, which is read first
    content = fs.cat_file(name := '/bucket/runs/read/checkpoints/6/params/_METADATA')
    fs.rm_file(name) if damage is None else fs.pipe_file(name, b'')
    assert llm_jax.load(url).run.meta['step'] == 3
    assert '_METADATA: ' + ('is missing' if damage is None else 'its content has changed') in capsys.readouterr().err
    fs.pipe_file(name, content)
  capsys.readouterr()

  train(folder, tmp_path / 'branch', 7, f'--config.start.run={url}', '--config.start.whole=true')
  assert 'resuming from step 6' in capsys.readouterr().out
  train(folder, tmp_path / 'warm', 1, f'--config.start.run={url}')
  with pytest.raises(ConfigError, match=r'config\.start\.run: memory://bucket/runs/none does not contain a run'):
    train(folder, tmp_path / 'none', 1, '--config.start.run=memory://bucket/runs/none')


def test_a_name_that_leads_out_of_the_folder_is_refused(folder, monkeypatch, tmp_path):
  url, fs = 'memory://bucket/runs/traversal', fsspec.filesystem('memory')
  train(folder, url, 3)
  manifest = '/bucket/runs/traversal/checkpoints/3/manifest.json'
  values = unseal(fs.cat_file(manifest))
  values['files']['../../../outside'] = {'bytes': 4, 'hash': 'any'}
  fs.pipe_file(manifest, seal(values))
  fs.pipe_file('/bucket/runs/traversal/checkpoints/3/../../../outside', b'evil')
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'reader'))
  with pytest.raises(StorageError, match='leads out of the run'):
    llm_jax.load(url)
  assert not [*tmp_path.rglob('outside*')]


def test_files_of_a_step_without_a_manifest_are_left(folder, monkeypatch, tmp_path):
  url, fs = 'memory://bucket/runs/unverified', fsspec.filesystem('memory')
  train(folder, url, 3)
  fs.rm_file('/bucket/runs/unverified/checkpoints/3/manifest.json')
  before = fs.find('/bucket/runs/unverified/checkpoints')
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'other'))
  with pytest.raises(StorageError, match='there is no checkpoint, but the files beside it'):
    train(folder, url, 6)
  assert fs.find('/bucket/runs/unverified/checkpoints') == before


def test_training_goes_on_while_the_storage_fails(folder, monkeypatch, capsys):
  fs, url = fsspec.filesystem('memory'), 'memory://bucket/runs/failing'
  broken = threading.Event()
  put, pipe = type(fs).put_file, type(fs).pipe_file

  def refuse(original):
    def call(*args, **kwargs):
      if broken.is_set():
        raise OSError('the network is down')
      return original(*args, **kwargs)
    return call

  monkeypatch.setattr(type(fs), 'put_file', refuse(put))
  monkeypatch.setattr(type(fs), 'pipe_file', refuse(pipe))
  training = llm_jax.train(llm_jax.load_config(folder / 'tiny.py', **{
      'num_steps': 12, 'checkpoint.every': 3, 'eval.every': 0, 'log.every': 1, 'eval.sample_tokens': 0}), url)
  with pytest.raises(StorageError, match='the end of the run could not be copied'):
    for metrics in training:
      if metrics['step'] == 4:
        broken.set()
        time.sleep(0.6)
  assert 'cannot be written' in capsys.readouterr().err
  assert saved_steps(training.workdir / 'checkpoints')[-1] == 12
  assert not fs.exists('/bucket/runs/failing/checkpoints/12')
  broken.clear()
  for _ in llm_jax.train(training.config, url):
    pass
  assert fs.exists('/bucket/runs/failing/checkpoints/12/manifest.json'), 'the local folder, which is ahead, was copied'


def test_the_lock_refuses_a_second_run_and_is_taken_over_when_stale(folder, capsys):
  url = 'memory://bucket/runs/locked'
  bucket = remote_run.Bucket(url)
  holder = remote_lock.RemoteLock(bucket, 'first')
  holder.acquire()
  beating = threading.Event()

  def beat():
    while not beating.wait(0.1):
      holder.beat()

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with pytest.raises(StorageError, match='another run is training in memory://bucket/runs/locked: process'):
      train(folder, url, 3)
  finally:
    beating.set()
    thread.join()
  before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
  stopped = []
  try:
    train(folder, url, 3)  # STALE seconds after the last beat
    assert saved_steps(local_folder() / 'checkpoints') == [3]
    bucket.write('.lock.json', b'{"launch": "third"}')
    with pytest.raises(StorageError, match='another run has taken the lock'):
      holder.beat()
    assert stopped == [1], 'it saves and stops'
  finally:
    signal.signal(signal.SIGTERM, before)


def test_data_passed_from_python_reach_the_run_there(folder, monkeypatch, tmp_path, capsys):
  url, texts = 'memory://bucket/runs/given', [f'cat {i} sat on the mat of sir {i * i}\n' * 20 for i in range(40)]

  def losses_of(num_steps, data):
    config = llm_jax.load_config(folder / 'tiny.py', **{
        'num_steps': num_steps, 'eval.every': 0, 'eval.sample_tokens': 0, 'log.every': 1})
    return [metrics['train/loss'] for metrics in llm_jax.train(config, url, data=data)]

  assert len(losses_of(2, texts)) == 2
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'other_host'))
  assert len(losses_of(3, texts)) == 1 and 'resuming from step 2' in capsys.readouterr().out
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'third_host'))
  with pytest.raises(ConfigError, match='the data differs from the data of the checkpoint'):
    losses_of(4, texts[1:])


def test_names_of_checkpoint_files():
  assert remote_run.step_of('checkpoints/12/params/d/x') == 12
  assert remote_run.step_of('checkpoints/12.score.json') is None and remote_run.step_of('metrics.jsonl') is None
  assert remote_run.steps_in(['checkpoints/3/manifest.json', 'checkpoints/4/meta/x', 'checkpoints/5/meta/manifest.json',
                              'checkpoints/6.corrupt-1/manifest.json']) == [3]


@pytest.mark.slow
def test_a_run_on_an_s3_server_is_killed_and_resumed(folder, tmp_path, monkeypatch):
  with s3_server(monkeypatch) as fs:
    url = 's3://bucket/runs/one'
    train(folder, folder / 's3_whole', 9)
    train(folder, url, 6)
    shutil.rmtree(local_folder())
    fs.pipe_file('s3://bucket/runs/one/.lock.json', json.dumps({'host': 'gone', 'process': 1}).encode())  # killed
    train(folder, url, 9)
    assert losses(local_folder() / 'metrics.jsonl') == losses(folder / 's3_whole' / 'metrics.jsonl')
    evaluate.main([url])
    first, second = (remote_lock.RemoteLock(remote_run.Bucket(url), name) for name in ('a', 'b'))
    first.acquire()
    with pytest.raises(FileExistsError):
      remote_run.Bucket(url).fs.pipe_file('s3://bucket/runs/one/.lock.json', b'', mode='create')
    first.release()
    second.acquire()
    with pytest.raises(StorageError, match='bucket does not exist'):
      train(folder, 's3://my-typo/runs/one', 3)
    assert fs.ls('') == ['bucket'], 'a bucket is not made'


@pytest.mark.slow
def test_a_rewind_replaces_the_steps_there(folder, monkeypatch, tmp_path, capsys):
  from llm_jax.base.callbacks import CALLBACKS
  from llm_jax.base.registry import register
  from llm_jax.training.rewind import read_journal

  def back(event):
    if event.step == 8 and not read_journal(event.session.checkpoints.workdir)['rewinds']:
      while 'checkpoints/6/manifest.json' not in remote():  # so that the step to be replaced is there
        time.sleep(0.1)
      event.rewind(4, 'asked to')

  def remote():
    return {path.removeprefix('/bucket/runs/back/') for path in fs.find('/bucket/runs/back')}

  fs, url = fsspec.filesystem('memory'), 'memory://bucket/runs/back'
  if 'back_once' not in CALLBACKS:
    register(CALLBACKS, 'back_once', back)
  train(folder, url, 9, '--config.log.callbacks=back_once', '--config.checkpoint.keep_last=9')
  assert 'going back to step 3' in capsys.readouterr().out and 'rewinds.json' in remote()
  for step in (3, 6, 9):
    name = f'checkpoints/{step}/manifest.json'
    assert fs.cat_file(f'/bucket/runs/back/{name}') == (local_folder() / name).read_bytes(), step
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'another_host'))
  train(folder, url, 12, '--config.log.callbacks=back_once', '--config.checkpoint.keep_last=9')
  assert 'resuming from step 9' in capsys.readouterr().out
