"""Refinement of a latent by steps with shared weights: a fixed number of steps, or adaptive for each position.

Dims: B batch, M positions, D embed.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.models.blocks import make_einsum, make_mlp, make_norm

EPSILON = 0.01  # a position stops when less than this probability remains (arXiv 1603.08983)


class Think(nn.Module):
  """z + sigmoid(gate(norm z)) * mlp(norm z), thinking_steps times.

  With `halting`, the result is the mean over steps weighted by the probability of stopping at each.
  """

  cfg: Any  # has thinking_steps, halting, ponder_cost, and the fields for norm, mlp and matrices

  def setup(self):
    cfg = self.cfg
    if not cfg.thinking_steps:
      return
    out_init = nn.initializers.normal(cfg.init_std / max(1, cfg.thinking_steps) ** 0.5)
    self.norm = make_norm(cfg)()
    self.mlp = make_mlp(cfg, out_init)
    self.gate = make_einsum(cfg)(shape=(cfg.embed_dim, cfg.embed_dim), axes=('embed', 'gate'), bias_dims=1)
    if cfg.halting:
      self.halt = make_einsum(cfg)(shape=(cfg.embed_dim, 1), axes=('embed', 'norm'), bias_dims=1)

  def __call__(self, z_BMD: jax.Array) -> jax.Array:
    """Sows the relative move and gate of each step into `intermediates`, and the cost of halting into `losses`."""
    cfg = self.cfg
    steps, left_BM = [], jnp.ones(z_BMD.shape[:2])
    mean_BMD, ponder_BM = jnp.zeros_like(z_BMD), jnp.zeros(z_BMD.shape[:2])
    for n in range(cfg.thinking_steps):
      before_BMD, h_BMD = z_BMD, self.norm(z_BMD)
      gate_BMD = jax.nn.sigmoid(self.gate('BTD,DE->BTE', h_BMD))
      z_BMD = before_BMD + gate_BMD * self.mlp(h_BMD)
      steps.append({'move': jnp.linalg.norm(z_BMD - before_BMD, axis=-1) / jnp.linalg.norm(before_BMD, axis=-1),
                    'gate': gate_BMD.mean(-1)})
      if cfg.halting:
        p_BM = jax.nn.sigmoid(self.halt('BTD,DE->BTE', self.norm(z_BMD))[..., 0])
        last = n == cfg.thinking_steps - 1
        weight_BM = jnp.where((left_BM - p_BM < EPSILON) | last, left_BM, p_BM)
        # The number of steps plus the remainder; only the remainder has a gradient.
        ponder_BM += (left_BM > 0) + jnp.where(weight_BM == left_BM, left_BM, 0.0)
        mean_BMD += weight_BM[..., None] * z_BMD
        left_BM -= weight_BM
    if steps:
      self.sow('intermediates', 'steps', jax.tree.map(lambda *x: jnp.stack(x), *steps))
      self.sow('metrics', 'move', jnp.stack([step['move'].mean() for step in steps]))
    if cfg.halting:
      self.sow('losses', 'ponder', cfg.ponder_cost * ponder_BM.mean())
      self.sow('metrics', 'ponder', ponder_BM.mean())
    return mean_BMD if cfg.halting else z_BMD
