"""The bytes that a chip must send in a step, by what it sends."""

from __future__ import annotations

import jax

from llm_jax.extras.plan.building import Built
from llm_jax.layers.pipeline import num_ticks


def ideal(built: Built, num_microbatches: int) -> dict[str, float]:
  """Bytes that a chip must send in a step by use, in bfloat16 and rings, as "How to Scale Your Model" (Austin, 2025)
  counts. The embedding is not tied to the readout.

  A pass is one group of layers at work on one microbatch: each microbatch in turn, or with stages each tick of the
  pipeline. Dims of the mesh: S stage, D data, F fsdp, C context, T tensor; P devices that share weights.
  """
  config, model = built.config, built.config.model
  S, D, F, C, T = (built.mesh.shape[name] for name in ('stage', 'data', 'fsdp', 'context', 'tensor'))
  M, R, P, again = num_microbatches, config.mesh.repeats, F * C, model.remat == 'full'
  params = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in built.abstract.params.items()}
  layers, outside = params['blocks'], sum(params.values()) - params['blocks']
  passes, depth = num_ticks(S, R, M), model.num_layers / (S * R)
  tokens = config.batch_tokens / (S * D * P * M)  # of a microbatch on a device that has all their columns and heads
  stream, queries, keys = (2 * tokens * size for size in (
      model.embed_dim, model.num_heads * model.H / T, 2 * model.K * model.H / T))
  part = lambda n: (n - 1) / n  # noqa: E731 (of an array that a chip sends when n chips gather it)
  found = {
      # Gathered forward and backward, and their gradients scattered.
      'weights': 3 * part(P) * 2 * layers / (S * R * T) * passes,
      # Gathered once for forward and backward, and its gradient scattered; once for all rows that pass through stages.
      'readout': 2 * part(P) * 2 * params['head'] / T * (1 if S > 1 else M),
      # Columns of embeddings for parts of rows and rows, and their gradients back.
      'lookups': 2 * part(P) * stream / T * M,
      # All-reduced once: of the layers over data, of what is outside them over stage too.
      'gradients': 2 * 2 * (part(D) * layers / S + part(D * S) * outside) / (P * T),
      # Gathered and scattered twice forward and twice backward; to recompute a layer all but the last one again.
      'activations': part(T) * stream * (8 + 3 * again) * depth * passes,
      # Embeddings summed and what is read out gathered, forward and backward.
      'ends': 4 * part(T) * stream * M,
      # A result, a row on its way to the first stage and one from the last, forward and backward.
      'stages': 6 * stream / T * passes if S > 1 else 0.0}
  # Half of the queries and of attention's outputs, forward, again and backward.
  exchanged = (2 + again) * 2 * queries / 2
  if config.mesh.context_attention == 'all_gather':
    moved = 3 * (C - 1) * keys  # gathered forward and backward, and their gradients scattered
  else:
    moved = (2 + again) * keys / 2  # half of keys and values, as of queries
    moved += ((2 + again) * (C - 1) - again) * keys  # hops of them forward, again and backward, which share the first
    moved += C * 2 * keys  # hops of their gradients, in float32
  found['attention'] = (exchanged + moved) * depth * passes if C > 1 else 0.0
  return found
