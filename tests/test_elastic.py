"""A run that is stopped on 4 processes goes on with 2, 1 and 8, each time with the batches that come next."""

import random
import re
import signal
import subprocess
import sys
import time

import pytest
from program import ROOT, environment, finish

from llm_jax.training.log import read_metrics

CONFIG = '''
from llm_jax.config import base

def get_config():
  config = base()
  config.num_steps = 100_000  # so that a signal arrives before the end on any machine
  config.batch_tokens = 512
  config.tokens_per_device = 64  # 2 rows: from 8 microbatches on one device to 1 on eight
  config.model.num_layers = 2
  config.model.embed_dim = 64
  config.model.num_heads = 2
  config.model.vocab_size = 264
  config.model.dropout = 0.0  # whose masks depend on the number of microbatches
  config.model.dtype = 'float32'
  config.mesh.data = 1
  config.mesh.fsdp = -1  # parameters in as many shards as there are processes
  config.data.path = {text!r}
  config.data.tokenizer = 'byte'
  config.data.cache_dir = {cache!r}
  config.data.seq_len = 32
  config.optim.schedule = 'constant'
  config.optim.learning_rate = 1e-3
  config.eval.every = 10
  config.eval.max_tokens = 1024
  config.eval.sample_tokens = 0
  config.log.every = 1
  return config
'''


def launch(folder, num_processes, *flags):
  command = [sys.executable, ROOT / 'launch' / 'local.py', f'--num_processes={num_processes}', '--',
             '--config=tiny.py', *flags]
  return subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)


def train_some(folder, num_processes, workdir, more=6):
  """Trains a few more steps on so many processes, is stopped by a signal, and returns the step that was saved."""
  began, process, lines, first = time.monotonic(), launch(folder, num_processes, f'--workdir={workdir}'), [], None
  for line in process.stdout:
    lines.append(line)
    if found := re.match(r'step (\d+)/', line):
      first = first or int(found[1])
      if int(found[1]) >= first + more:
        break
  process.send_signal(signal.SIGTERM)
  output = ''.join(lines) + finish(process, code=75)
  assert f'{num_processes} x cpu, {num_processes} process(es)' in output, output[-2000:]
  step = int(re.search(r'stopped at step (\d+) of', output)[1])
  compiled = re.search(r'first step after ([\d.]+) s', output)[1]
  print(f'{num_processes} processes: steps {first} to {step}, {time.monotonic() - began:.1f} s, first step after '
        f'{compiled} s')
  return step


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
  words = 'the cat sat on a mat and saw blue birds that sang of rain in spring when rivers run far'.split()  # noqa: SIM905
  (tmp_path / 'text.txt').write_text(' '.join(random.Random(0).choices(words, k=50_000)))
  (tmp_path / 'tiny.py').write_text(CONFIG.format(text=str(tmp_path / 'text.txt'), cache=str(tmp_path / 'cache')))
  last = [train_some(tmp_path, count, 'run') for count in (4, 2, 1, 8)]
  assert last == sorted(set(last)), last
  finish(launch(tmp_path, 1, '--workdir=whole', f'--config.num_steps={last[-1]}'))
  run, whole = (read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('run', 'whole'))
  assert [line['step'] for line in run] == [line['step'] for line in whole] == list(range(1, last[-1] + 1))
  apart = 0.0
  for found, expected in zip(run, whole, strict=True):
    for name in {'train/loss', 'val/loss'} & found.keys() & expected.keys():
      assert found[name] == pytest.approx(expected[name], rel=1e-5), f'{name} of step {found["step"]}'
      apart = max(apart, abs(found[name] - expected[name]))
  print(f'largest difference of a loss: {apart:.2g}')
