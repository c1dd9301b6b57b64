"""Layers. Of matrices there are several kinds, by name: add one with a class and a line in EINSUMS."""

from collections.abc import Callable
from functools import partial
from typing import Any

from llm_jax.layers.bitnet import BitEinsum, PackedEinsum
from llm_jax.layers.linear import Einsum

EINSUMS: dict[str, Callable[[Any], Callable[..., Einsum]]] = {  # of a model's config
    'full': lambda cfg: Einsum,
    'bitnet': lambda cfg: partial(BitEinsum, bitnet=cfg.bitnet),
    'packed': lambda cfg: partial(PackedEinsum, bitnet=cfg.bitnet),  # of exported models; it cannot be trained
}
