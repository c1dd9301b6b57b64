"""Every mesh of eight devices trains as one device does."""

import jax
import numpy as np
import optax
import pytest
from meshes import train_on

from benchmarks.meshes import LENGTH, VOCAB, cases, features
from llm_jax.layers import context
from llm_jax.models.decoder import Decoder
from llm_jax.models.decoder_config import DecoderConfig

CASES = cases()  # fields of config.mesh by name
QUICK = 'fsdp2-context2-tensor2', 'stage2-fsdp2-context2-ring'


def train(mesh, **fields):
  """(losses of three steps, final parameters)."""
  cfg = DecoderConfig(**{'vocab_size': VOCAB, 'max_len': LENGTH, 'num_layers': 2, 'embed_dim': 32, 'num_heads': 8,
                         'head_dim': 8, 'mlp_dim': 64, 'mlp': 'swiglu', 'norm': 'rms_norm', 'positions': 'rope',
                         'dtype': 'float32', **fields})
  history, state, _ = train_on(mesh, Decoder(cfg), optax.adam(1e-2), features, num_steps=3, num_microbatches=2)
  return [step['loss'] for step in history], jax.device_get(state.params)


def check(mesh, **fields):
  fields |= {'num_kv_heads': max(4, mesh['tensor']), 'num_layers': max(2, mesh['stage'])}
  losses, params = train(mesh, **fields)
  expected, expected_params = train({'data': 1}, **fields)
  np.testing.assert_allclose(losses, expected, atol=1e-5)
  for x, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
    np.testing.assert_allclose(x, wanted, atol=2e-3)  # Adam's first steps enlarge rounding of small gradients


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
  monkeypatch.setattr(context, 'TILE', 4)


@pytest.mark.parametrize('name', [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES
                                            if name not in QUICK)])
def test_a_mesh_trains_as_one_device(name):
  check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{'dropout': 0.2}, {'remat': 'full'}, {'positions': 'learned'}],
                         ids=lambda fields: next(iter(fields)))
def test_a_sharded_length_changes_nothing_else(fields):
  """Random numbers do not depend on the mesh."""
  check(CASES['fsdp2-context4-ring'], **fields)
