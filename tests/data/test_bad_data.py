"""Bad data quickly gives one message with place and reason, and exit code 65; or it is skipped and counted.

Most cases call `main` in this process; some run as processes of their own.
"""

import gzip
import hashlib
import http.server
import importlib
import json
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from bad_data import BAD, BAD_RECORDS, WHOLE
from bad_files import MARKER, PROSE, TEXTS, cut, raw
from program import environment

from llm_jax.__main__ import COMMANDS
from llm_jax.base.errors import DataError
from llm_jax.base.process import run_as_program
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
from llm_jax.data.sources.documents import BadRecord, SourceConfig
from llm_jax.data.sources.files import open_source
from llm_jax.data.tokenizers.tokenizer import decode

SECONDS = 5
PROGRESS = ('tokenizing', 'fetching', 'reading data ...')  # on stderr
AS_PROCESSES = (
    'empty file', 'invalid UTF-8', 'malformed line 7', 'truncated gz', 'zst bomb', 'truncated parquet',
    'truncated HDF5', 'npy of objects', 'damaged arrayrecord', 'id beyond the vocabulary', 'query that writes',
    'zip path traversal', 'pickle', 'damaged SentencePiece model', 'answers missing')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LLM_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def arguments(path, flags, folder):
  flags = [flag.replace('{folder}', str(folder)) for flag in flags]
  tokenizer = [] if any(flag.startswith('--tokenizer') for flag in flags) else ['--tokenizer=byte']
  return [f'--path={path}', *tokenizer, *flags]


@pytest.fixture
def program(capfd, monkeypatch):
  """A function (command, argv) -> (exit code, stdout, stderr, seconds) that runs the program in this process."""
  def run(command, argv):
    monkeypatch.setattr(sys, 'argv', [command, *argv])
    capfd.readouterr()
    handler, begin, code = signal.getsignal(signal.SIGINT), time.perf_counter(), 0
    try:
      run_as_program(importlib.import_module(f'llm_jax.{COMMANDS[f"data {command}"][0]}').main)
    except SystemExit as e:
      code = e.code
    finally:
      signal.signal(signal.SIGINT, handler)
    return code, *capfd.readouterr(), time.perf_counter() - begin
  return run


def check_message(code, err, wanted_code, words):
  """Asserts the exit code and one message, on one line, with all words in it."""
  lines = [line for line in err.splitlines() if not line.startswith(PROGRESS)]
  assert code == wanted_code, err
  assert 'Traceback' not in err
  assert len(lines) == 1 and lines[0].startswith('error: '), err
  assert [word for word in words if word not in lines[0]] == [], lines[0]
  return lines[0]


def where(bad, path):
  """The file name that the message must contain; none if the fault is in flags or in a tokenizer's file."""
  return () if bad.code == 78 or bad.flags else (path.name,)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_rejected_with_one_message(name, tmp_path, program):
  bad = BAD[name]
  path = bad.make(tmp_path)
  before = sorted(tmp_path.rglob('*'))
  messages = []
  for _ in range(2):  # the first run must leave nothing that the second would use
    code, _, err, seconds = program(bad.command, arguments(path, bad.flags, tmp_path))
    messages.append(check_message(code, err, bad.code, (*bad.words, *where(bad, path))))
    assert seconds < SECONDS
  assert messages[0] == messages[1]
  after = [p for p in sorted(tmp_path.rglob('*')) if tmp_path / 'cache' not in (p, *p.parents)]
  assert after == before, 'a file was written beside the data'
  assert not (tmp_path / MARKER).exists(), 'code was run'


@pytest.mark.parametrize('name', AS_PROCESSES)
def test_bad_input_is_rejected_by_the_program(name, tmp_path):
  bad = BAD[name]
  argv = arguments(bad.make(tmp_path), bad.flags, tmp_path)
  begin = time.perf_counter()
  result = subprocess.run([sys.executable, '-m', 'llm_jax', 'data', bad.command, *argv], cwd=tmp_path, timeout=60,
                          env=environment(tmp_path), capture_output=True, text=True)
  seconds = time.perf_counter() - begin
  check_message(result.returncode, result.stderr, bad.code, bad.words)
  assert seconds < SECONDS
  assert not (tmp_path / MARKER).exists()


def documents(config):
  """(texts of all splits, report)."""
  data = open_data(config)
  texts = []
  for store in (stores['data'] for stores in data.splits.values() if stores):
    rows = np.split(store.tokens[:], store.starts[1:])
    texts += [decode(data.tokenizer, row[1:]) for row in rows]
  return texts, data.reports['data']


@pytest.mark.parametrize('name', BAD_RECORDS)
def test_bad_records_are_skipped_and_counted(name, tmp_path, program):
  bad = BAD_RECORDS[name]
  path = bad.make(tmp_path)
  argv = ['--split=document', '--val_fraction=0.3', *bad.flags]
  code, _, err, _ = program('prepare', arguments(path, argv, tmp_path))
  check_message(code, err, 65, bad.words)

  skip = [*argv, '--on_bad_record=skip', '--max_bad_fraction=0.5']
  code, out, err, seconds = program('prepare', arguments(path, skip, tmp_path))
  assert code == 0, err
  assert f'{len(TEXTS)} kept, 0 dropped, {bad.num_bad} bad' in out
  [first] = [line for line in out.splitlines() if 'the first bad record' in line]
  assert [word for word in bad.words if word not in first] == [], first
  assert seconds < SECONDS
  assert not list(tmp_path.rglob(MARKER))

  texts, report = documents(DataConfig(
      path=str(path), tokenizer='byte', split='document', val_fraction=0.3, on_bad_record='skip', max_bad_fraction=0.5,
      field='text' if '--field=text' in bad.flags else None, separator='---' if bad.words == ('UTF-8',) else None))
  assert sorted(texts) == sorted(TEXTS)
  assert report['in'] == report['kept'] + sum(report['dropped'].values()) + report['bad'] == len(TEXTS) + bad.num_bad


