"""Every command and Python block of README.md and docs/ runs, in one folder, with small runs and data.

They run in the order of the pages, as some read what others wrote.
"""

import gzip
import json
import pickle
import re
import shlex
import subprocess
import sys

import pytest
from program import ROOT, environment
from test_docs import PAGES, commands_of, python_blocks

pytestmark = pytest.mark.slow

# What cannot run here, and why. The flags of all of them are checked in test_docs.py.
NOT_RUN = {
    r'^make ': 'installs packages, or runs this suite',
    r'^pip ': 'installs packages',
    r'^tensorboard ': 'a server that does not end; test_main.py starts one',
    r'^llm-jax serve ': 'a server that does not end; test_serve.py starts one',
    'wandb': 'needs an account',
    r'^(sbatch|srun|gcloud|launch/tpu_pod.sh) ': 'needs a cluster',
    r'benchmarks\.': 'times this machine for minutes; test_benchmarks.py runs parts of them',
    r'torch/python': 'needs PyTorch',
    r'configs/(shakespeare|distill)_char\.py': 'downloads its text, or needs the run of the other',
    r'runs/seq2seq_wgsl': 'needs the trained model; test_answers.py has a small one',
    r'runs/tuned': 'needs a trained model with long rows; test_chat_runs.py has a small one',
    r's3://': 'needs object storage; test_remote_store.py has a server',
    r'^llm-jax data merge ': 'needs shards; test_shards.py makes some',
    r'configs/grokking\.py': 'trains several models for minutes; test_commands.py runs a sweep',
}
SMALL = {'num_steps': 4, 'batch_tokens': 256, 'tokens_per_device': 128, 'model.num_layers': 2, 'model.scan_unroll': 1,
         'model.embed_dim': 32, 'model.num_heads': 2, 'model.mlp_dim': None, 'data.seq_len': 32, 'data.vocab_size': 300,
         'data.path': 'texts', 'optim.warmup_cosine.warmup_steps': 1, 'eval.every': 2, 'eval.max_tokens': 256,
         'eval.sample_tokens': 2, 'log.every': 1, 'checkpoint.every': 2}
# Numbers of long runs, and what stands for them in short ones.
SHORTER = {'start.checkpoint=8000': 'start.checkpoint=2', 'num_steps=9000': 'num_steps=6', 'decay_steps=1000':
           'decay_steps=2', 'num_steps=100': 'num_steps=4', 'val_documents=1000': 'val_documents=5', '8192': '300'}
LAB = '''
import dataclasses
import flax.linen as nn

@dataclasses.dataclass(frozen=True)
class FooConfig:
  name: str = 'foo'
  vocab_size: int | None = None
  max_len: int | None = None

class Foo(nn.Module):
  config: FooConfig

  @nn.compact
  def __call__(self, tokens):
    return nn.Embed(self.config.vocab_size, self.config.vocab_size)(tokens)
'''


def shorter(text):
  for long, short in SHORTER.items():
    text = text.replace(long, short)
  return text


def run(folder, command, stdin=''):
  done = subprocess.run(command, shell=True, cwd=folder, env=environment(folder) | {'COLUMNS': '120'}, input=stdin,
                        capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, f'{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}'


def small_flags(words):
  """The flags that make a command's training short, without those that it has itself."""
  set_already = {word.partition('=')[0] for word in words}
  is_decoder = not any(word.startswith('--config.model.name=') for word in words)
  kept = {name: value for name, value in SMALL.items()
          if (is_decoder or not name.startswith('model.')) and not any('/config.json' in word for word in words)
          and not ('chat_small' in ' '.join(words) and name in ('data.path', 'data.seq_len'))
          and ('schedule=' not in ' '.join(words) or not name.startswith('optim.'))}
  return [f'--config.{name}={value}' for name, value in kept.items() if f'--config.{name}' not in set_already]


def prepared(command):
  """The command of a page for the shell, with small runs."""
  words = shlex.split(command)
  flags = small_flags(words) if {'train', 'check', 'launch/local.py'} & set(words[:3]) else ()
  python = shlex.quote(sys.executable)
  text = re.sub(r'^\S*llm-jax', f'{python} -m llm_jax', re.sub(r'^python', python, shorter(command)))
  return ' '.join([text, *map(shlex.quote, flags)])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('docs')
  for name in ('configs', 'launch'):
    (folder / name).symlink_to(ROOT / name)
  text = (ROOT / 'llm_jax' / 'config.py').read_text()
  for name in ('texts/a.py', 'texts/b.py', 'my_texts/a.txt', 'my_file.txt', 'README.md', 'notes/a.md',
               'notes/b/c.md', 'src/a.py'):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'{name}\n{text}')
  (folder / 'my_fortunes').write_text('\n%\n'.join(f'cat {i} sat on the mat of sir {i * i}' for i in range(500)))
  pairs = [{'question': f'add {i} and {i}', 'answer': str(2 * i)} for i in range(500)]
  texts = [{'text': f'twice {i} is {2 * i}'} for i in range(500)]
  (folder / 'pairs.jsonl').write_text(''.join(json.dumps(pair) + '\n' for pair in pairs))
  for name in ('web/a.jsonl.gz', 'shards/a.jsonl.gz'):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(''.join(json.dumps(text) + '\n' for text in texts).encode()))
  (folder / 'out').mkdir()
  (folder / 'out' / 'a.wgsl').write_text('fn main() {}\n')
  (folder / 'old.pkl').write_bytes(pickle.dumps(texts))
  for name, body in re.findall(r'```python\n# (\w+\.py)\n(.*?)```', PAGES['docs/extend.md'], re.S):
    (folder / name).write_text(body)
  [lab] = [block for block in python_blocks('README.md') if block.startswith('# my_lab.py')]
  (folder / 'my_lab.py').write_text(LAB + lab)
  for name in ('gpt_small', 'a', 'b'):
    run(folder, prepared(f'llm-jax train --config=configs/gpt_small.py --workdir=runs/{name}'))
  return folder


@pytest.mark.parametrize('command', dict.fromkeys(command for page in PAGES for command in commands_of(page)))
def test_a_command_runs(command, folder):
  reason = next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command)), None)
  if reason:
    pytest.skip(reason)
  run(folder, prepared(command), stdin='def \n')


@pytest.mark.parametrize('page', PAGES)
def test_a_program_runs(page, folder):
  for number, block in enumerate(python_blocks(page)):
    if 'import llm_jax\n' in block:
      file = folder / f'program_{number}.py'
      file.write_text(f'SMALL = {SMALL!r}\n' + shorter(block).replace('**{', '**SMALL | {'))
      run(folder, f'{shlex.quote(sys.executable)} {file.name}')


def test_what_is_not_run_is_named_by_a_page():
  commands = [command for page in PAGES for command in commands_of(page)]
  unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, command) for command in commands)]
  assert set(unused) <= {r'^pip ', r'^llm-jax serve ', 'wandb'}
