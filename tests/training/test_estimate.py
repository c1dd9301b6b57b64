"""Estimates of a step's memory, and what a run says where it does not fit."""

import dataclasses

import pytest

from llm_jax.base.errors import ConfigError
from llm_jax.base.target import Target
from llm_jax.training.estimate import Estimate, activation_bytes, check_fits

GIB = 2**30
STEP = Estimate(parameters=2 * GIB, optimizer=4 * GIB, gradients=2 * GIB, copies=GIB, activations=3 * GIB, logits=GIB)


def target(memory, platform='gpu'):
  return Target(platform, 'a kind', (), planned_memory=memory, is_here=False)


def test_what_fits_or_is_unknown_gives_no_warning():
  assert not check_fits(STEP, target(14 * GIB)) and not check_fits(STEP, target(None))


def test_a_step_that_does_not_fit_gives_a_warning_with_what_to_set():
  warning = check_fits(STEP, target(12 * GIB))
  assert '13.00 GiB' in warning and '--config.tokens_per_device=None' in warning


def test_a_state_that_does_not_fit_is_an_error():
  with pytest.raises(ConfigError, match=r'8\.00 GiB of the 7\.00 GiB of a device; shard them'):
    check_fits(STEP, target(7 * GIB))


def test_policies_of_remat_keep_less_and_less():
  from llm_jax.models.decoder_config import DecoderConfig
  model = DecoderConfig(vocab_size=256, dtype='float32')
  sizes = [activation_bytes(dataclasses.replace(model, remat=remat), 1024, 1)
           for remat in ('none', 'save_matmuls', 'save_attention', 'full', 'offload')]
  assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
