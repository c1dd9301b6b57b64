"""First experiments: few steps, no validation, data of one's own for a preset, and a run that goes on for longer."""

import re
import subprocess

import pytest
from program import environment, finish, start, write_config

from llm_jax import main
from llm_jax.config_file import open_config
from llm_jax.training.ending import ending
from llm_jax.training.log import read_metrics
from llm_jax.training.run import too_little_data


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('short')
  write_config(folder)
  return folder


WARMS_UP = ('--config.optim.schedule=warmup_cosine', '--config.optim.warmup_cosine.warmup_steps=5')


def train(folder, name, *flags, schedule=WARMS_UP):
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder / name}', '--config.eval.sample_tokens=0', *schedule,
             *flags])
  return {line['step']: line for line in read_metrics(folder / name / 'metrics.jsonl')}


@pytest.mark.slow
def test_a_run_of_few_steps_says_what_it_shortens(folder, capsys):
  lines = train(folder, 'few', '--config.num_steps=4')
  printed = capsys.readouterr().out
  assert 'optim.warmup_cosine.warmup_steps: 5 is shortened to 2, as the run has 4 steps' in printed
  assert lines[1]['train/learning_rate'] == pytest.approx(3e-3 / 2) and 'val/loss' in lines[4]


def test_too_little_data_is_said_with_how_often_it_is_seen():
  config = open_config('gpt_small').resolve({}, cpu_only=True)  # 700 steps of 2,048 tokens, windows of 128
  warning = too_little_data(config, 10_240)
  assert '10,240 tokens' in warning and 'seen 140 times' in warning and '5 step(s) of 2,048 tokens are one' in warning
  assert not too_little_data(config, 20 * 2048) and not too_little_data(config, 0)
  few_steps = open_config('gpt_small').resolve({'num_steps': 3}, cpu_only=True)
  assert not too_little_data(few_steps, 10_240), 'no part is seen twice'


@pytest.mark.parametrize('flag', ['--config.eval.every=0', '--config.data.val_fraction=0'])
def test_validation_can_be_turned_off(folder, flag, capsys):
  lines = train(folder, re.sub(r'\W', '_', flag), '--config.num_steps=4', flag)
  assert 'no validation' in capsys.readouterr().out
  assert not [name for line in lines.values() for name in line if name.startswith('val/')]
  assert sorted(lines) == [1, 2, 3, 4]


@pytest.mark.slow
def test_going_on_for_longer_reports_both_rates_and_its_advice_works(folder, capsys):
  train(folder, 'longer', '--config.num_steps=20', '--config.eval.every=0')
  capsys.readouterr()
  flags = ['--config.num_steps=40', '--config.eval.every=0']
  lines = train(folder, 'longer', *flags)
  [line] = [line for line in capsys.readouterr().out.splitlines() if 'the learning rate is' in line]
  new, old = map(float, re.search(r'is (\S+) now, where the old schedule has (\S+);', line).groups())
  assert lines[21]['train/learning_rate'] == pytest.approx(new, rel=1e-2) and new > old
  assert lines[20]['train/learning_rate'] == pytest.approx(old, rel=1e-2)
  rewarm, constant, rate = re.findall(r'--config\.\S+?=[^\s;]+', line)
  smooth = train(folder, 'longer', *flags, '--config.num_steps=44', rewarm.replace('20,', '40,'))
  assert smooth[41]['train/learning_rate'] < smooth[42]['train/learning_rate']
  kept = train(folder, 'longer', *flags, '--config.num_steps=46', schedule=(constant, rate))
  assert kept[46]['train/learning_rate'] == pytest.approx(old, rel=1e-2)


def test_another_path_drops_what_belongs_to_the_old_one():
  source = open_config('shakespeare_char')
  before, after = (source.resolve(overrides, cpu_only=True).data for overrides in ({}, {'data.path': 'mine.txt'}))
  assert before.sha256 and after.sha256 is None and after.path == 'mine.txt'
  assert (after.tokenizer, after.split, after.seq_len) == (before.tokenizer, before.split, before.seq_len)
  kept = source.resolve({'data.path': before.path}, cpu_only=True).data
  assert kept == before
  pairs = open_config('seq2seq_wgsl').resolve({'data.path': 'mine.jsonl'}, cpu_only=True).data
  assert pairs.answer_field == open_config('seq2seq_wgsl').resolve({}, cpu_only=True).data.answer_field


def test_the_end_of_a_run_prints_its_result_and_the_next_commands(folder, capsys):
  train(folder, 'ended', '--config.num_steps=4')
  lines = capsys.readouterr().out.splitlines()
  at = next(i for i, line in enumerate(lines) if line.startswith('finished: '))
  assert re.match(rf'finished: step 4 after \S+; best val/loss \d\.\d{{4}}; all files are in {folder}/ended', lines[at])
  commands = [line.split('  # ')[0].strip() for line in lines[at + 2:]]
  assert [re.search(r'(llm-jax|llm_jax|tensorboard) (\S+)', command)[2] for command in commands] == [
      'generate', 'evaluate', 'export', 'train', '--logdir']
  assert commands[3].endswith(f'{" ".join(WARMS_UP)} --workdir={folder}/ended --config.num_steps=8 '
                              '--config.optim.rewarm=4,1')
  capsys.readouterr()
  train(folder, 'unevaluated', '--config.num_steps=4', '--config.eval.every=0')
  assert 'evaluate --workdir' not in capsys.readouterr().out


@pytest.mark.parametrize(('settings', 'command'), [
    ({}, 'train .* --config.num_steps=1400 --config.optim.rewarm=700,70$'),
    ({'num_steps': 350}, 'train .* --config.num_steps=1400 --config.optim.rewarm=700,70$'),  # it has gone on before
    ({'optim.schedule': 'constant'}, 'train .* --config.num_steps=1400$'), ({'num_epochs': 2}, None)])
def test_the_command_to_go_on_fits_the_schedule(settings, command, tmp_path):
  config = open_config('gpt_small').resolve(settings, cpu_only=True)
  (tmp_path / 'status.json').write_text('{"state": "finished", "step": 700, "seconds": 1.0}')
  commands = [line.split('  # ')[0] for line in ending(config, tmp_path, ['--config=gpt_small'])]
  found = [line for line in commands if ' train ' in line]
  assert [bool(re.search(command, line)) for line in found] == [True] if command else not found


@pytest.mark.slow
def test_the_commands_that_a_run_prints_work(folder):
  flags = ['--config=tiny.py', '--workdir', 'a run', '--config.num_steps=4', '--config.eval.sample_tokens=0']
  output = finish(start(folder, 'main', *flags))
  for line in output[output.index('next:'):].splitlines()[1:]:
    command = line.split('  # ')[0].strip()
    if 'tensorboard' not in command:
      done = subprocess.run(command, shell=True, cwd=folder, env=environment(folder), capture_output=True, text=True)
      assert done.returncode == 0, f'{command}\n{done.stdout}{done.stderr}'
  assert 'step 8/8' in done.stdout
