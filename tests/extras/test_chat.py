"""llm-jax chat, as a real process with lines on its stdin; and llm-jax runs, on real and damaged folders."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from program import environment, write_config

import llm_jax
from llm_jax import main
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.progress import LINE
from llm_jax.commands import generate
from llm_jax.data.tokenizers.tokenizer import before_eos, decode
from llm_jax.extras.commands import chat, runs
from llm_jax.infer import sampling


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat')
  write_config(folder)
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/runs/seed0', '--config.num_steps=3',
             '--config.eval.sample_tokens=0', '--config.eval.max_tokens=512'])
  shutil.copytree(folder / 'runs' / 'seed0', folder / 'runs' / 'seed1')
  for name, settings in (('config', {'seed': 1}), ('status', {'updated': time.time()})):  # a later run of another seed
    path = folder / 'runs' / 'seed1' / f'{name}.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
  return folder


def test_chat_continues_each_line_and_obeys_commands(folder):
  lines = ['def ', '/temperature 0', 'def ', '/top_q 3', '/top_p 2', '/num_tokens 1.5', 'def ' * 40, '/options', 'def ',
           '/options', '/more', '/options', '/more xy', '/options', '/help', '/quit', 'def never']
  done = subprocess.run([sys.executable, '-m', 'llm_jax', 'chat', '--workdir=runs/seed0', '--num_tokens=4'],
                        cwd=folder, env=environment(folder), input='\n'.join(lines), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'runs/seed0, step 3; /help, /quit' in done.stderr and 'never' not in done.stdout
  assert 'temperature=0.0  top_k=0' in done.stdout
  # Each command but /more and /help prints the options.
  _, first, wrong, number, long, first_again, more, last, commands = re.split(
      r'^temperature=.*\n', done.stdout, flags=re.MULTILINE)
  first, _, unknown = first.rpartition('/top_q is unknown; ')
  assert unknown.startswith('known: /temperature, /top_k')
  assert wrong == '/top_p must be in (0, 1]; got 2.0\n' and 'top_p=1.0' in done.stdout and 'top_p=2' not in done.stdout
  assert number == "/num_tokens needs a whole number; got '1.5'\n"
  assert first == first_again and first.startswith('def ')  # temperature 0: the same text
  assert long.startswith('def ' * 40) and len(long) > 161
  assert re.search(r'^the prompt has \d+ tokens, but the context 32: only the last 28 are read$', done.stderr, re.M)
  assert 'compiling' not in done.stderr + done.stdout  # it is shown in a terminal
  assert more.startswith(first[:-1]) and last.startswith(more[:-1] + 'xy')
  assert all(f'  /{name} ' in commands for name in ('temperature', 'more', 'options', 'help', 'quit'))


@pytest.mark.parametrize('command', [chat, generate])
def test_what_is_wrong_is_reported_before_the_weights_are_read(command, folder, tmp_path):
  """The weights of this copy of a run cannot be read."""
  broken = tmp_path / 'broken'
  shutil.copytree(folder / 'runs' / 'seed0', broken)
  for path in broken.glob('checkpoints/*/params'):
    shutil.rmtree(path)
  with pytest.raises(StorageError, match='no checkpoint is intact'):
    command.main([str(broken)])
  for flags, words in ((['--top_p=2', '--seed=-1'], '^--seed must be in .*\n--top_p must be in .*'),
                       (['--checkpoint=7'], r'^--checkpoint: must be latest, best, or a step of \[3\]; got')):
    with pytest.raises(ConfigError, match=words):
      command.main([str(broken), *flags])
  if command is generate:
    config = json.loads((broken / 'config.json').read_text())
    config['data'] |= {'task': 'prompt_answer', 'packing': 'pad', 'answer_field': 'answer'}
    (broken / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ConfigError, match='shorten it to at most 31, as the model answers only whole prompts'):
      command.main([str(broken), '--prompt=' + 'x ' * 99])


def test_a_prompt_longer_than_the_context_is_continued_from_its_end(folder, capsys):
  trained = llm_jax.load(folder / 'runs' / 'seed0')
  prompt, tokenizer = 'def main(self):\n  return 1\n' * 9, trained.run.tokenizer
  [ids] = tokenizer.encode([prompt])
  capsys.readouterr()
  for num_tokens, kept in ((4, 28), (12, 20), (1, 31), (99, 16)):
    text = trained.generate(prompt, num_tokens=num_tokens, temperature=0)
    assert capsys.readouterr().err == (
        f'the prompt has {len(ids) + 1} tokens, but the context 32: only the last {kept} are read\n')
    columns = sampling.generate(trained.run.model, trained.run.params, [list(map(int, ids[-kept:]))], max_len=32,
                                num_tokens=num_tokens, temperature=0, num_ids=len(tokenizer.token_bytes))
    assert text == decode(tokenizer, before_eos(tokenizer, [int(column[0]) for column in columns]))


def test_the_live_line_shows_compiling_until_the_first_token():
  columns = generate.begun(lambda: ([task.name for task in LINE._tasks] for _ in range(2)))
  assert list(columns) == [['compiling'], []]


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
