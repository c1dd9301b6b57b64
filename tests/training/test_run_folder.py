"""A run's folder: config.json and status.json change only with a trained step; launches.jsonl has all launches."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from program import environment, finish, start, write_config

from llm_jax import main
from llm_jax.base.errors import ConfigError, DataError, StorageError, UserError
from llm_jax.base.files import saved_steps
from llm_jax.extras.commands import check, runs
from llm_jax.training.launches import read_launches
from llm_jax.training.run import amount_of
from llm_jax.training.status import read_status

FLAGS = ['--config.eval.sample_tokens=0', '--config.model.num_layers=1']


def train(folder, name, *flags):
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder / name}', '--config.num_steps=2', *FLAGS, *flags])


def state_files(workdir):
  return {name: (workdir / name).read_bytes() for name in ('config.json', 'status.json', 'tokenizer.json')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('folder')
  write_config(folder)
  train(folder, 'run')
  return folder


@pytest.mark.parametrize('flag', ['--config.seed=7', '--config.data.path=nowhere', '--config.model.embed_dim=16',
                                  '--config.eval.prompts=' + 'x ' * 99, '--config.num_steps=1'])
def test_a_launch_that_trains_no_step_changes_neither_config_nor_status(folder, flag):
  before, number = state_files(folder / 'run'), len(read_launches(folder / 'run'))
  refused = 'num_steps' not in flag
  samples = ['--config.eval.sample_tokens=8'] if 'prompts' in flag else []
  try:
    train(folder, 'run', flag, *samples)
    assert not refused
  except UserError as e:
    assert refused and str(e) in read_launches(folder / 'run')[-1]['error']
  assert state_files(folder / 'run') == before
  last = read_launches(folder / 'run')[number:]
  assert [launch['ended'] for launch in last] == ['failed' if refused else 'finished'] and 'begin' not in last[0]


def test_a_launch_that_is_refused_leaves_no_folder_of_its_own_and_says_nothing_of_on_cpu(folder, capsys):
  (folder / 'small.py').write_text((folder / 'tiny.py').read_text() + 'def on_cpu(config):\n  config.seed = 7\n')
  flags = [f'--config={folder}/small.py', f'--workdir={folder / "refused"}', '--config.num_steps=2', *FLAGS]
  with pytest.raises(DataError):
    main.main([*flags, '--config.data.path=nowhere'])
  assert not (folder / 'refused').exists() and 'on_cpu' not in capsys.readouterr().out
  main.main(flags)
  [line] = [line for line in capsys.readouterr().out.splitlines() if 'on_cpu' in line]
  assert line == (f'no accelerator: on_cpu of {folder}/small.py changes 1 field(s) (--full_size: do not); list them: '
                  f'llm-jax config --config={folder}/small.py')
  check.main([f'--config={folder}/small.py'])
  assert f'on_cpu       {line}' in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(('number', 'resumed'), [(signal.SIGHUP, False), (signal.SIGINT, True)])
def test_a_signal_before_the_first_step_ends_a_launch_at_once(number, resumed, folder):
  workdir, flags = folder / 'interrupted', [*FLAGS, f'--config.num_steps={9 if resumed else 2}']
  if resumed:
    shutil.copytree(folder / 'run', workdir, dirs_exist_ok=True)
    before = state_files(workdir)
  process = start(folder, 'main', f'--config={folder}/tiny.py', f'--workdir={workdir}', *flags)
  while (line := process.stdout.readline()) and 'compiling the training step' not in line:
    pass
  process.send_signal(number)
  printed = finish(process, code=75)
  assert 'first step after' not in printed
  if resumed:
    assert printed == f'interrupted before the first step; {workdir} stays at step 2, and the same command resumes it\n'
    assert state_files(workdir) == before and read_launches(workdir)[-1]['ended'] == 'stopped'
  else:
    assert printed == 'interrupted before the first step; nothing was trained\n' and not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_program_starts_leaves_nothing(number, folder):
  process = start(folder, 'main', f'--config={folder}/tiny.py', f'--workdir={folder}/early', *FLAGS)
  time.sleep(1.5)  # it imports JAX
  process.send_signal(number)
  assert finish(process, code=75) == 'interrupted before the first step; nothing was trained\n'
  assert not (folder / 'early').exists()


@pytest.mark.slow
def test_nohup_ignores_the_loss_of_the_terminal(folder):
  command = ['nohup', sys.executable, '-m', 'llm_jax.main', f'--config={folder}/tiny.py', f'--workdir={folder}/nohup',
             '--config.num_steps=2', *FLAGS]
  process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT)
  for line in process.stdout:
    if 'compiling' in line:
      process.send_signal(signal.SIGHUP)
      break
  finish(process)
  assert read_status(folder / 'nohup')['state'] == 'finished'


def killed_launches(workdir, number):
  """Adds launches that were killed without a new checkpoint to the history of a run."""
  line = read_launches(workdir)[-1] | {'committed': 2, 'process': 0}
  line.pop('ended', None)
  with open(workdir / 'launches.jsonl', 'a') as f:
    f.write(number * (json.dumps(line) + '\n'))


def test_after_starts_without_progress_the_first_step_is_saved_then_the_run_gives_up(folder, capsys):
  workdir = folder / 'fruitless'
  shutil.copytree(folder / 'run', workdir)
  killed_launches(workdir, 2)
  train(folder, 'fruitless')
  assert 'WARNING' not in capsys.readouterr().out
  killed_launches(workdir, 3)
  train(folder, 'fruitless', '--config.num_steps=5', '--config.checkpoint.keep_last=9', '--config.eval.every=0')
  assert 'the last 3 launches in' in capsys.readouterr().out
  assert {3, 5} <= set(saved_steps(workdir / 'checkpoints')), 'the first step, and the last one'
  shutil.rmtree(workdir)
  shutil.copytree(folder / 'run', workdir)
  killed_launches(workdir, 6)
  with pytest.raises(StorageError, match='the last 6 launches in'):
    train(folder, 'fruitless', '--config.num_steps=3')
  train(folder, 'fruitless', '--config.num_steps=3')  # a repetition tries again
  assert read_status(workdir)['step'] == 3


def test_a_launch_that_fails_in_a_folder_of_the_user_is_listed_as_failed(folder, capsys):
  (folder / 'new').mkdir()
  with pytest.raises(DataError):
    train(folder, 'new', '--config.data.path=nowhere')
  assert read_status(folder / 'new')['state'] == 'failed' and 'nowhere' in read_status(folder / 'new')['error']
  capsys.readouterr()
  runs.main([str(folder / 'new')])
  printed = capsys.readouterr().out
  assert 'new  failed  0/2' in printed and 'no step was trained' in printed and 'DataError' in printed


def test_launches_are_listed_with_what_changed(folder, capsys):
  shutil.copytree(folder / 'run', folder / 'longer')
  train(folder, 'longer', '--config.num_steps=3')
  first, *_, second = read_launches(folder / 'longer')
  assert (first['begin'], first['changed'], first['ended'], first['step']) == (0, {}, 'finished', 2)
  assert (second['begin'], second['changed'], second['step']) == (2, {'num_steps': [2, 3]}, 3)
  assert second['process'] == os.getpid() and second['num_processes'] == 1 and 'cpu' in second['devices']
  capsys.readouterr()
  runs.main([str(folder / 'longer')])
  printed = capsys.readouterr().out
  assert 'launch 1: ' in printed and 'changed  config.num_steps: 2 -> 3' in printed and 'finished at step 3' in printed
  assert json.loads((folder / 'longer' / 'config.json').read_text())['num_steps'] == 3


def test_damaged_lines_of_the_history_are_kept_and_not_shown(folder, capsys):
  shutil.copytree(folder / 'run', folder / 'damaged')
  path, number = folder / 'damaged' / 'launches.jsonl', len(read_launches(folder / 'run'))
  damaged = path.read_bytes() + b'\xff\n{"time": 1}\n[1]\n'
  path.write_bytes(damaged)
  train(folder, 'damaged', '--config.num_steps=3')
  assert path.read_bytes().startswith(damaged) and len(read_launches(folder / 'damaged')) == number + 1
  capsys.readouterr()
  runs.main([str(folder / 'damaged')])
  assert f'launch {number + 1}: ' in capsys.readouterr().out


def test_a_run_killed_after_its_last_checkpoint_becomes_finished(folder):
  shutil.copytree(folder / 'run', folder / 'killed')
  path = folder / 'killed' / 'status.json'
  path.write_text(json.dumps(read_status(folder / 'killed') | {'state': 'training', 'step': 1}))
  train(folder, 'killed')
  assert (read_status(folder / 'killed')['state'], read_status(folder / 'killed')['step']) == ('finished', 2)


def test_other_data_in_a_runs_folder_names_both_paths_and_a_free_folder(folder, capsys):
  other = folder / 'other.txt'
  other.write_text('\n'.join(f'other words {i * i % 89}' for i in range(400)))
  with pytest.raises(ConfigError) as e:
    train(folder, 'run', f'--config.data.path={other}', '--config.model.vocab_size=none')
  message = str(e.value)
  assert f'config.data.path: checkpoint {folder}/corpus, now {other}' in message and 'vocab_size' not in message
  flag = re.search(r'set (--workdir=\S+);', message)[1]
  assert flag == f'--workdir={folder}/run_2'
  train(folder, 'unused', f'--config.data.path={other}', flag)
  assert read_status(folder / 'run_2')['state'] == 'finished'


def test_changed_files_are_named_without_hashes(folder):
  path = folder / 'notes.txt'
  path.write_text('\n'.join(f'some words {i * i % 89}' for i in range(400)))
  train(folder, 'notes', f'--config.data.path={path}')
  path.write_text('\n'.join(f'more words {i * i % 83}' for i in range(400)))
  with pytest.raises(ConfigError, match=r'the training data \(config.data.path .*\) has changed since') as e:
    train(folder, 'notes', f'--config.data.path={path}')
  assert not re.search('[0-9a-f]{12}', str(e.value).replace(str(folder), ''))


def dead_process():
  process = subprocess.Popen([sys.executable, '-c', ''])
  process.wait()
  return process.pid


@pytest.mark.parametrize(('state', 'host', 'process', 'shown'), [
    ('training', None, os.getpid, 'training'), ('training', None, dead_process, 'died'),
    ('stopped', None, os.getpid, 'starting'), ('stopped', None, dead_process, 'stopped'),
    ('training', 'elsewhere', os.getpid, 'no news')])
def test_the_state_of_a_launch_without_an_end_is_that_of_its_process(state, host, process, shown, folder, tmp_path,
                                                                    capsys):
  [launch, *_] = read_launches(folder / 'run')
  launch = {key: value for key, value in launch.items() if key != 'ended'}
  launch |= {'process': process(), 'host': host or socket.gethostname(), 'time': '2100-01-01T00:00:00+00:00'}
  (tmp_path / 'launches.jsonl').write_text(json.dumps(launch) + '\n')
  (tmp_path / 'status.json').write_text(json.dumps(read_status(folder / 'run') | {'state': state, 'updated': 0}))
  runs.main([str(tmp_path), '--format=json'])
  [run] = json.loads(capsys.readouterr().out)
  assert run['state'] == shown


def test_a_later_process_with_the_same_id_is_another_one(folder, tmp_path, capsys):
  launch = read_launches(folder / 'run')[0] | {'time': '2000-01-01T00:00:00+00:00'}
  (tmp_path / 'launches.jsonl').write_text(json.dumps({k: v for k, v in launch.items() if k != 'ended'}) + '\n{"damag')
  (tmp_path / 'status.json').write_text(json.dumps(read_status(folder / 'run') | {'state': 'training'}))
  runs.main([str(tmp_path)])
  assert ' died ' in capsys.readouterr().out


def test_a_run_that_is_locked_keeps_its_files(folder):
  before, number = state_files(folder / 'run'), len(read_launches(folder / 'run'))
  holder = subprocess.Popen(
      [sys.executable, '-c', 'import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, '
       'flush=True); sys.stdin.read()', str(folder / 'run' / '.lock')], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  holder.stdout.readline()
  try:
    with pytest.raises(UserError, match='another run is training'):
      train(folder, 'run', '--config.num_steps=5')
  finally:
    holder.communicate()
  assert state_files(folder / 'run') == before and len(read_launches(folder / 'run')) == number


def test_small_numbers_are_written_out():
  assert [amount_of(n) for n in (201, 48_212, 1_000_000, 124_373_760)] == ['201', '48,212', '1.00 M', '124.37 M']


def make_run(folder, config, ago=300):
  """A run's folder, as far as `llm-jax runs` reads it."""
  folder.mkdir()
  status = {'state': 'finished', 'step': 1000, 'num_steps': 2000, 'started': 0, 'best': 2.3456,
            'updated': time.time() - ago, 'monitor': 'val/loss', 'metrics': {'train/tokens_per_second': 12345.6}}
  (folder / 'status.json').write_text(json.dumps(status))
  (folder / 'config.json').write_text(json.dumps(config))


