"""The core works without extras/: a copy of the package that lacks them trains, writes text and lists its commands."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from program import ROOT, environment

SMALLER = {
    'num_steps': 5, 'batch_tokens': 512, 'tokens_per_device': 512, 'model.num_layers': 2, 'model.scan_unroll': 2,
    'model.embed_dim': 32, 'model.num_heads': 2, 'data.seq_len': 64, 'data.vocab_size': 300,
    'optim.warmup_cosine.warmup_steps': 2, 'eval.every': 5, 'eval.max_tokens': 512, 'eval.sample_tokens': 4,
    'log.every': 1}


# The commands of a run share a process, as importing JAX takes longer than most of them.
PROGRAM = """
import sys
from llm_jax.__main__ import main
from llm_jax.base.errors import ConfigError

for command in sys.argv[1:]:
  try:
    main(command.split())
  except ConfigError as e:
    print(e)
  print('--- end of a command')
"""


@pytest.fixture(scope='module')
def core(tmp_path_factory):
  """(a folder with the package but its extras, a function that runs Python there)."""
  folder = tmp_path_factory.mktemp('core')
  shutil.copytree(ROOT / 'llm_jax', folder / 'llm_jax', ignore=shutil.ignore_patterns('extras', '__pycache__'))
  (folder / 'texts').mkdir()
  for name in ('config.py', 'training/log.py', 'training/loop.py'):
    shutil.copy(ROOT / 'llm_jax' / name, folder / 'texts')
  env = environment(folder) | {'PYTHONPATH': str(folder)}

  def run(*arguments, code=0):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr

  return folder, run


@pytest.mark.slow
def test_it_trains_generates_evaluates_and_exports(core):
  folder, run = core
  settings = [f'--config.{name}={value}' for name, value in SMALLER.items()]
  commands = [f'train --config={ROOT}/configs/gpt_small.py --workdir=run --config.data.path=texts {" ".join(settings)}',
              'generate --workdir=run --prompt=def --num_tokens=4', 'evaluate --workdir=run',
              'export --workdir=run --out=exported', 'export --workdir=run --out=exported --weight_bits=32']
  outputs = [text.lstrip('\n') for text in run('-c', PROGRAM, *commands).split('--- end of a command\n')]
  train, generate, evaluate, refused, export, _ = outputs
  assert 'step 5/5' in train
  lines = [json.loads(line) for line in (folder / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5] and lines[-1]['val/loss'] > 0
  assert generate.startswith('def') and '"loss"' in evaluate
  assert 'set it to 32' in refused and 'bits each' in export


def test_it_lists_the_commands_that_it_has(core):
  _, run = core
  output = run('-m', 'llm_jax', '--help')
  assert 'train' in output and 'generate' in output and 'sweep' not in output and 'plot' not in output
  words = run('-m', 'llm_jax', 'sweep', code=os.EX_CONFIG)
  assert words.startswith("error: llm-jax: 'sweep' is not a command; known: train") and 'data convert' not in words
