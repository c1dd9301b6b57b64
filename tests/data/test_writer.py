"""A killed writer resumes and produces the same bytes; one process makes a store, in little memory."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from test_store import WORDS, config_of, files_of, jsonl, manifest_of, only_store, sides_of, write_corpus

from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources.filters import FilterConfig

# Makes stores in forked children and kills them with SIGKILL. 'each': one store per file operation in the cache, the
# child killed at that operation. 'random': one store, the child killed repeatedly after a random number of chunks.
KILLS = '''
import json, os, random, signal, sys, time
from pathlib import Path
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources import corpus
from llm_jax.data.sources.filters import FilterConfig
from llm_jax.data.stores import writer
from llm_jax.data.stores.store import open_store
from llm_jax.data.tokenizers import tokenizer as tokenizers

options, how, log = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
corpus.COMMIT_SECONDS, writer.CHUNK = -1, int(sys.argv[4])
os.fsync = lambda file: None  # a kill loses nothing that was written, only a machine failure does
encode = tokenizers.ByteTokenizer.encode
log.touch()

def logged(self, texts):
  with open(log, 'a') as f:
    f.write(f'{sum(map(len, texts))}\\n')
  return encode(self, texts)

tokenizers.ByteTokenizer.encode = logged

def child(cache, fatal=None):
  pid = os.fork()
  if pid:
    return pid
  touched = 0
  def hook(event, args):
    nonlocal touched
    if event in ('open', 'os.rename', 'os.remove', 'os.truncate', 'os.mkdir') and str(args[0]).startswith(cache):
      touched += 1
      if touched == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
  sys.addaudithook(hook)
  status = 1
  try:
    open_data(DataConfig(**{**options, 'filters': FilterConfig(deduplicate=options['filters']), 'cache_dir': cache}))
    status = 0
  except BaseException as e:
    print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True)
  finally:
    os._exit(status)

def ended(pid, cache):
  status = os.waitpid(pid, 0)[1]
  for folder in Path(cache).glob('stores/*'):
    if folder.is_dir() and folder.suffix != '.partial':
      open_store(folder, 'all')  # complete or absent
  if os.WIFEXITED(status) and os.WEXITSTATUS(status):
    sys.exit('a child failed')
  return os.WIFEXITED(status)

kills = 0
if how == 'each':
  while not ended(child(f'{options["cache_dir"]}/{kills + 1}', fatal=kills + 1), f'{options["cache_dir"]}/{kills + 1}'):
    kills += 1
    if not ended(child(f'{options["cache_dir"]}/{kills}'), f'{options["cache_dir"]}/{kills}'):
      sys.exit('the second attempt did not end')
else:
  rng = random.Random(how)
  while True:
    pid, goal = child(options['cache_dir']), log.stat().st_size + rng.choice([1, 10, 20])
    while log.stat().st_size < goal and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
      time.sleep(0.0002)
    time.sleep(rng.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    if ended(pid, options['cache_dir']):
      break
    kills += 1
print('kills', kills)
'''


def killed_stores(options, how, log, chunk):
  """The number of kills until the process finished."""
  options = {**options, 'filters': options['filters'].deduplicate}
  done = subprocess.run([sys.executable, '-c', KILLS, json.dumps(options), how, log, str(chunk)], text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return int(done.stdout.split()[-1])


def kill_options(tmp_path, kind, size):
  """Writes a corpus of about `size` characters with duplicates, long texts, pairs or labels; returns its config."""
  rng = random.Random(0)
  texts = [' '.join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(size // 120)]
  records = [{'text': text} for text in texts]
  options = {'split': 'document', 'max_record_bytes': 8_000_000}
  if kind == 'duplicates':
    records = [records[rng.randrange(i)] if i and rng.random() < 0.3 else r for i, r in enumerate(records)]
    records[5::50] = ['broken'] * len(records[5::50])
    records += [records[0], 'broken', records[1]]  # after the last document that is kept
  elif kind == 'pairs':
    options = {'split': 'count', 'val_documents': 40, 'test_documents': 30, 'answer_field': 'a', 'label_field': 'b'}
    records = [{**r, 'a': text[::-1], 'b': text[:3]} for r, text in zip(records, texts, strict=True)]
  elif kind == 'labels':
    options = {'split': 'tail', 'label_field': 'b', 'test_fraction': 0.1}
    records = [{**r, 'b': i % 7} for i, r in enumerate(records)]
  if kind == 'pieces':
    options = {'split': 'tail', 'max_record_bytes': 300, 'test_fraction': 0.1}
    (tmp_path / 'corpus').mkdir()
    for i in range(5):
      (tmp_path / f'corpus/{i}.txt').write_text('\n'.join(texts[i::5]))
  else:
    options['field'] = 'text'
    jsonl(tmp_path / 'corpus/x.jsonl', records)
  return {**options, 'path': str(tmp_path / 'corpus'), 'tokenizer': 'byte', 'val_fraction': 0.3,
          'shard_tokens': size // 10, 'on_bad_record': 'skip', 'max_bad_fraction': 0.1,
          'filters': FilterConfig(deduplicate=kind in ('duplicates', 'pairs'))}


@pytest.mark.parametrize('kind', [  # pairs are deduplicated too
    pytest.param('duplicates', marks=pytest.mark.slow), 'pieces', 'pairs', 'labels'])
def test_a_writer_killed_repeatedly_resumes_to_the_same_bytes(tmp_path, kind):
  options = kill_options(tmp_path, kind, 100_000)
  open_data(DataConfig(**options, cache_dir=str(tmp_path / 'undisturbed')))
  kills = killed_stores({**options, 'cache_dir': str(tmp_path / 'cache')}, 'random', tmp_path / 'log', 4000)
  assert files_of(only_store(tmp_path / 'cache')) == files_of(only_store(tmp_path / 'undisturbed'))
  counts = manifest_of(tmp_path / 'cache')['splits']
  chunks = [int(line) for line in (tmp_path / 'log').read_text().split()]
  total = sum(len(text) for text in sides_of(DataConfig(**options, cache_dir=str(tmp_path / 'cache')),
                                             [side for side in counts if counts[side]['documents']]) for text in text)
  assert kills >= 3
  # Each kill costs one chunk at most; starting again from the beginning would tokenize everything several times.
  assert total <= sum(chunks) <= total + kills * max(chunks)
  assert sum(counts[side]['tokens'] > options['shard_tokens'] for side in counts) >= 1


@pytest.mark.slow
def test_a_kill_at_any_file_operation_gives_the_same_bytes(tmp_path):
  options = kill_options(tmp_path, 'duplicates', 3500)
  open_data(DataConfig(**options, cache_dir=str(tmp_path / 'undisturbed')))
  expected = files_of(only_store(tmp_path / 'undisturbed'))
  kills = killed_stores({**options, 'cache_dir': str(tmp_path / 'cache')}, 'each', tmp_path / 'log', 1700)
  assert kills > 30
  for kill in range(1, kills + 1):
    found = files_of(only_store(tmp_path / f'cache/{kill}'))
    # A kill after the rename leaves the files that would have been removed next.
    assert set(found) - set(expected) <= {
        'progress.json', 'documents.seen', 'train.keys', 'val.keys', 'test.keys'}
    assert {name: found[name] for name in expected} == expected, kill


OPEN = '''
import sys, time
from pathlib import Path
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
print('ready', flush=True)
while not Path(sys.argv[2]).exists():
  time.sleep(0.001)
data = open_data(DataConfig(path=sys.argv[1], tokenizer='bpe', vocab_size=300, val_fraction=0.3, cache_dir=sys.argv[3]))
print('sha256', data.train['data'].sha256, data.val['data'].sha256)
'''


def test_two_processes_at_once_make_one_store(tmp_path, capfd):
  write_corpus(tmp_path / 'corpus', 8, words_per_file=5000)
  open_data(config_of(tmp_path, tokenizer='bpe', cache_dir=str(tmp_path / 'undisturbed')))
  capfd.readouterr()
  # The other process has an ASCII locale: the files of a store do not depend on it.
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
  other = subprocess.Popen([sys.executable, '-c', OPEN, tmp_path / 'corpus', tmp_path / 'go', tmp_path / 'cache'],
                           text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  assert other.stdout.readline() == 'ready\n'
  (tmp_path / 'go').touch()
  while not list(tmp_path.glob('cache/*/*.lock')) and other.poll() is None:
    time.sleep(0.001)
  data = open_data(config_of(tmp_path, tokenizer='bpe'))
  output = other.communicate(timeout=120)[0]
  assert other.returncode == 0, output
  assert output.splitlines()[-1] == f"sha256 {data.train['data'].sha256} {data.val['data'].sha256}"
  both = output + capfd.readouterr().out
  assert both.count('kept in') == both.count('bpe tokenizer') == 1  # one made it, the other waited
  assert files_of(only_store(tmp_path / 'cache')) == files_of(only_store(tmp_path / 'undisturbed'))


PEAK = '''
import sys
from pathlib import Path
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources import corpus
from llm_jax.data.stores import writer
corpus.FIT_BYTES, writer.CHUNK = 500_000, 1 << 18
open_data(DataConfig(path=sys.argv[1], tokenizer=sys.argv[2], vocab_size=300, cache_dir=sys.argv[3]))
print(next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')))
'''


def peak_mb(tmp_path, megabytes, tokenizer):
  """Peak memory, in MB, of a process that makes a store of `megabytes` of text."""
  path = tmp_path / f'{megabytes}.jsonl'
  with open(path, 'w') as f:
    for i in range(megabytes * 500):
      f.write(json.dumps({'text': f'{i % 1000} words of the line, a few more: {i % 977}. ' * 50}) + '\n')
  done = subprocess.run([sys.executable, '-c', PEAK, path, tokenizer, tmp_path / f'cache{megabytes}'], text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stderr
  return int(done.stdout.split()[-2]) / 1024  # getrusage would include this process's memory at the fork


@pytest.mark.parametrize(('tokenizer', 'megabytes'), [
    pytest.param('byte', 2, marks=pytest.mark.slow), ('bpe', 2)])
def test_ten_times_the_text_takes_the_same_memory(tmp_path, tokenizer, megabytes):
  small, large = (peak_mb(tmp_path, size, tokenizer) for size in (megabytes, 10 * megabytes))
  print(f'peak MB: {small:.0f} for {megabytes} MB of text, {large:.0f} for {10 * megabytes} MB')
  assert large < small + 5 * megabytes, (small, large)  # the additional text alone is 9 * megabytes
