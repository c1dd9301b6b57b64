"""A plug-in that paces, stalls or poisons a run, as FAULTS in the environment says; without it, it changes nothing.

FAULTS is JSON: {"pace": seconds after each step, "stall": [step, seconds], "only": the rank of these two,
"poison": [place, first step, last step, value]} with a place of PLACES and a value of VALUES.
"""

import dataclasses
import json
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from faults.poison import PLACES, VALUES
from llm_jax.base.callbacks import CALLBACKS
from llm_jax.base.registry import NoSettings, register
from llm_jax.layers import clock
from llm_jax.layers.linear import weight
from llm_jax.layers.norm import NORMS, RMSNorm
from llm_jax.optim.chain import TRANSFORMS
from llm_jax.optim.link import Link

ASKED = json.loads(os.environ.get('FAULTS', '{}'))
HERE = ASKED.get('only') in (None, int(os.environ.get('JAX_PROCESS_ID', '0')))


def pace(event):
  """Sleeps after each step, and once for a long time."""
  if HERE:
    time.sleep(ASKED.get('pace', 0))
    step, seconds = ASKED.get('stall', (-1, 0))
    if event.step == step:
      time.sleep(seconds)


def stored(place, *_):
  """[first step, last step, index of the value] of the poison at a place. In arrays, so that trials share programs."""
  where, first, last, value = ASKED.get('poison', ('', 0, 0, 'nan'))
  return jnp.array([first, last, list(VALUES).index(value)] if where == place else [0, 0, 0], jnp.float32)


def factor(step, poison):
  """The poison's value at its steps, else 1. `step` counts from 1, as metrics do."""
  value = jnp.array(list(VALUES.values()))[poison[2].astype(int)]
  return jnp.where((step >= poison[0]) & (step <= poison[1]), value, 1.0)


@jax.custom_vjp
def with_gradient_times(x, by):
  del by
  return x


with_gradient_times.defvjp(lambda x, by: (x, by), lambda by, dx: (dx * by, jnp.zeros_like(by)))


class PoisonedNorm(nn.Module):
  """RMSNorm whose output, or whose gradient, is multiplied by a value at some steps of training."""

  axis: str = 'norm'

  @nn.compact
  def __call__(self, x):
    y = RMSNorm(self.axis, name='rms')(x)
    forward, backward = (jax.lax.stop_gradient(weight(self, f'poison_{place}', lambda *_, p=place: stored(p), (3,), (
        self.axis,))) for place in PLACES[:2])
    now = clock._STEP.get()
    if now is None:
      return y
    return with_gradient_times(y * factor(now + 1, forward), factor(now + 1, backward))


@dataclasses.dataclass(frozen=True)
class PoisonedUpdate(Link):
  """Multiplies the updates by a value at some steps."""

  place = 'control'

  def make(self, schedule, info):
    del schedule, info

    def update(updates, state, params=None):
      step, poison = state
      return jax.tree.map(lambda u: u * factor(step + 1, poison), updates), (step + 1, poison)

    return optax.GradientTransformation(lambda _: (jnp.zeros((), jnp.int32), stored('update')), update)


register(CALLBACKS, 'pace', pace)
register(NORMS, 'poisoned', lambda settings: PoisonedNorm, NoSettings)
register(TRANSFORMS, 'poisoned_update', PoisonedUpdate)
