"""byte_patch beside the same in PyTorch, by the time of a step, and beside a plain decoder on bytes, by its loss.

  python -m benchmarks.byte_patch --torch=/path/to/an/environment/with/torch/bin/python
  python -m benchmarks.byte_patch --study=runs/byte_study

The first times one training step of configs/bytes_small.py on random bytes. "As its authors" uses the cumulative sum of
the original, "masked" computes the same by masked products. Without --torch only our step is timed.
Each variant is a process that sleeps while another one runs: A B C A B C ..., after a warm-up round.
The second trains models of equally many parameters on two texts (TEXTS) and prints their bits per byte of the
validation part, after equally many steps and after equal time: the number of steps follows from the processor time of a
step, measured in turn. The decoder and the model with thinking steps try RATES with one seed on the first text, and all
rows use the better one of their kind. It continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import GEMM_SIZE, serve
from benchmarks.table import MALLOC, Worker

VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {  # of PyTorch: flags and environment
    'as its authors': ([], {}),
    'masked': (['--linear=masked'], {}),
    'masked + malloc': (['--linear=masked'], MALLOC),
    'masked, compiled + malloc': (['--linear=masked', '--compile'], MALLOC),
}

TEXTS = {'stdlib': 'stdlib', 'vim': '/usr/share/vim/vim*/doc/*.txt'}  # vim: English; of the package vim-runtime
MODELS = {  # each with the mlp_dim that makes its parameters as many as those of the first
    'patches, 3 thinking steps': {'name': 'byte_patch', 'num_layers': 3, 'thinking_steps': 3},
    'patches, no thinking': {'name': 'byte_patch', 'num_layers': 3, 'thinking_steps': 0},
    'decoder': {'name': 'decoder', 'num_layers': 5, 'mlp': 'swiglu', 'norm': 'rms_norm', 'positions': 'rope'},
}
FIRST, SECOND, DECODER = MODELS
MLP_DIM, RATES = 192, (2e-3, 5e-3)
STUDIES = {  # row of the table: model, whether it trains as long as the decoder instead of as many steps, rates' row
    'decoder': (DECODER, True, 'decoder'),
    'patches, 3 thinking steps, equal time': (FIRST, True, 'patches, 3 thinking steps, equal time'),
    'patches, 3 thinking steps, equal steps': (FIRST, False, 'patches, 3 thinking steps, equal time'),
    'patches, no thinking, equal time': (SECOND, True, 'patches, 3 thinking steps, equal time')}


class Side(Worker):
  """A Worker for a program without presets."""

  def __init__(self, python: str, module: str, flags: list[str], env: dict[str, str]):
    self._process = subprocess.Popen([python, '-m', module, '--serve', *flags], text=True, stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, env=os.environ | env)
    self.about, self.seconds = self._read(), []


def serve_ours(path: str) -> None:
  from llm_jax.base import runtime
  runtime.prepare()
  import jax
  import jax.numpy as jnp

  from benchmarks.loop import bare_step
  from llm_jax.config_file import open_config

  config = resolved(open_config(path).resolve({}, cpu_only=jax.default_backend() == 'cpu'))
  run = bare_step(config)
  square = jnp.ones((GEMM_SIZE, GEMM_SIZE))
  product = jax.jit(jnp.matmul)
  start = time.perf_counter()
  run(1)
  serve({'framework': f'llm_jax, jax {jax.__version__}', 'params': num_params(config),
         'first_step_s': round(time.perf_counter() - start, 2), 'tokens': config.batch_tokens},
        lambda: run(1), lambda: jax.block_until_ready(product(square, square)))


def resolved(config):
  """The config with the vocabulary of bytes."""
  from llm_jax.data.open import Data
  from llm_jax.data.tokenizers.tokenizer import ByteTokenizer
  from llm_jax.training.resolve import resolve
  return resolve(config, Data({'train': {}}, None, len(ByteTokenizer().token_bytes)))


def num_params(config) -> int:
  import jax

  from llm_jax.data.pipeline import example_batch
  from llm_jax.models.registry import make_model
  shapes = jax.eval_shape(make_model(config.model).init, jax.random.key(0), example_batch(config.data))
  return sum(x.size for x in jax.tree.leaves(shapes))


def study_config(model: str, text: str, mlp_dim: int, num_steps: int = 1000, rate: float = RATES[0], seed: int = 0):
  from llm_jax.base.builder import build
  from llm_jax.config import Config, base
  settings = MODELS[model]
  config = base(settings['name'])
  config.model.update(settings | {'embed_dim': 64, 'num_heads': 4, 'mlp_dim': mlp_dim,
                                  'scan_unroll': settings['num_layers']})
  config.update(num_steps=num_steps, seed=seed, batch_tokens=1024, tokens_per_device=1024)
  config.data.update(path=TEXTS[text], split='document', tokenizer='byte', seq_len=256, mask_documents=False)
  config.optim.learning_rate = rate
  config.optim.warmup_cosine.warmup_steps = max(1, num_steps // 20)
  config.eval.update(every=num_steps, max_tokens=1 << 16, sample_tokens=0)
  config.checkpoint.every = num_steps
  return build(Config, config.to_dict())


def equal_mlp_dims() -> dict[str, int]:
  """mlp_dim by model; the number of parameters is linear in it."""
  def size(model: str, mlp_dim: int) -> int:
    return num_params(resolved(study_config(model, 'stdlib', mlp_dim)))
  target, dims = size(FIRST, MLP_DIM), {}
  for model in MODELS:
    least, more = size(model, 8), size(model, 16)
    dims[model] = round(8 + 8 * (target - least) / (more - least))
  return dims


def study(folder: Path, num_steps: int, seeds: list[int], texts: list[str], rounds: int) -> None:
  """Trains what is not yet in results.jsonl, and prints the table."""
  from llm_jax.base import runtime
  runtime.prepare()
  folder.mkdir(parents=True, exist_ok=True)
  about = folder / 'about.json'
  if not about.exists():
    about.write_text(json.dumps(measure_models(rounds), indent=1))
  models, results = json.loads(about.read_text()), Results(folder / 'results.jsonl')

  def steps_of(row: str) -> int:
    model, equal_time, _ = STUDIES[row]
    return round(num_steps * models[DECODER]['cpu_ms'] / models[model]['cpu_ms']) if equal_time else num_steps

  def run(row: str, text: str, seed: int, rate: float) -> float:
    model, steps = STUDIES[row][0], steps_of(row)
    key = {'row': row, 'text': text, 'seed': seed, 'rate': rate, 'steps': steps}
    return results.get(key, lambda path: train_once(
        study_config(model, text, models[model]['mlp_dim'], steps, rate, seed), path))

  best: dict[str, float] = {}
  for row in dict.fromkeys(source for _, _, source in STUDIES.values()):
    bits = {rate: run(row, texts[0], seeds[0], rate) for rate in RATES}
    best[row] = min(bits, key=bits.__getitem__)
    print(f'{row}: bits per byte by learning rate {bits}', flush=True)
  bits = {(row, text, seed): run(row, text, seed, best[source])
          for seed in seeds for text in texts for row, (_, _, source) in STUDIES.items()}
  for text in texts:
    print(f'\n{text}\n| model | parameters | learning rate | steps | bits per byte by seed | mean |\n'
          '|---|---|---|---|---|---|')
    for row, (model, _, source) in STUDIES.items():
      by_seed = [bits[row, text, seed] for seed in seeds]
      print(f'| {row} | {models[model]["params"]:,} | {best[source]} | {steps_of(row)} | '
            f'{", ".join(f"{x:.3f}" for x in by_seed)} | {statistics.mean(by_seed):.3f} |')


def measure_models(rounds: int) -> dict[str, dict]:
  """Shape and time of a step, by model. Processor time, as other programs disturb it less than the time on the wall."""
  from benchmarks.loop import bare_step
  dims = equal_mlp_dims()
  configs = {model: resolved(study_config(model, 'stdlib', mlp_dim)) for model, mlp_dim in dims.items()}
  steps, times = {model: bare_step(config) for model, config in configs.items()}, {model: [] for model in configs}
  for n in range(rounds + 1):
    for model, step in steps.items():
      before = time.process_time(), time.perf_counter()
      step(10)
      if n:
        times[model].append((time.process_time() - before[0], time.perf_counter() - before[1]))
  return {model: {'mlp_dim': dims[model], 'params': num_params(configs[model])}
          | {f'{name}_ms': round(100 * statistics.median(taken), 2)
             for name, taken in zip(('cpu', 'wall'), zip(*times[model], strict=True), strict=True)} for model in dims}


class Results:
  """Bits per byte of finished runs, in a file of JSON lines."""

  def __init__(self, path: Path):
    self.path, self.lines = path, []
    if path.exists():
      self.lines = [json.loads(line) for line in path.read_text().splitlines()]

  def get(self, key: dict, make) -> float:
    """The result of `key`; a missing one is made by `make` in a folder for its run."""
    found = next((line for line in self.lines if key.items() <= line.items()), None)
    if found is None:
      start = time.perf_counter()
      bits = make(self.path.parent / f'run{len(self.lines)}')
      found = key | {'bits_per_byte': round(bits, 4), 'seconds': round(time.perf_counter() - start, 1)}
      self.lines.append(found)
      with open(self.path, 'a') as f:
        f.write(json.dumps(found) + '\n')
    return found['bits_per_byte']


def train_once(config, folder: Path) -> float:
  import llm_jax
  last = math.nan
  for metrics in llm_jax.train(config, folder):
    last = metrics.get('val/bits_per_byte', last)
  return last


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/bytes_small.py')
  parser.add_argument('--torch', help='a Python that has torch')
  parser.add_argument('--variants', nargs='+', choices=list(VARIANTS), default=list(VARIANTS)[:2], help='of PyTorch')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--seconds', type=float, default=10, help='seconds for each variant in a round')
  parser.add_argument('--serve', action='store_true', help='time steps on demand: see common.serve')
  parser.add_argument('--study', type=Path, metavar='FOLDER', help='compare with a plain byte decoder; holds the runs')
  parser.add_argument('--num_steps', type=int, default=1000, help='of the study, for the decoder')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the study')
  parser.add_argument('--texts', nargs='+', choices=list(TEXTS), default=list(TEXTS), help='of the study')
  args = parser.parse_args()
  if args.study:
    study(args.study, args.num_steps, args.seeds, args.texts, args.rounds)
    return
  if args.serve:
    serve_ours(args.config)
    return
  sides = {'llm_jax': Side(sys.executable, 'benchmarks.byte_patch', [f'--config={args.config}'], {})}
  if args.torch:
    sides |= {f'PyTorch, {name}': Side(args.torch, 'benchmarks.torch_byte_patch', *VARIANTS[name])
              for name in args.variants}
  for n in range(args.rounds + 1):
    print(f'round {n} of {args.rounds}:', flush=True)
    for name, side in sides.items():
      seconds = side.ask('step', args.seconds)
      side.seconds += seconds if n else []
      print(f'  {name} {1e3 * statistics.median(seconds):.1f} ms', flush=True)
  medians = {name: statistics.median(side.seconds) for name, side in sides.items()}
  print('\n| variant | parameters | ms a step | least | steps | bytes/s | speed of llm_jax over it |',
        '|---|---|---|---|---|---|---|', sep='\n')
  for name, side in sides.items():
    print(f'| {name} | {side.about["params"]:,} | {1e3 * medians[name]:.1f} | {1e3 * min(side.seconds):.1f} | '
          f'{len(side.seconds)} | {side.about["tokens"] / medians[name]:,.0f} | '
          f'{medians[name] / medians["llm_jax"]:.2f}x |')
    side.close()
  print(json.dumps({name: side.about | {'step_ms': round(1e3 * medians[name], 1)} for name, side in sides.items()}))


if __name__ == '__main__':
  main()
