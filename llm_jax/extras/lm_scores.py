"""Log-likelihoods and continuations of many texts: the arithmetic of lm_harness.py, without the package lm_eval.

Texts are token ids, of which the first is bos, as in training. Rows have few different lengths and a fixed number of
rows for each, so that no request compiles a program of its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.base.batch import Batch
from llm_jax.base.devices import platform
from llm_jax.base.errors import ConfigError
from llm_jax.base.progress import Progress
from llm_jax.base.sharding import constrain, local_rows, num_batch_shards, put_batch
from llm_jax.data.tokenizers.tokenizer import before_eos, decode
from llm_jax.infer import sampling
from llm_jax.infer.load import Loaded
from llm_jax.infer.text import check_writes
from llm_jax.losses.readout import score

ROWS, TOKENS = 32, 8192  # in a batch on one device, at most
LEAST = {'tpu': 128}  # tokens of the shortest rows, by platform: splash attention needs a multiple of 128
SHORTEST = 32  # ... of other platforms
LOOK_EVERY = 8  # generated tokens between two searches for stop strings

Pair = tuple[list[int], list[int]]  # context, of one id at least, and continuation


class Decoding(NamedTuple):
  """How a text is continued."""

  until: tuple[str, ...] = ()  # the text ends before the first of these
  num_tokens: int = 256
  temperature: float = 0.0  # 0: greedy
  top_k: int = 0
  top_p: float = 1.0


class Score(NamedTuple):
  log_p: float  # of all continuation tokens, in nats
  greedy: bool  # whether each of them is the most likely one


def split_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> Pair:
  """(the context's own ids, the ids of the whole text after as many): what lm_eval's models do, to be comparable.

  White space at the end of the context belongs to the continuation. A token that spans the two texts is thus lost or
  moved; the continuation keeps one id at least, unless both texts are empty.
  """
  stem = context.rstrip()
  whole, known = encode(context + continuation), encode(stem)
  cut = max(0, min(len(known), len(whole) - 1))
  return known[:cut], whole[cut:]


def rolling_windows(ids: Sequence[int], first: int, length: int) -> Iterator[Pair]:
  """Pairs whose continuations are all ids, each once, in order; no pair has more than `length` inputs.

  `first` stands before the ids. The inputs of the last pair are as many as fit, so that its few targets have context.
  """
  inputs = [first, *ids]
  for begin in range(0, len(ids), length):
    end = min(begin + length, len(ids))
    yield inputs[max(0, end - length):begin + 1], list(ids[begin:end])


@functools.partial(jax.jit, static_argnames='model')
def score_rows(params: Any, batch: Batch, *, model: Any) -> tuple[jax.Array, jax.Array]:
  """(sum of log p of the targets where loss_mask is 1, whether all of them are the most likely ones) of each row."""
  def scored(module: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    nll_BT, rank_BT = score(module.readout(batch), batch.targets)
    counts_BT = batch.loss_mask > 0
    return -jnp.sum(jnp.where(counts_BT, nll_BT, 0.0), axis=1), jnp.all(~counts_BT | (rank_BT == 0), axis=1)

  log_p_B, greedy_B = model.apply({'params': params}, batch, method=scored)
  return constrain(log_p_B, None), constrain(greedy_B, None)  # all processes get all rows


class Scorer:
  """Scores and continues texts with a run. Call it under use_mesh(mesh, run.config.mesh)."""

  def __init__(self, run: Loaded, mesh: Mesh, workdir: Path = Path('RUN')):
    """Raises ConfigError for a run that does not continue texts."""
    self.tokenizer = check_writes(run.config, run.tokenizer, workdir)
    if not run.model.prompt_in_row:
      raise ConfigError(f'--workdir: {workdir} has an encoder, which reads prompts; tasks need a run that continues '
                        'texts, such as one of model decoder and task next_token')
    self.run, self.mesh, self.max_len = run, mesh, int(run.config.model.max_len or 0)

  @property
  def bos_id(self) -> int:
    return self.tokenizer.bos_id

  @functools.cached_property
  def _variables(self) -> Any:
    return sampling.decode_variables(self.run.model, self.run.params)

  def encode(self, text: str) -> list[int]:
    return [int(i) for i in self.tokenizer.encode([text])[0]]

  def pair(self, context: str, continuation: str) -> Pair:
    before, after = split_pair(self.encode, context, continuation)
    return [self.bos_id, *before], after

  def windows(self, text: str) -> list[Pair]:
    return list(rolling_windows(self.encode(text), self.bos_id, self.max_len))

  def score(self, pairs: Sequence[Pair]) -> list[Score]:
    """The score of each pair, independent of the others. Of a context that does not fit, the end is read.

    A continuation longer than the context length is scored in windows.
    """
    rows, owners = list[Pair](), list[int]()
    for owner, (before, after) in enumerate(pairs):
      parts = [(before, after)] if len(after) <= self.max_len else rolling_windows(after, before[-1], self.max_len)
      for row in parts:
        rows.append(row)
        owners.append(owner)
    totals = [Score(0.0, True)] * len(pairs)
    for place, one in self._scored(rows):
      so_far = totals[owners[place]]
      totals[owners[place]] = Score(so_far.log_p + one.log_p, so_far.greedy and one.greedy)
    return totals

  def generate(self, prompts: Sequence[list[int]], decoding: Decoding, seed: int = 0) -> list[str]:
    """The continuation of each prompt up to a stop string, eos, or num_tokens, but at most half of the context.

    Of a prompt that leaves no room for them, the end is read.
    """
    num_tokens = max(1, min(decoding.num_tokens, self.max_len // 2))
    prompts = [prompt[-(self.max_len - num_tokens):] for prompt in prompts]
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [''] * len(prompts)
    num_rows = self._num_rows(self.max_len)
    with Progress('generating', len(prompts), 'texts', shown=jax.process_index() == 0) as progress:
      for n, places in enumerate(in_parts(order, num_rows)):
        part = [prompts[i] for i in places]
        found = self._continue(part + part[:1] * (num_rows - len(part)), len(part), decoding, num_tokens, seed + n)
        for i, text in zip(places, found, strict=True):
          texts[i] = text
        progress.update(len(part))
    return texts

  def _scored(self, rows: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
    """(index, score) of each row, by length."""
    sizes = [min(self.max_len, len(before) + len(after) - 1) for before, after in rows]
    order = sorted(range(len(rows)), key=lambda i: sizes[i], reverse=True)
    with Progress('scoring', len(rows), 'rows', shown=jax.process_index() == 0) as progress:
      for length, places in itertools.groupby(order, key=lambda i: self._length(sizes[i])):
        num_rows = self._num_rows(length)
        for part in in_parts(list(places), num_rows):
          batch = put_batch(lay_out_pairs([rows[i] for i in part], num_rows, length, self._prefixes),
                            local_rows(self.mesh, num_rows), num_rows, self.mesh)
          log_p, greedy = jax.device_get(score_rows(self.run.params, batch, model=self.run.model))
          progress.update(len(part))
          for i, value, likely in zip(part, log_p.tolist(), greedy.tolist(), strict=False):
            yield i, Score(value, likely)

  @property
  def _prefixes(self) -> bool:
    return bool(getattr(self.run.config.model, 'prefix_attention', False))

  def _length(self, size: int) -> int:
    """The length of the rows that a row of `size` inputs goes to: a power of two, or all that the model has."""
    if not getattr(self.run.model, 'cache_grows', False):  # as sampling.slots_for
      return self.max_len
    least = LEAST.get(platform(), SHORTEST)
    return min(self.max_len, max(least, 1 << max(0, size - 1).bit_length()))

  def _num_rows(self, length: int) -> int:
    return num_batch_shards(self.mesh) * max(1, min(ROWS, TOKENS // length))

  def _continue(self, prompts: list[list[int]], count: int, decoding: Decoding, num_tokens: int,
                seed: int) -> list[str]:
    """The continuations of the first `count` prompts."""
    num_ids, rows, ended = len(self.tokenizer.token_bytes), [list[int]() for _ in range(count)], [''] * count
    open_rows = set(range(count))

    def text_of(i: int) -> tuple[str, bool]:
      ids = before_eos(self.tokenizer, rows[i])
      text = decode(self.tokenizer, ids)
      cuts = [at for stop in decoding.until if stop and (at := text.find(stop)) >= 0]
      return text[:min(cuts, default=len(text))], bool(cuts) or len(ids) < len(rows[i])

    columns = sampling.generate(
        self.run.model, self.run.params, prompts, max_len=self.max_len, num_tokens=num_tokens, seed=seed,
        temperature=decoding.temperature, top_k=min(decoding.top_k, num_ids), top_p=decoding.top_p, num_ids=num_ids,
        variables=self._variables)
    for n, column in enumerate(columns, 1):
      for i in open_rows:
        rows[i].append(int(column[i]))
      if n % LOOK_EVERY == 0 or n == num_tokens:
        for i in list(open_rows):
          ended[i], done = text_of(i)
          if done:
            open_rows.discard(i)
        if not open_rows:
          break
    return ended


def in_parts(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
  """Parts of `size` values; the last may have fewer."""
  return (values[i:i + size] for i in range(0, len(values), size))


def lay_out_pairs(pairs: Sequence[Pair], num_rows: int, length: int, prefixes: bool) -> dict[str, np.ndarray]:
  """Features [num_rows, length] of one pair a row: the newest `length` inputs; the targets of continuations count."""
  tokens, targets = np.zeros((2, num_rows, length), np.int32)
  features = {'tokens': tokens, 'targets': targets, 'loss_mask': np.zeros((num_rows, length), np.float32)}
  if prefixes:
    features['prefix_mask'] = np.zeros((num_rows, length), np.int32)
  for row, (before, after) in enumerate(pairs):
    ids = [*before, *after][-(length + 1):]
    size = len(ids) - 1
    tokens[row, :size], targets[row, :size] = ids[:-1], ids[1:]
    features['loss_mask'][row, size - len(after):size] = 1
    if prefixes:
      features['prefix_mask'][row, :len(ids) - len(after)] = 1
  return features
