"""Layers. Of matrices there are several kinds, by name: add one with a class and a line in EINSUMS."""

from collections.abc import Callable
from functools import partial
from typing import Any

from llm_jax.layers.bitnet import BitEinsum, PackedEinsum
from llm_jax.layers.linear import Einsum
from llm_jax.layers.lowbit import LowBitEinsum

EINSUMS: dict[str, Callable[[Any], Callable[..., Einsum]]] = {  # of a model's config
    'full': lambda cfg: Einsum,
    'bitnet': lambda cfg: partial(BitEinsum, bitnet=cfg.bitnet),
    'int8': lambda cfg: partial(LowBitEinsum, forward='int8'),
    'fp8': lambda cfg: partial(LowBitEinsum, forward='float8_e4m3fn', backward='float8_e5m2'),
    'packed': lambda cfg: partial(PackedEinsum, bitnet=cfg.bitnet),  # of exported models; it cannot be trained
}
