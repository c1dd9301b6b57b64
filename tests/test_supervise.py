"""launch/supervise.py with commands of the shell: what each exit code leads to."""

import json
import signal
import subprocess
import sys
import time

import pytest
from program import ROOT

# Exits with the first of the codes in the file `codes`, and removes it; 'step' makes a checkpoint too.
COMMAND = '''
import os, signal, sys, time
from pathlib import Path
first, *rest = Path('codes').read_text().split()
Path('codes').write_text(' '.join(rest))
code, _, step = first.partition(':')
if step:
  Path(f'run/checkpoints/{step}').mkdir(parents=True)
  Path(f'run/checkpoints/{step}/manifest.json').touch()
if code == 'kill':
  os.kill(os.getpid(), signal.SIGKILL)
if code == 'wait':
  signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
  Path('waiting').touch()
  time.sleep(60)
sys.exit(int(code))
'''


def supervise(folder, codes, *flags):
  (folder / 'codes').write_text(codes)
  return subprocess.Popen([sys.executable, ROOT / 'launch' / 'supervise.py', '--pause=0.1', '--log=log.jsonl', *flags,
                           '--', sys.executable, '-c', COMMAND], cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(('codes', 'code', 'starts'), [
    ('0', 0, 1), ('75 76 0', 0, 3), ('74 74 0', 0, 3), ('kill 1 0', 0, 3), ('65 0', 65, 1), ('70 0', 70, 1),
    ('75 78 0', 78, 2), ('1 1 1 1 0', 1, 3)])
def test_the_exit_code_decides_whether_it_starts_again(codes, code, starts, tmp_path):
  process = supervise(tmp_path, codes, '--tries=3')
  printed = process.communicate(timeout=60)[1]
  lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
  assert process.returncode == code and len(lines) == starts, printed
  assert [line['code'] for line in lines] == [-9 if c == 'kill' else int(c) for c in codes.split()][:starts]
  if 'kill' in codes:
    assert lines[0]['cause'] == 'signal SIGKILL'


def test_starts_without_a_new_checkpoint_end_it(tmp_path):
  process = supervise(tmp_path, '75:1 76:2 75 75 75 0', '--tries=3', '--workdir=run')
  assert process.communicate(timeout=60) and process.returncode == 75
  lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
  assert [line['without_progress'] for line in lines] == [0, 0, 1, 2, 3] and lines[-1]['then'] == 'end'


def test_a_signal_is_forwarded_and_ends_it(tmp_path):
  process = supervise(tmp_path, 'wait 0')
  while not (tmp_path / 'waiting').exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75 and (tmp_path / 'codes').read_text() == '0'
