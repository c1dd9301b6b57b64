"""The filter skip_spikes: steps whose loss or gradient norm is far above those of the steps before are not applied."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.ranges import positive, ranged
from llm_jax.base.registry import register
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link

LEAST_SCALE = 0.01  # of the median: a curve of almost equal values has no spikes below threshold * 1 %


class SpikeState(NamedTuple):
  """The window, and what was decided on the newest step."""

  seen: jax.Array  # float32 [2, window]: losses and gradient norms, as a ring
  num_seen: jax.Array  # int32: finite steps seen
  score: jax.Array  # float32: the newest step's larger z-score
  spike: jax.Array  # int32: 1 if that is a spike
  total: jax.Array  # int32: spikes so far


@dataclasses.dataclass(frozen=True)
class SkipSpikes(Link):
  """Skips a step whose loss or gradient norm has a robust z-score above `threshold`.

  z = (x - median) / (1.4826 median |x - median|) over the last `window` finite steps, skipped ones included, so that a
  lasting change of level is accepted in the end. Nothing is skipped before the window is full.
  """

  window: int = ranged(128, lambda x: 8 <= x <= 10_000, 'from 8 to 10000')  # steps
  threshold: float = positive(6.0)  # z-score, in standard deviations of a normal distribution
  place = 'filter'

  def make(self, schedule: optax.Schedule, info: Params) -> optax.GradientTransformation:
    def init(params: Params) -> SpikeState:
      zero = jnp.zeros((), jnp.int32)
      return SpikeState(jnp.zeros((2, self.window)), zero, jnp.zeros(()), zero, zero)

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))

  def judge(self, state: Any, loss: jax.Array, grad_norm: jax.Array) -> tuple[jax.Array, Any]:
    x = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    finite, full = jnp.all(jnp.isfinite(x)), state.num_seen >= self.window
    median = jnp.median(state.seen, axis=1)
    deviation = 1.4826 * jnp.median(jnp.abs(state.seen - median[:, None]), axis=1)
    scale = jnp.maximum(jnp.maximum(deviation, LEAST_SCALE * jnp.abs(median)), jnp.finfo(jnp.float32).tiny)
    score = jnp.where(full & finite, jnp.max((x - median) / scale), 0.0)
    spike = (score > self.threshold).astype(jnp.int32)
    seen = jnp.where(finite, state.seen.at[:, state.num_seen % self.window].set(x), state.seen)
    return spike == 0, SpikeState(seen, state.num_seen + finite, score, spike, state.total + spike)

  def report(self, state: Any) -> Metrics:
    return {'spike_score': state.score, 'spike': state.spike, 'spikes': state.total}


register(TRANSFORMS, 'skip_spikes', SkipSpikes)
