"""Speed of each tokenizer on the standard library's source, and of Hugging Face's with the file of bpe.

  python benchmarks/tokenizing.py --rounds 5

All are timed in turn. One JSON line each: median MB/s of wall-clock time on all cores; MB of text per second of
processor time, which is MB/s per core; the median ratio of both to Hugging Face's; bytes per token; seconds to fit. The
last line is the peak memory of the process, including the corpus.
"""

import argparse
import json
import resource
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import tokenizers

from llm_jax.data.tokenizers.tokenizer import TOKENIZERS, TokenizerConfig


def corpus() -> list[str]:
  root = Path(sysconfig.get_paths()['stdlib'])
  files = [path for path in sorted(root.rglob('*.py')) if not {'site-packages', 'test', 'tests'} & {*path.parts}]
  return [path.read_text(encoding='utf-8') for path in files]


def timed(encode, texts: list[str]) -> tuple[float, float]:
  """Seconds of wall-clock and processor time."""
  wall, cpu = time.perf_counter(), time.process_time()
  encode(texts)
  return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--vocab_size', type=int, default=8192)
  args = parser.parse_args()
  texts = corpus()
  megabytes = sum(len(text.encode()) for text in texts) / 1e6
  encoders, about = {}, {}
  for name in ('byte', 'char', 'word', 'bpe'):
    start = time.perf_counter()
    tokenizer = TOKENIZERS[name].fit(iter(texts), TokenizerConfig(vocab_size=args.vocab_size))
    fit_s = time.perf_counter() - start
    num_tokens = sum(map(len, tokenizer.encode(texts)))
    encoders[name] = tokenizer.encode
    about[name] = {'fit_s': round(fit_s, 2), 'bytes_per_token': round(megabytes * 1e6 / num_tokens, 2)}
  library = tokenizers.Tokenizer.from_str(tokenizer.to_json())  # bpe
  encoders['huggingface'] = lambda texts: library.encode_batch_fast(texts, add_special_tokens=False)
  times = {name: [] for name in encoders}
  for _ in range(args.rounds):
    for name, encode in encoders.items():
      times[name].append(timed(encode, texts))
  for name, rounds in times.items():
    wall, cpu = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    ratios = [statistics.median(theirs[i] / ours[i] for ours, theirs in zip(rounds, times['huggingface'], strict=True))
              for i in (0, 1)]
    print(json.dumps({
        'tokenizer': name, 'mb': round(megabytes, 2), 'mb_per_s': round(megabytes / wall, 2),
        'mb_per_s_core': round(megabytes / cpu, 2), 'times_huggingface': round(ratios[0], 2),
        'times_huggingface_core': round(ratios[1], 2), **about.get(name, {})}))
  unit = 1 if sys.platform == 'darwin' else 1024
  print(json.dumps({'peak_mb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)}))


if __name__ == '__main__':
  main()
