"""Models by name: add one with a file here and a line in MODELS."""

from typing import Any

import flax.linen as nn

from llm_jax.models.byte_patch import BytePatch, BytePatchConfig
from llm_jax.models.decoder import Decoder, DecoderConfig
from llm_jax.models.encdec import EncDec, EncDecConfig
from llm_jax.models.heads import WithHeads

MODELS: dict[str, tuple[type[nn.Module], type]] = {
    'decoder': (Decoder, DecoderConfig),
    'byte_patch': (BytePatch, BytePatchConfig),
    'encdec': (EncDec, EncDecConfig),
}


def make_model(config: Any, heads: tuple[tuple[str, int], ...] = (), num_weights: int = 0) -> Any:
  """The module that a config of one of MODELS describes, a LanguageModel; with what its losses need, if anything."""
  trunk = MODELS[config.name][0](config)
  return WithHeads(trunk, heads, num_weights) if heads or num_weights else trunk
