"""BitNet in folders of transformers: matrices of -1, 0 and 1 in two bits each, and a weight_scale beside each.

quantization_config names the class that computes with them there (integrations/bitnet.py):

- bitlinear, the default: packed matrices, whose weight_scale is 1 over their scale
- autobitlinear, offline: packed matrices, whose weight_scale is their scale; it multiplies biases too, so a model with
  biases is refused
- autobitlinear, online: weights that are quantized in each forward pass

Packed ones are read as a model with einsum=packed, the others as one with einsum=bitnet. All quantize the inputs of
matrices to 8 bits. Dims: I inputs, O outputs of a matrix, J I / 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from llm_jax.base.builder import Sections
from llm_jax.base.errors import ConfigError, StorageError
from llm_jax.extras.bitnet import EPS, SHIFTS_1K1, BitNet, unpack
from llm_jax.extras.bitnet_hf import pack_hf, unpack_hf
from llm_jax.hf.fields import Fields
from llm_jax.hf.rules import Rule, Shape, letters

KINDS = ('bitnet', 'packed')  # of matrices in models of ours
# Modules that are never quantized here; transformers quantizes lm_head if a list lacks it.
_SPARED = {'lm_head', 'model.embed_tokens', 'embed_tokens', 'model.norm', 'norm'}


class Ternary(NamedTuple):
  """Two tensors, each by a rule of its own, that hold a matrix; see rules.Rule."""

  rule: Rule  # of the matrix as weights
  is_scale: bool
  inverse: bool  # whether weight_scale is 1 over the scale
  bits: str | None  # weight_bits by which weights of ours are quantized when they are written; None: ours are packed

  @property
  def theirs(self) -> str:
    return self.rule.theirs + '_scale' * self.is_scale

  @property
  def paths(self) -> tuple[str, ...]:
    path = self.rule.paths[0]
    return (path if self.bits else path.removesuffix('w') + ('scale' if self.is_scale else 'packed'),)

  @property
  def stacked(self) -> bool:
    return self.rule.stacked

  @property
  def is_bytes(self) -> bool:
    return not self.is_scale

  def shape(self, sizes: Mapping[str, Shape], vocab_size: int) -> Shape:
    if self.is_scale:
      return (1,)
    outputs, inputs = (self.rule.shape(sizes, vocab_size) if self.bits else
                       (sizes[self.paths[0]][1], 4 * sizes[self.paths[0]][0]))
    if outputs % 4 or inputs % 4:
      raise ConfigError(f'{self.theirs}: packs 4 values in a byte, so inputs and outputs of matrices must be multiples '
                        f'of 4; got {inputs} and {outputs}')
    return outputs // 4, inputs

  def write(self, arrays: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    if self.bits:
      codes, scale = quantized(arrays[0], self.bits)
      if not self.is_scale:
        return pack_hf(self.rule.write([codes], vocab_size))
    else:
      scale = arrays[0]
      if not self.is_scale:
        return pack_hf(np.asarray(unpack(cast(Any, arrays[0]), 4 * arrays[0].shape[0])).T)
    return np.reshape(1 / scale if self.inverse else scale, 1).astype(np.float32)

  def read(self, tensor: np.ndarray, sizes: Mapping[str, Shape], vocab_size: int) -> Iterator[tuple[str, np.ndarray]]:
    if self.is_scale:
      if not (np.isfinite(tensor).all() and (tensor > 0).all()):
        raise StorageError(f'{self.theirs}: damaged: must be a positive number; got {tensor}')
      yield self.paths[0], np.reshape(1 / tensor if self.inverse else tensor, ())
      return
    codes_IO = unpack_hf(tensor).T
    if (codes_IO > 1).any():
      raise StorageError(f'{self.theirs}: damaged: has values other than -1, 0 and 1')
    bits_JKO = (codes_IO + 1).astype(np.uint8).reshape(-1, 4, codes_IO.shape[1])
    yield self.paths[0], np.bitwise_or.reduce(bits_JKO << SHIFTS_1K1, axis=1)


def quantized(w: np.ndarray, bits: str) -> tuple[np.ndarray, np.ndarray]:
  """extras.bitnet.weight_codes in NumPy, as the matrix is on the host, and in each of several processes."""
  scale = np.maximum(np.mean(np.abs(w), dtype=np.float64), EPS).astype(np.float32)
  if bits == '1':
    return np.where(w >= np.mean(w, dtype=np.float64).astype(np.float32), 1, -1).astype(np.int8), scale
  return np.clip(np.round(w / scale), -1, 1).astype(np.int8), scale


def ternary_rules(rules: Sequence[Rule], inverse: bool, bits: str | None = None) -> list[Any]:
  """The rules of a model whose matrices in layers are packed. Raises ConfigError if transformers has no such form."""
  found = list[Any]()
  for rule in rules:
    if not rule.stacked or not all(path.endswith('/w') for path in rule.paths):
      found.append(rule)
      continue
    groups = letters(rule.their_dims)
    if len(rule.paths) > 1 or len(groups) != 2 or groups[1] + groups[0] != rule.our_dims.split():
      raise ConfigError(f'{rule.theirs}: transformers has no BitNet of this family that could be read here')
    found += [Ternary(rule, is_scale, inverse, bits) for is_scale in (False, True)]
  return found


def read_quantization(hf: Fields, model: dict[str, Any]) -> dict[str, Any]:
  """The values of a model section with those of quantization_config, which is BitNet's or absent."""
  config = hf.get('quantization_config') or {}
  settings = {key: value for kind in KINDS for key, value in model.get(kind, {}).items()}
  model = {key: value for key, value in model.items() if key not in KINDS}
  if not config:
    if settings:
      hf.problems.append('quantization_config: absent; a model of this family is computed here with BitNet only')
    return model
  known = {'quant_method', 'linear_class', 'quantization_mode', 'use_rms_norm', 'rms_norm_eps',
           'modules_to_not_convert'}
  for name in sorted(config.keys() - known):
    if config[name]:
      hf.problems.append(f'quantization_config: {name}={config[name]!r} is unknown')
  linear = config.get('linear_class', 'bitlinear')
  if linear not in ('bitlinear', 'autobitlinear'):
    hf.problems.append(f'quantization_config: linear_class {linear!r}; it would fit with bitlinear or autobitlinear')
  if config.get('use_rms_norm'):
    hf.problems.append('quantization_config: use_rms_norm, a learned norm before each matrix')
  spared = config.get('modules_to_not_convert')
  if spared is not None and not {'lm_head'} <= set(spared) <= _SPARED:
    hf.problems.append(f'quantization_config: modules_to_not_convert {spared}; it would fit with lm_head')
  online = linear == 'autobitlinear' and config.get('quantization_mode') == 'online'
  kind = 'bitnet' if online else 'packed'
  return model | {'einsum': kind} | ({kind: settings} if settings else {})


