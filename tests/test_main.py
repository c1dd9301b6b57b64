"""The whole program as a user runs it: train, kill, resume, watch, generate, evaluate, and error messages."""

import contextlib
import gzip
import io
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from program import environment, finish, signal_at, start, start_in_turn, write_config

from llm_jax import main
from llm_jax.base.errors import ConfigError, DataError, StorageError
from llm_jax.base.profiling import ProfileConfig, Profiler
from llm_jax.commands import evaluate, generate
from llm_jax.training.log import read_metrics

STEPS = 60
GENERATE = ('--prompt=def ', '--num_tokens=12', '--num_samples=2', '--seed=3', '--workdir=runs/tiny')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('program')
  write_config(folder)
  return folder


@pytest.fixture(scope='module')
def whole(folder):
  """(workdir, output, text that the same process then generated) of an uninterrupted run."""
  output = finish(start_in_turn(folder, ('train', '--config=tiny.py'), ('generate', *GENERATE)))
  trained, separator, text = output.partition('--- sample 1')
  return folder / 'runs' / 'tiny', trained, separator + text


def final_arrays(workdir):
  restored = ocp.PyTreeCheckpointer().restore(workdir.absolute() / 'checkpoints' / str(STEPS) / 'params')
  return jax.tree.map(np.asarray, restored)


def test_a_run_learns_and_writes_its_files(whole):
  workdir, output, _ = whole
  metrics = read_metrics(workdir / 'metrics.jsonl')
  assert [line['step'] for line in metrics] == list(range(1, STEPS + 1))
  assert metrics[-1]['train/loss'] < 0.8 * metrics[0]['train/loss']
  for name in ('train/loss', 'train/perplexity', 'train/bits_per_byte', 'train/learning_rate', 'train/grad_norm',
               'train/tokens_per_second', 'train/data_wait', 'val/loss', 'val/perplexity', 'val/bits_per_byte'):
    assert name in metrics[-1]
  assert 'train/mfu' not in metrics[-1], 'a CPU has no peak in the table'
  for name in ('config.json', 'tokenizer.json', 'checkpoints'):
    assert (workdir / name).exists()
  assert list(workdir.glob('events.out.tfevents.*'))
  assert re.search(rf'step {STEPS}/{STEPS} .*tokens/s', output) and '\r' not in output


def test_a_killed_run_resumes_bitwise(whole, folder):
  """SIGTERM or Ctrl-C (also as validation begins), then SIGKILL, at random steps, then to the end: bitwise the same.

  While it runs, another run in its folder is rejected.
  pytest shows the printed seed if the test fails; set TEST_KILL_SEED to it to repeat the same steps.
  """
  workdir, flags = folder / 'killed', ('--config=tiny.py', '--workdir=killed', '--config.eval.sample_tokens=0')
  seed = int(os.environ.get('TEST_KILL_SEED', time.time_ns() % 2**32))
  rng = random.Random(seed)
  first, second = rng.choice([19, rng.randint(5, 18)]), rng.randint(32, 44)
  number = rng.choice([signal.SIGTERM, signal.SIGINT])
  print(f'TEST_KILL_SEED={seed}: {number.name} at step {first}, SIGKILL at step {second}')
  process = start(folder, 'main', *flags)
  signal_at(process, workdir, first, number)
  output = finish(process, code=75)
  assert f'{number.name}: saving' in output and 'saved in killed' in output and 'Traceback' not in output
  step = int(re.search(r'stopped at step (\d+)', output)[1])
  assert (workdir / 'checkpoints' / str(step)).is_dir()
  assert read_metrics(workdir / 'metrics.jsonl')[-1]['step'] == step
  process = start(folder, 'main', *flags)
  signal_at(process, workdir, step + 1, signal.SIGSTOP)
  with pytest.raises(StorageError, match='another run'):
    tiny(folder, f'--workdir={workdir}')
  process.send_signal(signal.SIGCONT)
  signal_at(process, workdir, second, signal.SIGKILL)
  finish(process, code=-9)
  output = finish(start(folder, 'main', *flags))
  assert 'resuming from step' in output

  names = ('step', 'train/loss', 'train/grad_norm', 'val/loss', 'val/bits_per_byte')
  lines, expected = (
      [{k: line[k] for k in names if k in line} for line in read_metrics(path / 'metrics.jsonl')]
      for path in (workdir, whole[0]))
  assert lines == expected, f'killed at {first} and {second}'
  jax.tree.map(np.testing.assert_array_equal, final_arrays(workdir), final_arrays(whole[0]))


