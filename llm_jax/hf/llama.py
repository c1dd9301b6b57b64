"""Llama 1 to 3.3, and the families that differ from it by a few fields: Mistral, Qwen2, Qwen3, SmolLM3, Granite."""

from __future__ import annotations

from typing import Any

from llm_jax.base.registry import NoSettings, register
from llm_jax.hf.family import (
  FAMILIES,
  SILU,
  Family,
  check_heads,
  has_mlp_bias,
  read_rms_norm,
  read_shape,
  rms_eps,
  write_shape,
)
from llm_jax.hf.fields import Fields, name_for
from llm_jax.hf.positions import layer_types, read_layer_types, read_rope, windows_of, write_rope
from llm_jax.hf.rules import Rule, attention_rules, mlp_rules, norm_rules, table_rules
from llm_jax.models.decoder_config import DecoderConfig

BIASES = ('attention_bias', 'mlp_bias')
GATED = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}
NORMS = {'blocks/attn_norm': 'model.layers.{l}.input_layernorm',
         'blocks/mlp_norm': 'model.layers.{l}.post_attention_layernorm', 'final_norm': 'model.norm'}


def read(hf: Fields, *, vocab_size: int = 32000, kv_heads: int | None = None, tied: bool = False, max_len: int = 2048,
         eps: float = 1e-6, theta: float = 10000.0, biases: tuple[str, ...] = BIASES) -> dict[str, Any]:
  """`biases` are the fields of biases that the family has; transformers ignores others, so they are refused."""
  attention_bias, mlp_bias = (hf.flag(name, False) if name in biases else False for name in BIASES)
  shape = read_shape(hf, vocab_size=vocab_size, kv_heads=kv_heads, tied=tied, max_len=max_len)
  return {**shape, **read_rope(hf, shape['max_len'], theta), **read_rms_norm(hf, eps),
          'mlp': hf.choice('hidden_act', 'silu', SILU), 'qkv_bias': attention_bias, 'out_bias': attention_bias,
          'mlp_bias': mlp_bias}


def write(cfg: DecoderConfig) -> dict[str, Any]:
  return write_shape(cfg) | write_rope(cfg) | {
      'rms_norm_eps': rms_eps(cfg), 'hidden_act': name_for(SILU, cfg.mlp) or 'silu',
      'attention_bias': cfg.head_options['out_bias'], 'mlp_bias': has_mlp_bias(cfg)}


def rules(cfg: DecoderConfig) -> list[Rule]:
  return [*table_rules('model.embed_tokens.weight', 'lm_head.weight', cfg.tie_embeddings), *norm_rules(NORMS),
          *attention_rules('model.layers.{l}.self_attn', qkv_bias=cfg.head_options['qkv_bias'],
                           out_bias=cfg.head_options['out_bias'], qk_norm=cfg.qk_norm),
          *mlp_rules('model.layers.{l}.mlp', GATED, has_mlp_bias(cfg))]


def read_llama(hf: Fields) -> dict[str, Any]:
  check_heads(hf)
  return read(hf)


def read_mistral(hf: Fields) -> dict[str, Any]:
  values = read(hf, kv_heads=8, max_len=131072, biases=())
  return values | {'windows': (hf.get('sliding_window', 4096) or 0,)}


def write_mistral(cfg: DecoderConfig) -> dict[str, Any]:
  return without(write(cfg), *BIASES) | {'sliding_window': windows_of(cfg)[0] or None}


def read_windows(hf: Fields, num_layers: int, window: int | None = 4096) -> tuple[int, ...]:
  """The windows of Qwen2 and Qwen3: those of layers from max_window_layers on, if they are used."""
  window = hf.get('sliding_window', window)
  first = hf.number('max_window_layers', 28)
  used = hf.flag('use_sliding_window', False) and window is not None
  return read_layer_types(hf, num_layers, window if used else None, [used and i >= first for i in range(num_layers)])


