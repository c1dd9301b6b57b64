"""The identity of a sequence of documents: the same whatever files hold them, so that parts can be joined.

A polynomial hash modulo a prime, of the sha256 of each document: h(AB) = h(A) * BASE^len(B) + h(B).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from llm_jax.data.sources.documents import Document

PRIME = 2**255 - 19
BASE = int.from_bytes(hashlib.sha256(b'llm_jax documents').digest(), 'big') % PRIME


def digest(document: Document, parts: Iterable[np.ndarray]) -> int:
  """The hash of one document, or of a piece of one, from the ids of its parts and its label."""
  parts = [_narrow(ids) for ids in parts]
  about = document.continues, document.label, [(len(ids), ids.itemsize) for ids in parts]
  hashed = hashlib.sha256(repr(about).encode())
  for ids in parts:
    hashed.update(ids.data)
  return int.from_bytes(hashed.digest(), 'big')


def _narrow(ids: np.ndarray) -> np.ndarray:
  """The ids in the narrowest type that holds them, whatever type they have, as hashing takes time for each byte."""
  return np.ascontiguousarray(ids, np.min_scalar_type(int(ids.max(initial=0))).newbyteorder('<'))


def joined(first: int, second: int, length: int) -> int:
  """The hash of a sequence and of one of `length` items after it."""
  return (first * pow(BASE, length, PRIME) + second) % PRIME
