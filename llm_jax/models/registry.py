"""The registry of models, and the module for a config."""

from __future__ import annotations

from typing import Any, cast

from llm_jax.base.registry import Registry, register
from llm_jax.models.decoder import Decoder
from llm_jax.models.decoder_config import DecoderConfig
from llm_jax.models.heads import WithHeads
from llm_jax.models.protocol import LanguageModel, adapt_model, as_language_model

# A Flax module and its config: LanguageModels (see models/protocol.py) or modules that map tokens to logits.
MODELS = Registry('model', adapt_model)
register(MODELS, 'decoder', Decoder, DecoderConfig)


def make_model(config: Any, heads: tuple[tuple[str, int], ...] = (), num_weights: int = 0,
               module: Any = None) -> LanguageModel:
  """The LanguageModel for a config's model section, or around a given `module`; with the heads that losses need."""
  model = as_language_model(MODELS[config.name](config) if module is None else module, config)
  return cast(LanguageModel, WithHeads(model, heads, num_weights)) if heads or num_weights else model
