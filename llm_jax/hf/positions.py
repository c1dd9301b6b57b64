"""Rotary positions and attention windows in the configs of published models, in both directions."""

from __future__ import annotations

from typing import Any

from llm_jax.hf.fields import Fields
from llm_jax.layers.rope import Rope
from llm_jax.layers.rope_scaling import Dynamic, Linear, Llama3, Yarn, unscaled
from llm_jax.models.decoder_config import DecoderConfig

ORIGINAL = 'original_max_position_embeddings'
# By their name of a scaling: ours, its class, and our field by theirs.
SCALINGS: dict[str, tuple[str, type, dict[str, str]]] = {
    'linear': ('rope_linear', Linear, {'factor': 'factor'}),
    'llama3': ('rope_llama3', Llama3, {'factor': 'factor', 'low_freq_factor': 'low_freq_factor',
                                       'high_freq_factor': 'high_freq_factor', ORIGINAL: 'original_max_len'}),
    'yarn': ('rope_yarn', Yarn, {'factor': 'factor', ORIGINAL: 'original_max_len', 'beta_fast': 'beta_fast',
                                 'beta_slow': 'beta_slow', 'attention_factor': 'attention_factor', 'mscale': 'mscale',
                                 'mscale_all_dim': 'mscale_all_dim', 'truncate': 'truncate'}),
    'dynamic': ('rope_dynamic', Dynamic, {'factor': 'factor', ORIGINAL: 'original_max_len'}),
}


def read_scaling(hf: Fields, spec: dict[str, Any], max_len: int) -> tuple[str, dict[str, Any]]:
  """(the name of the scaling, its settings) for their dict; unknown ones become problems."""
  kind = spec.get('rope_type', spec.get('type', 'default')) or 'default'
  if not isinstance(kind, str) or kind not in (*SCALINGS, 'default'):
    hf.problems.append(f'rope scaling {kind!r}; it would fit with default, {", ".join(SCALINGS)}')
    return 'none', {}
  name, _, fields = SCALINGS.get(kind, ('none', Any, {}))
  other = spec.keys() - fields.keys() - {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor', 'finetuned'}
  if other := {key for key in other if spec[key] not in (None, False) and key != ORIGINAL}:
    hf.problems.append(f'rope scaling {kind} with {", ".join(sorted(other))}, which is unknown')
  if kind == 'default':
    return 'none', {}
  if 'factor' in fields and not isinstance(spec.get('factor'), int | float) and kind != 'yarn':
    hf.problems.append(f'rope scaling {kind}: factor must be a number; got {spec.get("factor")!r}')
  settings = {fields[key]: value for key, value in spec.items() if key in fields and value is not None}
  if 'original_max_len' in {*fields.values()} and (kind == 'dynamic' or 'original_max_len' not in settings):
    settings['original_max_len'] = max_len
  if kind == 'yarn' and spec.get('factor') is None:
    settings['factor'] = max_len / settings['original_max_len']
  return name, {key: float(value) if type(value) is int and key != 'original_max_len' else value
                for key, value in settings.items()}


def read_rope(hf: Fields, max_len: int, theta: float = 10000.0) -> dict[str, Any]:
  """Our fields for a model of `max_len` with one kind of rotary positions, in either notation of transformers."""
  newer, older = hf.get('rope_parameters'), hf.get('rope_scaling')
  spec = older or newer or {}  # as transformers does
  if not isinstance(spec, dict):
    hf.problems.append(f'rope_scaling: must be a section; got {spec!r}')
    return {}
  if any(isinstance(value, dict) for value in spec.values()):
    hf.problems.append('rope_parameters: different ones for kinds of layers')
    return {}
  base = spec.get('rope_theta', hf.number('rope_theta', theta))
  name, settings = read_scaling(hf, spec, max_len)
  values: dict[str, Any] = {'positions': 'rope', 'rope_base': float(base), 'rope_scaling': (name,)}
  return values | ({name: settings} if settings else {})


def write_scaling(rope: Rope) -> dict[str, Any] | None:
  """Their dict for a scaling; None for none."""
  if rope.scaling is unscaled:
    return None
  kind, (_, _, fields) = next((kind, entry) for kind, entry in SCALINGS.items() if isinstance(rope.scaling, entry[1]))
  values = {theirs: getattr(rope.scaling, ours) for theirs, ours in fields.items()
            if not (kind == 'dynamic' and theirs == ORIGINAL)}  # there it is max_position_embeddings
  unset = [key for key, value in values.items() if value is None or (key.startswith('mscale') and not value)]
  return {'rope_type': kind} | {key: value for key, value in values.items() if key not in unset}


def write_rope(cfg: DecoderConfig) -> dict[str, Any]:
  """Their fields for the rotary positions of the first layer that has some, in the notation that all versions read."""
  rope = next((layer.rope for layer in cfg.layers if layer.rope is not None), None)
  if rope is None:
    return {}
  scaling = write_scaling(rope)
  longest = rope.scaling.original_max_len if isinstance(rope.scaling, Dynamic) else cfg.max_len
  return {'rope_theta': rope.base, 'rope_scaling': scaling, 'max_position_embeddings': longest}


def read_layer_types(hf: Fields, num_layers: int, window: int | None, default: list[bool]) -> tuple[int, ...]:
  """The window of each layer; `default` says which layers have it where layer_types is absent."""
  kinds = hf.get('layer_types')
  if kinds is not None:
    if len(kinds) != num_layers or set(kinds) - {'sliding_attention', 'full_attention'}:
      hf.problems.append(f'layer_types must hold sliding_attention or full_attention for each of {num_layers} layers')
    default = [kind == 'sliding_attention' for kind in kinds]
  windows = tuple((window or 0) if sliding else 0 for sliding in default)
  return windows if any(windows) else (0,)


def windows_of(cfg: DecoderConfig) -> list[int]:
  """The window of each layer."""
  return [cfg.layers[i % len(cfg.layers)].window for i in range(cfg.num_layers)]


def layer_types(cfg: DecoderConfig) -> list[str]:
  return ['sliding_attention' if window else 'full_attention' for window in windows_of(cfg)]
