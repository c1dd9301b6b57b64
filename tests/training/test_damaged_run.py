"""A run's folder with damaged or missing files: training goes on from what is intact, and says what was not."""

import json
import random
import shutil

import pytest
from program import write_config

from llm_jax import api, main
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.base.files import MANIFEST, latest_step
from llm_jax.extras.commands import check
from llm_jax.training.log import read_metrics
from llm_jax.training.status import read_status

FLAGS = ['--config.eval.sample_tokens=0', '--config.model.num_layers=1', '--config.eval.every=2',
         '--config.checkpoint.every=2']
LOGS = ('metrics.jsonl', 'status.json', 'launches.jsonl', 'config.json')


def train(folder, workdir, num_steps, *flags):
  main.main([f'--config={folder}/tiny.py', f'--workdir={workdir}', f'--config.num_steps={num_steps}', *FLAGS, *flags])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('folder')
  write_config(folder)
  train(folder, folder / 'run', 4)
  return folder


@pytest.fixture
def run(folder, tmp_path):
  return shutil.copytree(folder / 'run', tmp_path / 'run')


def flip(content):
  content = bytearray(content)
  for _ in range(3):
    content[random.Random(len(content)).randrange(len(content))] ^= 0x80
  return bytes(content)


@pytest.mark.parametrize('damage', [
    flip, lambda content: b'\xff\xfe[]\n' + content[:30], pytest.param(lambda _: b'', marks=pytest.mark.slow),
    pytest.param(lambda _: b'[1]\n', marks=pytest.mark.slow)], ids=['bit', 'cut', 'empty', 'a list'])
def test_damaged_logs_do_not_stop_a_run(damage, folder, run, capsys):
  for name in LOGS:
    (run / name).write_bytes(damage((run / name).read_bytes()))
  train(folder, run, 5)
  assert 'resuming from step 4' in (printed := capsys.readouterr()).out and latest_step(run) == 5
  assert read_metrics(run / 'metrics.jsonl')[-1]['step'] == 5 and read_status(run)['state'] == 'finished'
  aside = {path.name.partition('.damaged')[0] for path in run.glob('*.damaged-*')}
  assert 'status.json' in aside and all(f'WARNING: {run}/{name}' in printed.err for name in aside)
  assert json.loads((run / 'config.json').read_text())['num_steps'] == 5


def test_a_flipped_bit_in_checkpoint_or_tokenizer_is_found_by_check_and_generate(run, capsys):
  check.main([f'--workdir={run}'])
  assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [['2', 'intact'], ['4', 'intact']]
  path = run / 'tokenizer.json'
  content = path.read_bytes()
  path.write_bytes(flip(content))
  with pytest.raises(StorageError, match='tokenizer\\.json is not as the run wrote it'):
    api.load(run)
  path.write_bytes(content)
  config = run / 'config.json'
  config.write_text(config.read_text().replace('"num_layers": 1', '"num_layers": 2'))
  with pytest.raises(StorageError, match='config\\.json is not as the run wrote it'):
    api.load(run)
  config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 1').replace('"seed"', ' "seed"'))
  capsys.readouterr()
  assert api.load(run).run.meta['step'] == 4 and 'config.json was changed' in capsys.readouterr().err
  [path] = (run / 'checkpoints' / '4' / 'meta').glob('metadata')
  path.write_bytes(flip(path.read_bytes()))
  with pytest.raises(StorageError, match='damaged: 4'):
    check.main([f'--workdir={run}', '--format=json'])
  report = json.loads(capsys.readouterr().out)
  assert [row['state'] for row in report['steps']] == ['intact', 'damaged']
  assert report['steps'][1]['problems'] == ['meta/metadata: its content has changed']
  assert api.load(run).run.meta['step'] == 2, 'an older one is used'


@pytest.mark.parametrize('how', ['missing', *(
    pytest.param(how, marks=pytest.mark.slow) for how in ('empty', 'set aside', 'all damaged'))])
