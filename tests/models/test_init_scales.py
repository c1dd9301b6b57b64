"""Initial scales by part: each field moves its own parameters, in proportion, and nothing else."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import test_decoder
import test_encdec

from llm_jax.base.builder import build
from llm_jax.base.errors import ConfigError
from llm_jax.base.trees import path_of
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.registry import make_model

DECODER = dataclasses.replace(test_decoder.TINY, tie_embeddings=False)
ENCDEC = dataclasses.replace(test_encdec.TINY, tie_embeddings=False, encoder_vocab_size=23)
BATCHES = {'decoder': test_decoder.batch(test_decoder.TOKENS), 'encdec': test_encdec.batch()}
TABLES = {'embed/w', 'positions/w', 'encoder_embed/w', 'encoder_positions/w'}
both = pytest.mark.parametrize('cfg', [DECODER, pytest.param(ENCDEC, marks=pytest.mark.slow)],
                               ids=lambda cfg: cfg.name)


@functools.cache
def params(cfg):
  leaves = nn.unbox(jax.jit(make_model(cfg).init)(jax.random.key(0), BATCHES[cfg.name]))['params']
  return {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(leaves)}


@both
@pytest.mark.parametrize(('field', 'mine'), [
    ('embed_init_std', TABLES.__contains__), ('readout_init_std', 'head/w'.__eq__),
    ('init_std', lambda name: name.endswith('w') and name not in TABLES | {'head/w'})])
def test_each_scale_changes_only_its_own_parameters(cfg, field, mine):
  std = cfg.init_std
  before = params(dataclasses.replace(cfg, embed_init_std=std, readout_init_std=std))
  after = params(dataclasses.replace(cfg, **{'embed_init_std': std, 'readout_init_std': std, field: 4 * std}))
  assert any(map(mine, before))
  for name, x in before.items():
    np.testing.assert_array_equal(after[name], 4 * x if mine(name) else x, err_msg=name)  # 4 is a power of two


@both
def test_unset_scales_default_to_init_std(cfg):
  open_, named = params(cfg), params(dataclasses.replace(cfg, embed_init_std=0.02, readout_init_std=0.02))
  for name, x in open_.items():
    np.testing.assert_array_equal(named[name], x)
  assert open_['embed/w'].std() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize('name', ['decoder', 'encdec'])
@pytest.mark.parametrize(('values', 'words'), [
    ({'embed_init_std': 0.0}, 'embed_init_std must be positive; got 0.0'),
    ({'tie_embeddings': False, 'readout_init_std': -1.0}, 'readout_init_std must be positive'),
    ({'readout_init_std': 0.1}, 'tie_embeddings the readout is the embedding: set embed_init_std')])
def test_invalid_scales_are_reported(name, values, words):
  with pytest.raises(ConfigError, match=words):
    build({'decoder': DecoderConfig, 'encdec': type(ENCDEC)}[name], values)
