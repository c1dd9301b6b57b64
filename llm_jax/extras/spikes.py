"""The filter skip_spikes leaves out steps whose loss or gradient norm is far above those of the steps before; the
callback rewind_spikes goes back to an earlier checkpoint after several of them.

  --config.optim.chain=skip_spikes,clip_by_global_norm,adamw
  --config.log.callbacks=rewind_spikes --config.log.rewind_spikes.steps=100
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llm_jax.base.batch import Metrics, Params
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.errors import ConfigError, DivergedError
from llm_jax.base.ranges import positive, ranged
from llm_jax.base.registry import register
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link
from llm_jax.training.rewind import read_journal

LEAST_SCALE = 0.01  # of the median: a curve of almost equal values has no spikes below threshold * 1 %


class SpikeState(NamedTuple):
  """The window, and what was decided on the newest step."""

  seen: jax.Array  # float32 [2, window]: losses and gradient norms, as a ring
  spikes: jax.Array  # int32 [window]: 1 for each of these steps that was a spike
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
      return SpikeState(jnp.zeros((2, self.window)), jnp.zeros(self.window, jnp.int32), zero, jnp.zeros(()), zero, zero)

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))

  def judge(self, state: Any, loss: jax.Array, grad_norm: jax.Array) -> tuple[jax.Array, Any]:
    x = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    finite, full = jnp.all(jnp.isfinite(x)), state.num_seen >= self.window
    median = jnp.median(state.seen, axis=1)
    deviation = 1.4826 * jnp.median(jnp.abs(state.seen - median[:, None]), axis=1)
    scale = jnp.maximum(jnp.maximum(deviation, LEAST_SCALE * jnp.abs(median)), jnp.finfo(jnp.float32).tiny)
    score = jnp.where(full & finite, jnp.max((x - median) / scale), 0.0)
    spike = (score > self.threshold).astype(jnp.int32)
    place = state.num_seen % self.window
    seen = jnp.where(finite, state.seen.at[:, place].set(x), state.seen)
    spikes = jnp.where(finite, state.spikes.at[place].set(spike), state.spikes)
    return spike == 0, SpikeState(seen, spikes, state.num_seen + finite, score, spike, state.total + spike)

  def report(self, state: Any) -> Metrics:
    return {'spike_score': state.score, 'spike': state.spike, 'spikes': state.total,
            'recent_spikes': jnp.sum(state.spikes)}


class RewindSpikes:
  """Goes back at least `steps` steps, without the batches used since, when the filter's window has `spikes` spikes.

  PaLM's authors went back about 100 steps and left out 200 to 500 batches (arXiv 2204.02311, section 5.1). It looks at
  logged steps, and 20 skipped steps in a row end a run, so keep log.every below 20. After `most` rewinds the next one
  raises DivergedError; those of earlier launches, and of the run that a branch began from, count too.
  """

  def __init__(self, steps: int = 100, spikes: int = 3, most: int = 10):
    for name, value in (('steps', steps), ('spikes', spikes), ('most', most)):
      if value < 1:
        raise ConfigError(f'config.log.rewind_spikes.{name}: must be at least 1; got {value}')
    self._steps, self._spikes, self._most = steps, spikes, most

  def __call__(self, event: Any) -> None:
    if 'train/recent_spikes' not in event.metrics:
      raise ConfigError('config.log.callbacks: rewind_spikes needs the filter skip_spikes in config.optim.chain')
    recent = int(event.metrics['train/recent_spikes'])
    if recent < self._spikes:
      return
    why = f'{recent} spikes in the last {event.session.config.optim.section("skip_spikes").window} steps'
    if len(read_journal(event.session.checkpoints.workdir)['rewinds']) >= self._most:
      raise DivergedError(f'step {event.step}: {why}, after {self._most} rewinds; lower '
                          'config.optim.learning_rate, or raise config.log.rewind_spikes.most')
    event.rewind(self._steps, why)


register(TRANSFORMS, 'skip_spikes', SkipSpikes)
register(CALLBACKS, 'rewind_spikes', RewindSpikes)