def test_lost_checkpoints_are_an_error_until_start_over(how, folder, run, capsys):
  checkpoints, before = run / 'checkpoints', (run / 'metrics.jsonl').read_bytes()
  if how in ('missing', 'empty'):
    shutil.rmtree(checkpoints)
  if how == 'empty':
    checkpoints.mkdir()
  if how == 'set aside':
    for step in (2, 4):
      (checkpoints / str(step)).rename(checkpoints / f'{step}.corrupt-1')
  if how == 'all damaged':
    for step in (2, 4):
      (checkpoints / str(step) / 'meta' / 'metadata').write_bytes(b'')
  for _ in range(2):  # the first attempt leaves the evidence
    with pytest.raises(StorageError, match='--start_over'):
      train(folder, run, 5)
    assert (run / 'metrics.jsonl').read_bytes() == before
  train(folder, run, 2, '--start_over')
  assert [line['step'] for line in read_metrics(run / 'metrics.jsonl')] == [1, 2] and latest_step(run) == 2
  [aside] = run.glob('before-*')
  assert (aside / 'metrics.jsonl').read_bytes() == before
  train(folder, run, 3)


def test_a_run_killed_before_its_first_checkpoint_begins_again(folder, run):
  shutil.rmtree(run / 'checkpoints')
  (run / 'checkpoints').mkdir()
  status = read_status(run) | {'state': 'training', 'saved': None}
  (run / 'status.json').write_text(json.dumps(status))
  launches = [json.loads(line) for line in (run / 'launches.jsonl').read_text().splitlines()]
  (run / 'launches.jsonl').write_text(''.join(
      json.dumps({k: v for k, v in line.items() if k != 'ended'}) + '\n' for line in launches))
  train(folder, run, 2)
  assert latest_step(run) == 2


def test_steps_without_a_manifest_count_once_they_are_adopted(folder, run, capsys):
  for step in (2, 4):
    (run / 'checkpoints' / str(step) / MANIFEST).unlink()
  (run / 'checkpoints' / '2' / 'opt_state' / 'manifest.ocdbt').write_bytes(b'x')
  with pytest.raises(StorageError, match='--adopt'):
    train(folder, run, 5)
  with pytest.raises(StorageError, match='--adopt'):
    api.load(run)
  with pytest.raises(StorageError, match='damaged: 2'):
    check.main([f'--workdir={run}', '--adopt'])
  assert '4  adopted' in capsys.readouterr().out
  train(folder, run, 5)
  assert 'resuming from step 4' in capsys.readouterr().out


def test_check_refuses_flags_that_contradict(run):
  for flags, words in ((['--adopt'], 'needs a --workdir'), ([f'--workdir={run}', '--config=gpt_small'], 'one of them'),
                       ([f'--workdir={run}/nowhere'], 'does not exist')):
    with pytest.raises(ConfigError, match=words):
      check.main(flags)


@pytest.mark.parametrize('lost', ['the evaluation', *(
    pytest.param(lost, marks=pytest.mark.slow) for lost in ('nothing', 'the score'))])
@pytest.mark.slow
def test_a_step_that_was_saved_before_its_evaluation_resumes_bitwise(lost, folder, tmp_path):
  """Also with an optimizer that an evaluation changes, whether or not its results were stored before the end."""
  flags = ['--config.optim.chain=adamw,reduce_on_plateau', '--config.optim.reduce_on_plateau.metric=val/loss',
           '--config.optim.reduce_on_plateau.min_delta=9', '--config.optim.reduce_on_plateau.patience=1',
           '--config.optim.reduce_on_plateau.factor=0.5']
  whole, cut = folder / 'whole', tmp_path / 'cut'
  if not whole.exists():
    train(folder, whole, 7, *flags)
  train(folder, cut, 4, *flags)
  if lost != 'nothing':
    (cut / 'checkpoints' / '4.score.json').unlink()
  if lost == 'the evaluation':  # killed in it: its line of metrics.jsonl lacks it too
    lines = (cut / 'metrics.jsonl').read_text().splitlines()
    last = {name: value for name, value in json.loads(lines[-1]).items() if not name.startswith(('val/', 'best/'))}
    (cut / 'metrics.jsonl').write_text(''.join(line + '\n' for line in [*lines[:-1], json.dumps(last)]))
  train(folder, cut, 7, *flags)
  names = ('step', 'train/loss', 'train/grad_norm', 'val/loss', 'best/val/loss', 'train/plateau_scale')
  mine, theirs = ([{k: line[k] for k in names if k in line} for line in read_metrics(path / 'metrics.jsonl')]
                  for path in (cut, whole))
  assert mine == theirs and {line.get('train/plateau_scale') for line in theirs} > {1.0}, 'an evaluation had an effect'