def test_runs_prints_whole_rows_into_a_pipe(tmp_path, capsys):
  for name in ('a', 'b'):
    make_run(tmp_path / name, {f'field{i}': f'{name}{i}' * 5 for i in range(12)} | {'same': 1, f'only_{name}': 1})
  runs.main([str(tmp_path)])
  printed = capsys.readouterr().out
  for row, name in zip(printed.splitlines()[1:], 'ba', strict=True):
    assert row.startswith(f'{name}    finished  1000/2000  2.3456') and 'same' not in row and 'only' not in row
    assert all(f'field{i}={name}{i}' in row for i in range(12))
  with pytest.raises(ConfigError, match='there are no runs'):
    runs.main([str(tmp_path / 'nowhere')])


def test_runs_lists_the_newest_first_and_names_fields_and_paths_shortly(tmp_path, capsys):
  for i, name in enumerate(('b', 'c', 'a')):
    make_run(tmp_path / name, {
        'optim': {'adamw': {'decay': i, 'rate': i}, 'lion': {'decay': i}}, 'model': {'vocab_size': i},
        'data': {'path': f'/some/where/notes{i}.txt', 'sha256': f'{i}' * 64}}, ago=300 - i)
  runs.main([str(tmp_path)])
  header, *rows = capsys.readouterr().out.splitlines()
  assert header.split() == ['run', 'state', 'step', 'val/loss', 'tokens/s', 'updated', 'differs', 'in']
  assert [row.split()[0] for row in rows] == ['a', 'c', 'b']
  assert rows[0].endswith('  adamw.decay=2 rate=2 lion.decay=2 path=notes2.txt')
  runs.main([str(tmp_path), '--format=json'])
  assert json.loads(capsys.readouterr().out)[0]['differs']['data.path'] == '/some/where/notes2.txt'