def has_biases(cfg: Any) -> bool:
  return any((cfg.head_options['qkv_bias'], cfg.head_options['out_bias'],
              cfg.use_bias if cfg.mlp_bias is None else cfg.mlp_bias))


def write_quantization(cfg: Any, linear_class: str) -> dict[str, Any]:
  """The field quantization_config for a model with einsum=packed; nothing for others."""
  if getattr(cfg, 'einsum', '') != 'packed':
    return {}
  return {'quantization_config': {'quant_method': 'bitnet', 'linear_class': linear_class,
                                  'quantization_mode': 'offline'}}


def as_packed(cfg: Any) -> Any:
  """The config of a model with quantized matrices as it is published: packed, without settings of training alone."""
  kind = getattr(cfg, 'einsum', '')
  if kind not in KINDS:
    return cfg
  mine = cfg.sections[kind]
  kept = {name: getattr(mine, name) for name in ('activation_bits', 'sub_norm', 'out_norm', 'out_norm_eps')}
  return dataclasses.replace(cfg, einsum='packed', sections=_replaced(cfg, 'packed', BitNet(**kept)))


def as_trained(cfg: Any) -> Any:
  """The config with which a model of packed matrices is trained further."""
  if getattr(cfg, 'einsum', '') != 'packed':
    return cfg
  return dataclasses.replace(cfg, einsum='bitnet', sections=_replaced(cfg, 'bitnet', cfg.sections['packed']))


def _replaced(cfg: Any, kind: str, settings: BitNet) -> Sections:
  return Sections({name: value for name, value in cfg.sections.items() if name not in KINDS} | {kind: settings})
