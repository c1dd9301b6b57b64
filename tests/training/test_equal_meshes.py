"""Every mesh of eight devices trains as one device does."""

import itertools

import jax
import numpy as np
import optax
import pytest
from meshes import train_on

from llm_jax.base.sharding import MESH_AXES
from llm_jax.layers import context
from llm_jax.models.decoder import Decoder
from llm_jax.models.decoder_config import DecoderConfig

B, T, V = 16, 32, 64
SIZES = [dict(zip(MESH_AXES, sizes, strict=True)) for sizes in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES))
         if np.prod(sizes) == 8]
CASES = [(sizes, by) for sizes in SIZES for by in (('all_gather', 'ring') if sizes['context'] > 1 else ('all_gather',))]
QUICK = [({'data': 2, 'fsdp': 2, 'context': 2}, 'ring'), ({'fsdp': 2, 'context': 2, 'tensor': 2}, 'all_gather'),
         ({'stage': 2, 'fsdp': 2, 'context': 2}, 'ring')]


def name_of(case):
  sizes, by = case
  return '-'.join(f'{axis}{size}' for axis, size in sizes.items() if size > 1) + ('-ring' if by == 'ring' else '')


def features(n):
  """Rows of packed documents, with padding at the end of some."""
  rng = np.random.default_rng(n)
  tokens = rng.integers(0, V, (B, T + 1), np.int32)
  segments = np.cumsum(rng.random((B, T)) < 0.1, axis=1, dtype=np.int32) + 1
  segments[: B // 2, -3:] = 0
  begins = np.diff(segments, axis=1, prepend=-1) != 0
  starts = np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_mask': (segments > 0).astype(np.float32),
          'positions': (np.arange(T) - starts).astype(np.int32), 'segment_ids': segments}


def train(sizes, by='all_gather', **fields):
  cfg = DecoderConfig(**{'vocab_size': V, 'max_len': T, 'num_layers': 2, 'embed_dim': 32, 'num_heads': 8,
                         'head_dim': 8, 'mlp_dim': 64, 'mlp': 'swiglu', 'norm': 'rms_norm', 'positions': 'rope',
                         'dtype': 'float32', **fields})
  history, state, _ = train_on(sizes, Decoder(cfg), optax.adam(1e-2), features, num_steps=3, num_microbatches=2,
                               mesh_fields={'context_attention': by})
  return [step['loss'] for step in history], jax.device_get(state.params)


def check(case, **fields):
  sizes, by = case
  fields |= {'num_kv_heads': max(4, sizes.get('tensor', 1)), 'num_layers': max(2, sizes.get('stage', 1))}
  losses, params = train(sizes, by, **fields)
  expected, expected_params = train({'data': 1}, **fields)
  np.testing.assert_allclose(losses, expected, atol=1e-5)
  for x, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
    np.testing.assert_allclose(x, wanted, atol=2e-3)  # Adam's first steps enlarge rounding of small gradients


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
  monkeypatch.setattr(context, 'TILE', 4)


@pytest.mark.parametrize('case', QUICK, ids=name_of)
def test_a_mesh_trains_as_one_device(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_every_mesh_of_eight_devices_trains_as_one_device(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{'dropout': 0.2}, {'remat': 'full'}, {'positions': 'learned'}],
                         ids=lambda fields: next(iter(fields)))
def test_a_sharded_length_changes_nothing_else(fields):
  """Random numbers do not depend on the mesh."""
  check(({'fsdp': 2, 'context': 4}, 'ring'), **fields)