@pytest.mark.parametrize('name', ['lines of jsonl', 'damaged archive in a folder', 'rows of parquet'])
def test_too_many_bad_records_are_an_error(name, tmp_path, program):
  bad = BAD_RECORDS[name]
  argv = arguments(bad.make(tmp_path), (*bad.flags, '--on_bad_record=skip', '--max_bad_fraction=0.02'), tmp_path)
  for _ in range(2):
    code, _, err, _ = program('prepare', argv)
    count = f'{bad.num_bad} of {len(TEXTS) + bad.num_bad} records'
    check_message(code, err, 65, (count, 'max_bad_fraction', *bad.words))


@pytest.mark.parametrize('name', [name for name in BAD if name.startswith(('truncated', 'damaged', 'zip ', 'gz bomb'))])
def test_a_damaged_file_is_never_used_silently(name, tmp_path, program):
  """With on_bad_record=skip, the file is reported as bad, or nothing of it is used."""
  bad = BAD[name]
  argv = arguments(bad.make(tmp_path), (*bad.flags, '--on_bad_record=skip', '--max_bad_fraction=1.0'), tmp_path)
  code, out, err, seconds = program('prepare', argv)
  assert code == 65 or (code == 0 and ', 1 bad' in out and 'the first bad record' in out), err
  assert 'Traceback' not in err and seconds < SECONDS


def test_a_truncated_stream_gives_its_complete_lines(tmp_path, program):
  rng = random.Random(0)
  texts = [rng.randbytes(400).hex() for _ in range(4000)]
  whole = ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()
  path = cut(raw('data.jsonl.gz', gzip.compress(whole)))(tmp_path)
  argv = arguments(path, ('--on_bad_record=skip', '--split=tail'), tmp_path)
  code, out, err, _ = program('prepare', argv)
  assert code == 0, err
  assert ', 1 bad' in out and f'the first bad record: {path} at byte' in out
  found, report = documents(DataConfig(path=str(path), tokenizer='byte', split='tail', on_bad_record='skip'))
  assert 1000 < report['kept'] < 3000 and report['bad'] == 1
  assert ''.join(found) == ''.join(texts[:report['kept']])


def read(path, cache):
  """(documents, messages for bad ones)."""
  good, bad = [], []
  try:
    for _, item in open_source(SourceConfig(path=str(path), field='text' if path.suffix == '.csv' else None),
                               cache).records():
      if isinstance(item, BadRecord):
        bad.append(f'{item.where}: {item.why}')
      else:
        good.append((item.name, list(item.text)))
  except DataError as e:
    bad.append(str(e))
  return good, bad


@pytest.mark.parametrize('name', WHOLE)
def test_damage_gives_one_line_messages_and_no_silent_cut(name, tmp_path):
  """A damaged file raises nothing but DataError; truncation is always detected if the format allows it."""
  make, detects_cuts = WHOLE[name]
  path = make(tmp_path)
  whole = path.read_bytes()
  good, bad = read(path, tmp_path / 'cache')
  assert good and not bad
  rng = random.Random(name)
  for i in range(12):
    path.write_bytes(whole[:rng.randrange(len(whole))])
    found, bad = read(path, tmp_path / f'cut{i}')
    assert bad or found == good or not detects_cuts, f'silently used {len(path.read_bytes())} of {len(whole)} bytes'
    assert all(str(tmp_path) in message and '\n' not in message for message in bad), bad
    other = bytearray(whole)
    for at in rng.choices(range(len(whole)), k=rng.choice([1, 4])):
      other[at] ^= rng.randrange(1, 256)
    path.write_bytes(other)
    found, bad = read(path, tmp_path / f'other{i}')
    assert all(str(tmp_path) in message and '\n' not in message for message in bad), bad


@pytest.fixture
def server():
  """Serves PROSE; /short.txt is cut, /missing.txt does not exist."""
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      body = PROSE[:100] if self.path == '/short.txt' else PROSE
      self.send_response(404 if self.path == '/missing.txt' else 200)
      self.send_header('Content-Length', str(len(PROSE)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as found:
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{found.server_port}'
    found.shutdown()


@pytest.mark.parametrize('name, flags, words', [
    ('missing.txt', [], ['missing.txt', '404']),
    ('short.txt', [], ['short.txt', f'100 of {len(PROSE)} bytes']),
    ('a.txt', ['--sha256=' + '0' * 64], ['a.txt', hashlib.sha256(PROSE).hexdigest(), '0' * 64]),
])
def test_a_bad_download_is_a_data_error(name, flags, words, server, tmp_path, program):
  for _ in range(2):
    code, _, err, seconds = program('prepare', arguments(f'{server}/{name}', flags, tmp_path))
    check_message(code, err, 65, words)
    assert seconds < SECONDS


@pytest.mark.parametrize('path, words', [
    ('http://127.0.0.1:9/a.txt', ['127.0.0.1:9/a.txt', 'refused']),
    ('hf:nobody/nothing', ['hf:nobody/nothing', 'save_to_disk']),
])
def test_an_unreachable_host_is_a_data_error(path, words, tmp_path, program, monkeypatch):
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  code, _, err, seconds = program('prepare', arguments(path, (), tmp_path))
  check_message(code, err, 65, words)
  assert seconds < SECONDS


def test_the_corpus_has_enough_cases():
  assert len(BAD) >= 60
  assert {bad.code for bad in BAD.values()} == {65, 78}
