"""The few types that every floor shares: Batch and the model protocol."""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

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
  prefix_mask: jax.Array | None = None  # int32 [B, T]: 1 on a prefix, which a model may attend in both directions
  encoder_tokens: jax.Array | None = None  # int32 [B, S]
  encoder_segment_ids: jax.Array | None = None  # int32 [B, S]
  labels: jax.Array | None = None  # [B] or [B, C], for heads that do not predict tokens

  @property
  def num_tokens(self) -> jax.Array:
    """How many tokens are read: all but padding, where segment_ids tell it."""
    return jnp.sum(jnp.ones_like(self.tokens) if self.segment_ids is None else self.segment_ids > 0)


def as_batch(features: dict[str, Any]) -> Batch:
  return Batch(**features)


class LanguageModel(Protocol):
  """What the floors above models/ may ask of a model; a Flax module bound or through `apply(method=...)`."""

  cfg: Any  # has vocab_size, max_len, longest_prompt, flops_per_token(seq_len), positions_of(seq_len), ...
  reads: frozenset[str]  # features of a Batch that it looks at
  needs: frozenset[str]  # of these the ones that not every task gives
  prompt_in_row: bool  # whether a prompt takes room in the row that it is answered in

  def __call__(self, batch: Batch, *, train: bool = False) -> jax.Array:
    """Logits, float32 [B, T, V]."""
    ...

  def readout(self, batch: Batch, *, train: bool = False) -> Any:
    """The same as a losses.Readout, not yet multiplied out."""
    ...

  def init_cache(self, batch_size: int, max_len: int) -> Cache:
    """An empty cache for rows of at most `max_len` tokens: leaves [L, B, ...] in cache['layers'], else [B, ...]."""
    ...

  def prefill(self, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads right-padded prompts; logits [B, V] of what follows each, and the cache."""
    ...

  def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads one more token a row; logits [B, V] of what follows, and the cache."""
    ...
