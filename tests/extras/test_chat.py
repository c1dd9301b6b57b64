"""llm-jax chat, as a real process with lines on its stdin; and llm-jax runs, on real and damaged folders."""

import json
import re
import signal
import subprocess
import sys

import pytest
from program import environment, write_config

from llm_jax import main
from llm_jax.base.errors import ConfigError
from llm_jax.extras.commands import chat, runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat')
  write_config(folder)
  for seed in (0, 1):
    main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/runs/seed{seed}', '--config.num_steps=3',
               f'--config.seed={seed}', '--config.eval.sample_tokens=0', '--config.eval.max_tokens=512'])
  return folder


def test_chat_continues_each_line_and_obeys_commands(folder):
  lines = ['def ', '/temperature 0', 'def ', '/top_q 3', 'def ', '/num_tokens 1.5', 'def ' * 40, '/options', '/more',
           '/options', '/more xy', '/options', '/help', '/quit', 'def never']
  done = subprocess.run([sys.executable, '-m', 'llm_jax', 'chat', '--workdir=runs/seed0', '--num_tokens=4'],
                        cwd=folder, env=environment(folder), input='\n'.join(lines), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'runs/seed0, step 3; /help, /quit' in done.stderr and 'never' not in done.stdout
  assert 'temperature=0.0  top_k=0' in done.stdout
  # Each command but /more and /help prints the options.
  _, first, second, error, more, last, commands = re.split(r'^temperature=.*\n', done.stdout, flags=re.MULTILINE)
  first, _, unknown = first.rpartition('/top_q is unknown; ')
  assert unknown.startswith('known: /temperature, /top_k')
  second, _, number = second.rpartition('/num_tokens needs')
  assert number == " a whole number; got '1.5'\n"
  assert first == second and first.startswith('def ')  # temperature 0: the same text
  assert error.startswith('error: --prompt: has')  # too long for the model; the loop goes on, with the text before
  assert more.startswith(first[:-1]) and last.startswith(more[:-1] + 'xy')
  assert all(f'  /{name} ' in commands for name in ('temperature', 'more', 'options', 'help', 'quit'))


def test_ctrl_c_ends_chat_while_the_run_is_loaded(folder):
  previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    with pytest.raises(ConfigError, match='--checkpoint'):
      chat.main([f'--workdir={folder}/runs/seed0', '--checkpoint=none'])
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
  finally:
    signal.signal(signal.SIGINT, previous)


def test_runs_lists_state_and_what_differs(folder, capsys):
  runs.main([str(folder / 'runs')])
  header, *lines = capsys.readouterr().out.splitlines()
  assert header.split()[:4] == ['run', 'state', 'step', 'val/loss'] and len(lines) == 2
  for seed, line in zip((1, 0), lines, strict=True):  # the newest first
    assert line.startswith(f'seed{seed}  finished  3/3') and line.endswith(f'seed={seed}')
  runs.main([str(folder / 'runs'), '--format=json'])
  found = json.loads(capsys.readouterr().out)
  assert [run['differs'] for run in found] == [{'seed': 1}, {'seed': 0}] and found[0]['best'] > 0


def test_runs_reports_damaged_and_silent_runs(folder, tmp_path, capsys):
  for name, change in (('damaged', {}), ('silent', {'state': 'training', 'updated': 0})):
    (tmp_path / name).mkdir()
    for file in ('config.json', 'status.json'):
      (tmp_path / name / file).write_text((folder / 'runs' / 'seed0' / file).read_text())
    status = tmp_path / name / 'status.json'
    status.write_text(json.dumps(json.loads(status.read_text()) | change) if change else '[]')
  runs.main([str(tmp_path)])
  _, silent, damaged = capsys.readouterr().out.splitlines()
  assert damaged.split() == ['damaged', 'unreadable'] and 'no news' in silent
  with pytest.raises(ConfigError, match='there are no runs'):
    runs.main([str(tmp_path / 'nowhere')])


def test_runs_plots(folder, tmp_path, capsys):
  runs.main([str(folder / 'runs'), f'--plot={tmp_path}/loss.png'])
  assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')
