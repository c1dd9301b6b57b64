"""The order of rows: each epoch is a permutation of all rows; any position is computed without those before it."""

from __future__ import annotations

import functools
import math

import numpy as np

BLOCK = 4096  # positions computed at once, because each NumPy call has a fixed cost
VERSION = 2  # stored in checkpoints, because a resumed run must keep its order; 1: Grain's index_shuffle
ROUNDS = 10  # pairs of rounds; with 8, 600 draws per permutation of 6 rows still show unequal frequencies
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: SplitMix64's increment


def order(positions: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
  """Rows, int64 [n], at `positions`, int64 [n] of 0 or more, in the endless sequence of epochs."""
  blocks, places = np.divmod(positions, BLOCK)
  rows = np.empty_like(positions)
  for block in set(blocks.tolist()):
    at = blocks == block
    rows[at] = _block(block, num_rows, seed)[places[at]]
  return rows


@functools.lru_cache(maxsize=256)
def _block(number: int, num_rows: int, seed: int) -> np.ndarray:
  """Rows at the positions of block `number`; cached and shared between callers, so do not write to it."""
  epochs, places = np.divmod(np.arange(number * BLOCK, (number + 1) * BLOCK, dtype=np.uint64), np.uint64(num_rows))
  keys = scrambled(scrambled(np.array([seed % 2**64], np.uint64)) + epochs)
  return permuted(places, num_rows, keys).astype(np.int64)


def permuted(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
  """uint64 [n]: images of `places`, each below `size`, under the permutations that `keys`, uint64 [n], select.

  A Feistel network on a x b values, where a = ceil(sqrt(size)) and b is the smallest with a x b >= `size` and even: if
  a x b were odd, all permutations would be even. Results of `size` or more are permuted again (Black and Rogaway,
  Ciphers with Arbitrary Finite Domains, 2002).
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
  """The round function. It is below 2**63 so that the sum never overflows, which would map two places to one."""
  return scrambled(half + scrambled(keys + np.uint64(round))) >> np.uint64(1)


def scrambled(x: np.ndarray) -> np.ndarray:
  """SplitMix64's output (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014) at uint64 x."""
  x = (x + np.uint64(1)) * np.uint64(GOLDEN)
  x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return x ^ x >> np.uint64(31)
