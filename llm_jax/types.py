"""The few types that every floor shares: Batch, the model protocol, and errors that a user can act on."""

from __future__ import annotations

import os
from typing import Any, Protocol

import flax.struct
import jax

Params = Any  # nested dict[str, jax.Array]
Cache = Any  # a model's own pytree; opaque above models/
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class Batch:
  """One step of data: B rows of T tokens. Absent features are None (no leaves, no cost)."""

  tokens: jax.Array  # int32 [B, T]: what the model reads
  targets: jax.Array  # int32 [B, T]: what it must predict, already shifted
  loss_mask: jax.Array  # float32 [B, T]: 0 where nothing is learnt
  positions: jax.Array | None = None  # int32 [B, T]: restart at 0 in each document; None: 0..T-1
  segment_ids: jax.Array | None = None  # int32 [B, T]: attention stays inside a segment; None: one segment
  encoder_tokens: jax.Array | None = None  # int32 [B, S]
  encoder_segment_ids: jax.Array | None = None  # int32 [B, S]
  labels: jax.Array | None = None  # [B] or [B, C], for heads that do not predict tokens


class LanguageModel(Protocol):
  """What the floors above models/ may ask of a model; a Flax module bound or through `apply(method=...)`."""

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    """Logits, float32 [B, T, V]."""
    ...

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    """An empty cache for rows of at most `max_len` tokens."""
    ...

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads right-padded prompts; logits [B, V] of what follows each, and the cache."""
    ...

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads one more token a row; logits [B, V] of what follows, and the cache."""
    ...


class UserError(Exception):
  """A mistake that the user can mend: shown as one message without a traceback; the process ends with `exit_code`."""

  exit_code = 1


class ConfigError(UserError):
  """A config that cannot be run, or that does not fit the checkpoint it should go on from."""

  exit_code = os.EX_CONFIG  # 78


class DataError(UserError):
  """Data that is missing, empty, damaged, or not what its description says."""

  exit_code = os.EX_DATAERR  # 65


class StorageError(UserError):
  """A folder or checkpoint that cannot be written or read."""

  exit_code = os.EX_IOERR  # 74


class Interrupted(UserError):
  """A run that was asked to stop and has saved itself: the same command goes on."""

  exit_code = os.EX_TEMPFAIL  # 75


class DivergedError(UserError):
  """A run whose gradients stay non-finite."""

  exit_code = os.EX_SOFTWARE  # 70
