"""Which row comes when: epoch after epoch, each a permutation of all rows, known at any place without those before."""

from __future__ import annotations

import functools
import math

import numpy as np

BLOCK = 4096  # places worked out together, as NumPy costs by the call
VERSION = 2  # kept in checkpoints, as a run goes on in one order; 1 was Grain's index_shuffle
ROUNDS = 10  # pairs; with 8, permutations of 6 rows are not yet equally frequent in 600 draws of each
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
  """Rows at the positions of a block, shared by who asks: not to be written to."""
  epochs, places = np.divmod(np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.uint64), np.uint64(num_rows))
  keys = scrambled(scrambled(np.array([seed % 2**64], np.uint64)) + epochs)
  return permuted(places, num_rows, keys).astype(np.int64)


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
  """uint64 [n]: where places, below `size`, go in the permutations named by keys, uint64 [n].

  A Feistel network on a x b, the least multiple of a = ceil(sqrt(size)) that is `size` or more, and even: of an odd
  one it makes even permutations alone. What falls beyond `size` goes through it again (Black and Rogaway, Ciphers with
  Arbitrary Finite Domains, 2002).
  """
  a = math.isqrt(size - 1) + 1
  b = -(-size // a)
  b += a * b % 2
  left, right = np.divmod(places, np.uint64(b))
  for i in range(ROUNDS):
    left = (left + _noise(right, keys, 2 * i)) % np.uint64(a)
    right = (right + _noise(left, keys, 2 * i + 1)) % np.uint64(b)
  result = left * np.uint64(b) + right
  beyond = np.flatnonzero(result >= size)
  if len(beyond):
    result[beyond] = permuted(result[beyond], size, keys[beyond])
  return result


def _noise(half: np.ndarray, keys: np.ndarray, round: int) -> np.ndarray:
  """Below 2**63, so that adding to it never wraps, which would send two places to one."""
  return scrambled(half + scrambled(keys + np.uint64(round))) >> np.uint64(1)


def scrambled(x: np.ndarray) -> np.ndarray:
  """SplitMix64's output (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014) at uint64 x."""
  x = (x + np.uint64(1)) * np.uint64(GOLDEN)
  x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return x ^ x >> np.uint64(31)