def write_windows(cfg: DecoderConfig) -> dict[str, Any]:
  windows = windows_of(cfg)
  first = next((i for i, window in enumerate(windows) if window), len(windows))
  return {'use_sliding_window': any(windows), 'sliding_window': max(windows) or None, 'max_window_layers': first,
          'layer_types': layer_types(cfg)}


def read_qwen2(hf: Fields) -> dict[str, Any]:
  values = read(hf, vocab_size=151936, kv_heads=32, max_len=32768, biases=())
  hf.get('attention_bias')  # has no effect there
  return values | {'windows': read_windows(hf, values['num_layers']), 'qkv_bias': True}


def read_qwen3(hf: Fields) -> dict[str, Any]:
  values = {'head_dim': 128} | read(hf, vocab_size=151936, kv_heads=32, max_len=32768, biases=('attention_bias',))
  return values | {'windows': read_windows(hf, values['num_layers']), 'qk_norm': True}


def read_smollm3(hf: Fields) -> dict[str, Any]:
  values = read(hf, vocab_size=128256, kv_heads=4, tied=True, max_len=32768, theta=2000000.0)
  num_layers = values['num_layers']
  every = hf.count('no_rope_layer_interval', 4)
  has_rope = hf.get('no_rope_layers') or [(i + 1) % every != 0 for i in range(num_layers)]
  if len(has_rope) != num_layers:
    hf.problems.append(f'no_rope_layers must have an entry for each of {num_layers} layers; got {len(has_rope)}')
  window = hf.get('sliding_window')
  used = hf.flag('use_sliding_window', False) and window is not None
  hf.get('max_window_layers')  # has no effect there
  windows = read_layer_types(hf, num_layers, window if used else None, [used and not has for has in has_rope])
  base = values['rope_base']
  return values | {'windows': windows, 'rope_bases': tuple(base if has else 0.0 for has in has_rope)}


def write_smollm3(cfg: DecoderConfig) -> dict[str, Any]:
  layers = [cfg.layers[i % len(cfg.layers)] for i in range(cfg.num_layers)]
  windows = windows_of(cfg)
  return write(cfg) | {'no_rope_layers': [int(layer.rope is not None) for layer in layers],
                       'use_sliding_window': any(windows), 'sliding_window': max(windows) or None,
                       'layer_types': layer_types(cfg)}


def read_granite(hf: Fields) -> dict[str, Any]:
  values = read(hf)
  return values | {'embed_scale': float(hf.number('embedding_multiplier', 1.0)),
                   'logit_scale': 1 / hf.number('logits_scaling', 1.0),
                   'residual_scale': float(hf.number('residual_multiplier', 1.0)),
                   'query_scale': float(hf.number('attention_multiplier', 1.0))}


def write_granite(cfg: DecoderConfig) -> dict[str, Any]:
  return write(cfg) | {'embedding_multiplier': cfg.embed_scale, 'logits_scaling': 1 / cfg.logit_scale,
                       'residual_multiplier': cfg.residual_scale,
                       'attention_multiplier': cfg.query_scale or cfg.H ** -0.5}


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
  return {name: value for name, value in values.items() if name not in names}


register(FAMILIES, 'llama', Family('LlamaForCausalLM', read_llama, write, rules), NoSettings)
register(FAMILIES, 'mistral', Family('MistralForCausalLM', read_mistral, write_mistral, rules), NoSettings)
register(FAMILIES, 'qwen2', Family('Qwen2ForCausalLM', read_qwen2,
                                   lambda cfg: without(write(cfg), *BIASES) | write_windows(cfg), rules), NoSettings)
register(FAMILIES, 'qwen3', Family('Qwen3ForCausalLM', read_qwen3,
                                   lambda cfg: without(write(cfg), 'mlp_bias') | write_windows(cfg), rules), NoSettings)
register(FAMILIES, 'smollm3', Family('SmolLM3ForCausalLM', read_smollm3, write_smollm3, rules), NoSettings)
register(FAMILIES, 'granite', Family('GraniteForCausalLM', read_granite, write_granite, rules), NoSettings)
