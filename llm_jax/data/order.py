"""Which row comes when: epoch after epoch, each a permutation of all rows, known at any place without those before."""

from __future__ import annotations

import functools
import math

import numpy as np

BLOCK = 4096  # places worked out together, as NumPy costs by the call
VERSION = 2  # 1 was Grain's index_shuffle: a run goes on only in the order that it began with
ROUNDS = 8  # from which on permutations of 6 are equally frequent
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, as SplitMix64 takes it


def order(positions: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
  """int64 [n]: the rows at these positions, int64 [n] from 0 on, of the endless order."""
  blocks, places = np.divmod(positions, BLOCK)
  rows = np.empty_like(positions)
  for block in set(blocks.tolist()):
    at = blocks == block
    rows[at] = _block(block, num_rows, seed)[places[at]]
  return rows


@functools.lru_cache(maxsize=256)
def _block(number: int, num_rows: int, seed: int) -> np.ndarray:
  epochs, places = np.divmod(np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.uint64), np.uint64(num_rows))
  keys = scrambled(scrambled(np.array([seed % 2**64], np.uint64)) + epochs)
  return permuted(places, num_rows, keys).astype(np.int64)


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
  """uint64 [n]: where places, below `size`, go in the permutations named by keys, uint64 [n].

  A Feistel network on a x b, the next product to `size`; what falls beyond goes through it again (Black and Rogaway,
  Ciphers with Arbitrary Finite Domains, 2002).
  """
  a = math.isqrt(size - 1) + 1
  b = -(-size // a)
  left, right = np.divmod(places, np.uint64(b))
  for i in range(ROUNDS):
    left = (left + scrambled(right + scrambled(keys + np.uint64(2 * i)))) % np.uint64(a)
    right = (right + scrambled(left + scrambled(keys + np.uint64(2 * i + 1)))) % np.uint64(b)
  result = left * np.uint64(b) + right
  beyond = np.flatnonzero(result >= size)
  if len(beyond):
    result[beyond] = permuted(result[beyond], size, keys[beyond])
  return result


def scrambled(x: np.ndarray) -> np.ndarray:
  """SplitMix64's output (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014) at uint64 x."""
  x = (x + np.uint64(1)) * np.uint64(GOLDEN)
  x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return x ^ x >> np.uint64(31)
