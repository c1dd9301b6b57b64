"""Speed of the data layer: reading random rows from a large token store, and writing a store.

  python benchmarks/data.py [--gigabytes 1] [--folder /tmp/bench]

Reading: tokens/s of one core, for the training pipeline and for the same windows sliced from the raw memory map, in
turn. Writing: MB/s of text per core and peak memory, with one and ten times the data. Prints one JSON line for each.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SEQ_LEN, ROWS = 1024, 32
WRITE = '''
import json, os, sys, time
from pathlib import Path
from llm_jax.data.config import DataConfig
from llm_jax.data.open import open_data
begin, cpu = time.perf_counter(), os.times()
data = open_data(DataConfig(path=sys.argv[1], tokenizer=sys.argv[2], cache_dir=sys.argv[3], split='document'))
wall, used = time.perf_counter() - begin, os.times()
print(json.dumps({'seconds': wall, 'cpu_seconds': used.user + used.system - cpu.user - cpu.system,
                  'peak_mb': int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1e3}))
'''


def feed(folder: Path, gigabytes: float, rounds: int) -> None:
  from llm_jax.data import pipeline
  from llm_jax.data.config import DataConfig
  from llm_jax.data.open import open_data
  path = folder / 'random.bin'
  num_tokens = int(gigabytes * 5e8)
  if not path.exists() or path.stat().st_size != 2 * num_tokens:
    with open(path, 'wb') as f:
      rng = np.random.default_rng(0)
      for begin in range(0, num_tokens, 1 << 24):
        rng.integers(0, 50_000, min(1 << 24, num_tokens - begin), dtype=np.uint16).tofile(f)
  raw = np.memmap(path, np.uint16, mode='r')
  variants = {}
  # Without documents, and with one document per 1,000 tokens or so, including its masks.
  for name, eot_id in (('plain', None), ('documents', 7)):
    config = DataConfig(path=str(path), seq_len=SEQ_LEN, tokenizer='none', mask_documents=eot_id is not None,
                        eot_id=eot_id, cache_dir=str(folder / 'cache'))
    data = open_data(config)
    examples = pipeline.mixed(config, pipeline.train_sources(config, data), lambda step: ROWS * step, 0)
    batches = pipeline.train_batches(examples, lambda n: ROWS * n, np.arange(ROWS))
    variants[name] = lambda n, batches=batches: batches(np.array([n]))
  num_windows = (len(raw) - 1) // SEQ_LEN
  order = np.random.default_rng(1).permutation(num_windows)

  def read_raw(n: int) -> np.ndarray:
    return np.stack([raw[i * SEQ_LEN:i * SEQ_LEN + SEQ_LEN + 1].astype(np.int32)
                     for i in order[n * ROWS:(n + 1) * ROWS]])

  variants['raw memmap'] = read_raw
  rates: dict[str, list[float]] = {name: [] for name in variants}
  for turn in range(rounds):
    for name, batch in variants.items():
      begin = time.process_time()
      for n in range(turn * 100, turn * 100 + 100):
        batch(n)
      rates[name].append(100 * ROWS * SEQ_LEN / (time.process_time() - begin))
  base = statistics.median(rates['raw memmap'])
  for name, values in rates.items():
    rate = statistics.median(values)
    print(json.dumps({'feeding': name, 'gigabytes': gigabytes, 'million_tokens_per_cpu_second': round(rate / 1e6, 1),
                      'share_of_raw': round(rate / base, 3)}), flush=True)


def write(folder: Path, megabytes: int) -> None:
  from llm_jax.data.sources.files import stdlib
  texts = [file.path.read_bytes() for file in stdlib()]
  for tokenizer in ('bpe', 'byte'):
    for times in (1, 10):
      corpus = folder / f'corpus_{times}'
      shutil.rmtree(corpus, ignore_errors=True)
      corpus.mkdir(parents=True)
      size, copy = 0, 0
      while size < megabytes * 1e6 * times:
        for i, text in enumerate(texts):
          (corpus / f'{copy:03}_{i:04}.py').write_bytes(b'# %d\n' % copy + text)
          size += len(text)
        copy += 1
      cache = folder / 'write_cache'
      for fitted in (False, True):  # the second time the tokenizer is cached, and only the store is made
        shutil.rmtree(cache / 'stores', ignore_errors=True)
        done = subprocess.run([sys.executable, '-c', WRITE, str(corpus), tokenizer, str(cache)], check=True, text=True,
                              capture_output=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
        result = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps({'writing': tokenizer, 'megabytes': round(size / 1e6, 1), 'fits_tokenizer': not fitted,
                          'mb_per_second': round(size / 1e6 / result['seconds'], 2),
                          'mb_per_cpu_second': round(size / 1e6 / result['cpu_seconds'], 2),
                          'peak_mb': round(result['peak_mb'])}), flush=True)
      shutil.rmtree(corpus)
      shutil.rmtree(cache)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--gigabytes', type=float, default=1.0)
  parser.add_argument('--megabytes', type=int, default=12, help='of text to write, and ten times that')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--folder', type=Path, default=Path('/tmp/llm_jax_bench'))
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  feed(args.folder, args.gigabytes, args.rounds)
  write(args.folder, args.megabytes)