def test_a_finished_run_is_reported(whole, folder, capsys):
  main.main([f'--config={folder}/tiny.py', f'--workdir={whole[0]}'])
  assert f'already at step {STEPS}' in capsys.readouterr().out


def test_generate_streams_text(whole, capsys):
  output = whole[2]
  assert re.fullmatch(r'--- sample 1 of 2 ---\ndef .*\n\n--- sample 2 of 2 ---\ndef .*\n', output, re.DOTALL)
  generate.main([*GENERATE[:-1], f'--workdir={whole[0]}'])
  assert capsys.readouterr().out == output, 'the same seed, the same text'


def test_evaluate_agrees_with_the_run_and_reads_other_data(whole, folder, monkeypatch, capsys):
  monkeypatch.setenv('LLM_JAX_CACHE', environment(folder)['LLM_JAX_CACHE'])
  evaluate.main(['--workdir', str(whole[0]), '--checkpoint', 'best', '--out', str(folder / 'out.json')])
  report = json.loads(capsys.readouterr().out)
  assert report == json.loads((folder / 'out.json').read_text())
  line = next(m for m in read_metrics(whole[0] / 'metrics.jsonl') if m['step'] == report['step'])
  for name in ('loss', 'bits_per_byte', 'accuracy', 'tokens'):
    assert report[name] == pytest.approx(line[f'val/{name}'], rel=1e-5), name
  assert type(report['tokens']) is int
  (folder / 'other.txt').write_text('import os\n' * 50)
  evaluate.main(['--workdir', str(whole[0]), '--data', str(folder / 'other.txt')])
  other = json.loads(capsys.readouterr().out)
  assert json.loads((whole[0] / 'evaluation.json').read_text()) == other and other['tokens'] < report['tokens']
  assert other['bits_per_byte'] == pytest.approx(other['loss'] * other['tokens'] / np.log(2) / 500, rel=1e-5)