@pytest.mark.parametrize('width', [60, 80, 100, 120])
def test_runs_fits_the_terminal(width, tmp_path, monkeypatch, capsys):
  for i in range(3):
    make_run(tmp_path / f'a_long_name_of_a_run_{i}', {f'field{j}': i * j for j in range(8)})
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', str(width))
  runs.main([str(tmp_path)])
  header, *rows = capsys.readouterr().out.splitlines()
  assert max(map(len, rows)) <= width and len([row for row in rows if ' finished ' in row]) == 3
  shown = {name for name in ('differs in', 'tokens/s', 'updated') if name in header}
  assert shown == {60: set(), 80: {'tokens/s', 'updated'}}.get(width, {'differs in', 'tokens/s', 'updated'})
  text = re.sub(r'\s', '', ''.join(rows))
  assert ('field7=14' in text) == ('differs in' in header) != ('runs|cathasall' in text)


def test_one_run_fits_the_terminal(tmp_path, monkeypatch, capsys):
  make_run(tmp_path / 'alone', {'field': 1})
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  monkeypatch.setenv('COLUMNS', '80')
  runs.main([str(tmp_path)])
  assert 'alone  finished  1000/2000' in capsys.readouterr().out


def test_runs_with_damaged_or_missing_files_do_not_hide_the_others(folder, tmp_path, capsys):
  shutil.copytree(folder / 'run', tmp_path / 'run')
  with open(tmp_path / 'run' / 'metrics.jsonl', 'a') as f:
    f.write('[1]\n')
  for name, status in (('failed', '"step": 0'), ('damaged', '"step": 1, "best": "x"')):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'status.json').write_text(f'{{"state": "failed", {status}, "num_steps": 2, "started": 0}}')
  runs.main([str(tmp_path), f'--plot={tmp_path}/runs.png'])
  printed = capsys.readouterr().out
  assert re.search(r'^damaged +unreadable', printed, re.M) and re.search(r'^failed +failed +0/2', printed, re.M)
  assert re.search(r'^run +finished +2/2', printed, re.M) and (tmp_path / 'runs.png').stat().st_size > 1000
