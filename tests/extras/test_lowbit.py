"""Products of 8-bit operands by qwix: near the exact ones, forward and backward, and really of 8 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import train_on
from test_bitnet import CFG
from test_step import OPTIM, features

from llm_jax.extras import lowbit
from llm_jax.extras.lowbit import lowbit_einsum
from llm_jax.models.registry import make_model
from llm_jax.optim.chain import make_optimizer

pytest.importorskip('qwix')
EQN = 'BTD,DNH->BTNH'
KINDS = {'int8': ('int8', '', 'i8', 0.015), 'fp8': ('float8_e4m3fn', 'float8_e5m2', 'f8_e4m3fn', 0.1)}


@pytest.mark.parametrize('kind', KINDS)
def test_products_and_gradients_are_nearly_exact(kind):
  forward, backward, name, error = KINDS[kind]
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((2, 8, 16)).astype(np.float32), rng.standard_normal((16, 4, 6)).astype(np.float32)
  x[0, 0] *= 100  # a row with a scale of its own
  dy = rng.standard_normal((2, 8, 4, 6)).astype(np.float32)

  def both(f):
    y, vjp = jax.vjp(f, jnp.asarray(x), jnp.asarray(w))
    return y, *vjp(jnp.asarray(dy))

  got = both(lambda x, w: lowbit_einsum(EQN, forward, backward, x, w))
  for a, b in zip(got, both(lambda x, w: jnp.einsum(EQN, x, w)), strict=True):
    assert a.shape == b.shape and a.dtype == jnp.float32
    assert np.linalg.norm(a - b) < error * np.linalg.norm(b)
  assert np.linalg.norm((got[0] - jnp.einsum(EQN, x, w))[1]) < error * np.linalg.norm(jnp.einsum(EQN, x, w)[1])
  program = str(jax.make_jaxpr(lambda x, w: lowbit_einsum(EQN, forward, backward, x, w))(x, w))
  assert f'{name}[2,8,16]' in program and f'{name}[16,4,6]' in program


@pytest.mark.parametrize('kind', [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_a_lowbit_model_learns(kind):
  losses = {}
  for einsum in ('full', kind):
    cfg = dataclasses.replace(CFG, einsum=einsum)
    history, _, _ = train_on((1, 1, 1), make_model(cfg), make_optimizer(OPTIM, 20), features, num_steps=12)
    losses[einsum] = history[-1]['loss']
  assert losses[kind] == pytest.approx(losses['full'], rel=0.03)


def test_missing_qwix_is_reported(monkeypatch):
  monkeypatch.setattr(lowbit, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"int8 needs qwix.*: pip install 'llm_jax\[quant\]'"):
    dataclasses.replace(CFG, einsum='int8')