def test_tensorboard_shows_scalars_and_samples(whole, folder):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  process = subprocess.Popen(
      [sys.executable, '-m', 'tensorboard.main', '--logdir', whole[0], '--port', str(port), '--host', 'localhost',
       '--load_fast=false'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

  def get(path):
    with urllib.request.urlopen(f'http://localhost:{port}/data/plugin/{path}', timeout=10) as response:
      return json.load(response)

  try:
    for _ in range(120):
      try:
        scalars, texts = get('scalars/tags'), get('text/tags')
        if scalars and texts:
          break
      except OSError:
        pass
      time.sleep(0.5)
    run = next(iter(scalars))
    assert {'loss/train', 'loss/val', 'loss/val/best', 'val/bits_per_byte', 'train/grad_norm'} <= scalars[run].keys()
    points = get(f'scalars/scalars?run={run}&tag=loss/val')
    assert [step for _, step, _ in points] == [20, 40, 60]
    assert {'sample/def ', 'sample/new document', 'x_config'} <= set(texts[run])
    assert 'def' in get(f'text/text?run={run}&tag=sample/def%20')[0]['text']
  finally:
    process.terminate()
    process.wait()


def tiny(folder, *flags):
  main.main([f'--config={folder}/tiny.py', f'--workdir={folder}/refused', '--config.batch_tokens=2048', *flags])


REFUSED = [
    (['--config.data.path=nowhere'], DataError, 'nowhere'),
    (['--config.data.path={folder}/empty.txt'], DataError, '0 token(s) for train'),
    (['--config.data.path={folder}/latin.txt'], DataError, 'latin.txt: not UTF-8 text at byte 3'),
    (['--config.data.path=http://localhost:9/x.txt'], DataError, '--config.data.path=FILE'),
    (['--config.data.path={folder}/odd.bin'], DataError, 'odd.bin'),
    (['--config.model.vocab_size=100'], ConfigError, 'less than the 300 tokens'),
    (['--config.batch_tokens=32'], ConfigError, '8 devices cannot share'),
    (['--config.mesh.data=3'], ConfigError, '8 device'),
    (['--config.data.val_path=x.bin'], DataError, 'x.bin'),
    (['--config.data.task=seq2seq', '--config.data.packing=pad'], ConfigError, 'config.data.answer_field'),
    (['--config.data.task=fim'], ConfigError, 'config.data.packing'),
    (['--config.data.task=span_corruption', '--config.data.packing=pad', '--config.model.vocab_size=none'], ConfigError,
     'encoder_tokens, which the model decoder does not read'),
    (['--config.data.streaming=true'], ConfigError, 'config.data: streaming: validation needs split=count'),
    (['--config.data.sources.a.pth=x'], ConfigError, 'did you mean config.data.sources.a.path?'),
    (['--config.eval.prompts=' + 'x ' * 99], ConfigError, 'shorten it to at most'),
    (['--config.data.tokenizer=char', '--config.eval.prompts=\u4e2d'], ConfigError, 'config.eval.prompts'),
    (['--config.model.num_heads=3'], ConfigError, 'nearest that do'),
    (['--workdir={folder}/empty.txt/run'], StorageError, 'empty.txt/run cannot be written'),
    (['--config.modle.num_heads=3'], ConfigError, 'did you mean config.model?'),
]


@pytest.mark.parametrize(('flags', 'error', 'words'), REFUSED, ids=[f[0] for f, _, _ in REFUSED])
def test_bad_input_gives_one_clear_message(flags, error, words, folder):
  (folder / 'empty.txt').touch()
  (folder / 'latin.txt').write_bytes('caf\xe9'.encode('latin-1') * 9)
  (folder / 'odd.bin').write_bytes(b'123')
  with pytest.raises(error) as e:
    tiny(folder, *(flag.format(folder=folder) for flag in flags))
  assert words in str(e.value)


def test_a_bad_value_exits_without_traceback(folder):
  output = finish(start(folder, 'main', '--config=tiny.py', '--config.num_stesp=3'), code=78)
  assert output == 'error: config.num_stesp: no such field; did you mean config.num_steps?\n'


RESUME_REFUSED = [
    ('--config.seed=1', 'config.seed: checkpoint 0, now 1'),
    ('--config.data.seq_len=16', 'config.data.seq_len: checkpoint 32, now 16'),
    ('--config.batch_tokens=4096', 'rows'),
    ('--config.data.mask_documents=false', 'config.data.mask_documents'),
    ('--config.data.val_fraction=0.3', 'config.data.val_fraction: checkpoint 0.05, now 0.3'),
    ('--config.model.num_heads=4', 'config.model.num_heads: checkpoint 2, now 4'),
    ('--config.optim.chain=adamw', 'config.optim.chain'),
]


@pytest.fixture(scope='module')
def watched(folder):
  """(workdir, output, log of compiled programs) of a run in this process on its eight devices."""
  compiled, handler = [], logging.Handler()
  handler.emit = lambda record: compiled.append(record.getMessage())
  logging.getLogger('jax').addHandler(handler)
  try:
    with jax.log_compiles(), contextlib.redirect_stdout(io.StringIO()) as printed:
      tiny(folder, f'--workdir={folder}/resumable', '--config.num_steps=10', '--config.eval.every=4',
           '--config.eval.sample_tokens=0', '--config.profile.start=4', '--config.tokens_per_device=none')
  finally:
    logging.getLogger('jax').removeHandler(handler)
  return folder / 'resumable', printed.getvalue(), compiled


@pytest.fixture(scope='module')
def resumable(watched):
  return watched[0]


def test_evaluation_and_the_step_compile_once(watched):
  """Also if the last batch of an evaluation is ragged, and if the step was compiled to measure its memory."""
  for name in ('eval_step', 'step'):
    assert len([line for line in watched[2] if line.startswith(f'Compiling jit({name})')]) == 1, name


def test_a_profile_has_the_configured_steps(watched):
  workdir, printed, _ = watched
  [path] = workdir.glob('profile/plugins/profile/*/perfetto_trace.json.gz')
  assert list(path.parent.glob('*.xplane.pb')), "what TensorBoard's profiler reads"
  with gzip.open(path) as f:
    events = json.load(f)['traceEvents']
  assert [e['args']['step_num'] for e in events if e.get('name') == 'train'] == ['4', '5', '6']
  assert any('PjitFunction(step)' in e.get('name', '') for e in events)
  assert str(path) in printed and f'tensorboard --logdir {workdir}' in printed


def test_a_profile_in_the_past_is_reported(tmp_path):
  said = []
  for begin in (3, 4):
    Profiler(ProfileConfig(start=4), tmp_path, begin, said.append)
  assert len(said) == 1 and 'config.profile.start is 4' in said[0] and 'after step 4' in said[0]


def test_the_rows_that_fit_are_stored_in_config_json(watched):
  workdir, printed, _ = watched
  assert json.loads((workdir / 'config.json').read_text())['tokens_per_device'] == 2048 // 8
  assert re.search(r'8 row\(s\) at a time need .* [MG]iB: fits', printed)


@pytest.mark.parametrize(('flag', 'words'), RESUME_REFUSED, ids=[f for f, _ in RESUME_REFUSED])
def test_resuming_with_changed_data_or_model_is_rejected(flag, words, resumable, folder):
  extra = ['--config.model.max_len=32'] if 'seq_len' in flag else []
  before = (resumable / 'metrics.jsonl').read_bytes()
  with pytest.raises(ConfigError) as e:
    tiny(folder, f'--workdir={resumable}', '--config.num_steps=12', flag, *extra)
  assert words in str(e.value)
  assert (resumable / 'metrics.jsonl').read_bytes() == before, 'nothing lost'


STREAM = ['streaming=true', 'split=count', 'val_documents=1', 'shuffle_buffer=4', 'cache_mb=1']
MIXTURE = ['sources.a.path={folder}/corpus/loop.py', 'sources.b.path={folder}/corpus/config.py',
           'sources.a.weight=3,1', 'sources.b.weight=1,1', 'weights_from=0,6', 'num_workers=1', 'task=fim',
           'packing=best_fit']


@pytest.mark.slow
@pytest.mark.parametrize('data', [STREAM, MIXTURE], ids=['stream', 'mixture'])
def test_streams_and_mixtures_resume_exactly(data, folder):
  def losses(workdir):
    return [line['train/loss'] for line in read_metrics(workdir / 'metrics.jsonl')]

  flags = [f'--config.data.{flag.format(folder=folder)}' for flag in data] + [
      '--config.model.vocab_size=none', '--config.eval.every=100', '--config.eval.sample_tokens=0']
  cut, whole = folder / f'cut_{data[0][:4]}', folder / f'whole_{data[0][:4]}'
  for workdir, num_steps in ((cut, 5), (cut, 9), (whole, 9)):
    tiny(folder, f'--workdir={workdir}', f'--config.num_steps={num_steps}', *flags)
  assert losses(cut) == losses(whole) and len(losses(whole)) == 9


@pytest.mark.slow
def test_config_json_repeats_a_run(resumable, folder):
  main.main([f'--config={resumable}/config.json', f'--workdir={folder}/repeated'])
  losses = [[line['train/loss'] for line in read_metrics(path / 'metrics.jsonl')]
            for path in (resumable, folder / 'repeated')]
  assert losses[0] == losses[1] and len(losses[0]) == 10


def test_commands_reject_bad_arguments(whole, folder):
  for program, flags, error, words in [
      (generate, ['--workdir', 'nowhere'], ConfigError, 'nowhere does not exist'),
      (generate, ['--workdir', str(whole[0]), '--top_p=0'], ConfigError, '--top_p'),
      (generate, ['--workdir', str(whole[0]), '--temperature=nan', '--num_samples=0'], ConfigError,
       '--num_samples must be at least 1; got 0\n--temperature must be at least 0; got nan'),
      (generate, ['--workdir', str(whole[0]), '--checkpoint=last'], ConfigError, 'latest, best, or a step'),
      (generate, ['--workdir', str(whole[0]), '--checkpoint=7'], ConfigError, "must be latest, best, or a step of"),
      (evaluate, ['--workdir', str(whole[0]), '--data=nowhere'], DataError, 'nowhere')]:
    with pytest.raises(error) as e:
      program.main(flags)
    assert words in str(e.value)
