"""Results of simple baselines on the validation part of a config with a task other than next_token.

  python -m benchmarks.baselines --config=configs/package.py

For classes: the most frequent one, and naive Bayes over the tokens of a document (add-one smoothing). For numbers:
their mean, a line through log2 of the length, and ridge regression on log(1 + count) of every token. For pairs: cosines
of tf-idf vectors. For masked tokens: the most frequent one, and the most frequent between the same two neighbours.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict

import numpy as np

from llm_jax.config_file import open_config
from llm_jax.data import pipeline
from llm_jax.data.open import open_data, open_examples
from llm_jax.extras.labels import macro_means
from llm_jax.infer.score import num_eval_rows
from llm_jax.losses.config import make_objective


def main():
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--config', required=True)
  config = open_config(flags.parse_args().config).resolve({}, cpu_only=True)
  data = open_data(config.data)
  train, val = (open_examples(config.data, data, next(iter(split.values())), train=False)
                for split in (data.train, data.val))
  size = data.vocab_size + 2
  num_rows = num_eval_rows(config, make_objective(config.loss), 1)
  results = BASELINES[config.data.task](features(train), features(val), size, num_rows)
  print(json.dumps(results, indent=2))


def features(examples) -> dict[str, np.ndarray]:
  rows = [examples.make(i, np.random.default_rng(i)) for i in range(len(examples))]
  return pipeline.stack(rows)


def counts(tokens: np.ndarray, segments: np.ndarray, size: int) -> np.ndarray:
  """[documents, size]"""
  result = np.zeros((len(tokens), size))
  for row, ids, real in zip(result, tokens, segments > 0, strict=True):
    np.add.at(row, ids[real], 1)
  return result


def classes(train, val, size, num_rows) -> dict:
  del num_rows
  y, wanted, num_classes = train['labels'], val['labels'], int(train['labels'].max()) + 1
  x = counts(train['tokens'], train['segment_ids'], size)
  priors = np.bincount(y, minlength=num_classes) / len(y)
  tokens = np.stack([x[y == c].sum(0) + 1 for c in range(num_classes)])
  log_p = np.log(tokens / tokens.sum(1, keepdims=True))
  scores = np.log(priors) + counts(val['tokens'], val['segment_ids'], size) @ log_p.T
  guesses = {'commonest': np.full(len(wanted), priors.argmax()), 'naive bayes': scores.argmax(1)}
  results = {}
  for name, guess in guesses.items():
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (wanted, guess), 1)
    results[name] = {'accuracy': np.mean(guess == wanted), **macro_means(confusion)}
  return results


def numbers(train, val, size, num_rows) -> dict:
  del num_rows
  y, wanted = train['labels'], val['labels']
  x, z = (np.log1p(counts(part['tokens'], part['segment_ids'], size)) for part in (train, val))
  lengths, val_lengths = (np.log2((part['segment_ids'] > 0).sum(1)) for part in (train, val))
  slope, offset = np.polyfit(lengths, y, 1)
  centre = x.mean(0)
  ridge = np.linalg.solve((x - centre).T @ (x - centre) + 10 * np.eye(size), (x - centre).T @ (y - y.mean()))
  guesses = {'mean': np.full(len(wanted), y.mean()), 'line through log2 of the length': slope * val_lengths + offset,
             'ridge over tokens': (z - centre) @ ridge + y.mean()}
  spread = np.mean((wanted - wanted.mean()) ** 2)
  return {name: {'mae': float(np.abs(guess - wanted).mean()), 'r2': float(1 - np.mean((guess - wanted)**2) / spread)}
          for name, guess in guesses.items()}


def pairs(train, val, size, num_rows) -> dict:
  sides = [counts(part[name], part[segments], size) for part in (train, val)
           for name, segments in (('tokens', 'segment_ids'), ('encoder_tokens', 'encoder_segment_ids'))]
  idf = np.log(2 * len(train['tokens']) / (1 + sum((x > 0).sum(0) for x in sides[:2])))
  a, b = (np.log1p(x) * idf for x in sides[2:])
  a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (a, b))
  places = [int((sims > sims[i]).sum() + (sims[:i] == sims[i]).sum()) for begin in range(0, len(a), num_rows)
            for i, sims in enumerate(a[begin:begin + num_rows] @ b[begin:begin + num_rows].T)]
  return {'tf-idf': {'accuracy': np.mean(np.array(places) < 1), 'mrr': np.mean(1 / (1 + np.array(places)))},
          'chance': {'accuracy': 1 / num_rows}, 'rows compared': num_rows}


def masked(train, val, size, num_rows) -> dict:
  del size, num_rows
  between, single = defaultdict(Counter), Counter()
  for ids, real in zip(train['targets'], train['segment_ids'] > 0, strict=True):
    row = ids[real].tolist()
    single.update(row)
    for left, middle, right in zip(row, row[1:], row[2:], strict=False):
      between[left, right][middle] += 1
  commonest = single.most_common(1)[0][0]
  hits, told = Counter(), 0
  for shown, truth, mask, real in zip(val['tokens'], val['targets'], val['loss_mask'], val['segment_ids'], strict=True):
    for i in np.flatnonzero(mask).tolist():
      told += 1
      inside = 0 < i < len(shown) - 1 and real[i + 1] > 0
      found = between.get((int(shown[i - 1]), int(shown[i + 1]))) if inside else None
      hits['commonest'] += commonest == truth[i]
      hits['between the same neighbours'] += (found.most_common(1)[0][0] if found else commonest) == truth[i]
  return {name: {'accuracy': count / told} for name, count in hits.items()}


BASELINES = {'classification': classes, 'regression': numbers, 'pairs': pairs, 'masked_tokens': masked}

if __name__ == '__main__':
  main()
