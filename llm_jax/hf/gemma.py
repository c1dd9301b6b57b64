"""Gemma 1 (arXiv 2403.08295), Gemma 2 (arXiv 2408.00118) and the text part of Gemma 3 (arXiv 2503.19786)."""

from __future__ import annotations

from typing import Any

from llm_jax.base.registry import NoSettings, register
from llm_jax.hf.family import FAMILIES, SILU, Family, check_heads, read_rms_norm, read_shape, rms_eps, write_shape
from llm_jax.hf.fields import Fields, name_for
from llm_jax.hf.llama import GATED
from llm_jax.hf.llama import NORMS as NORMS_1
from llm_jax.hf.positions import (
  layer_types,
  read_layer_types,
  read_rope,
  read_scaling,
  windows_of,
  write_rope,
  write_scaling,
)
from llm_jax.hf.rules import Rule, attention_rules, mlp_rules, norm_rules, table_rules
from llm_jax.layers.rope_scaling import unscaled
from llm_jax.models.decoder_config import DecoderConfig

LAYER = 'model.layers.{l}'
NORMS_2 = {'blocks/attn_norm': f'{LAYER}.input_layernorm', 'blocks/attn_post_norm': f'{LAYER}.post_attention_layernorm',
           'blocks/mlp_norm': f'{LAYER}.pre_feedforward_layernorm',
           'blocks/mlp_post_norm': f'{LAYER}.post_feedforward_layernorm', 'final_norm': 'model.norm'}


# Of Gemma 1, whose first files say gelu and mean its approximation.
SILU_1 = SILU | {'gelu': 'geglu'}


def _read(hf: Fields, activation: str, *, acts: dict[str, str] = SILU, vocab_size: int, kv_heads: int,
          max_len: int) -> dict[str, Any]:
  hf.only('use_bidirectional_attention', None, False)
  bias = hf.flag('attention_bias', False)
  values = {'head_dim': 256} | read_shape(hf, vocab_size=vocab_size, kv_heads=kv_heads, tied=True, max_len=max_len)
  return values | read_rms_norm(hf, 1e-6, offset=True) | {
      'mlp': hf.choice(activation, 'gelu_pytorch_tanh', acts), 'qkv_bias': bias, 'out_bias': bias,
      'embed_scale': float(values['embed_dim']) ** 0.5}


def read_1(hf: Fields) -> dict[str, Any]:
  hf.get('hidden_activation')  # of some files; transformers reads hidden_act
  values = _read(hf, 'hidden_act', acts=SILU_1, vocab_size=256000, kv_heads=16, max_len=8192)
  return values | read_rope(hf, values['max_len'])


def read_2(hf: Fields) -> dict[str, Any]:
  check_heads(hf)
  hf.get('hidden_act'), hf.get('sliding_window_size')
  values = _read(hf, 'hidden_activation', vocab_size=256000, kv_heads=4, max_len=8192)
  return values | read_rope(hf, values['max_len']) | _read_scores(hf, 50.0, 30.0) | {
      'windows': read_layer_types(hf, values['num_layers'], hf.get('sliding_window', 4096),
                                  [(i + 1) % 2 != 0 for i in range(values['num_layers'])])}


def _read_scores(hf: Fields, attention: float | None, logits: float | None) -> dict[str, Any]:
  return {'query_scale': hf.number('query_pre_attn_scalar', 256) ** -0.5, 'norm_position': 'both',
          'attention_soft_cap': float(hf.get('attn_logit_softcapping', attention) or 0),
          'logit_soft_cap': float(hf.get('final_logit_softcapping', logits) or 0)}


def read_3(hf: Fields) -> dict[str, Any]:
  """Layers with a window have positions of their own base, without scaling."""
  check_heads(hf)
  hf.get('hidden_act')
  values = _read(hf, 'hidden_activation', vocab_size=262208, kv_heads=4, max_len=131072) | _read_scores(hf, None, None)
  num_layers, every = values['num_layers'], hf.count('sliding_window_pattern', 6)
  windows = read_layer_types(hf, num_layers, hf.get('sliding_window', 4096),
                             [(i + 1) % every != 0 for i in range(num_layers)])
  sliding = [bool(windows[i % len(windows)]) for i in range(num_layers)]
  newer = hf.get('rope_parameters') or {}
  if newer and not all(isinstance(spec, dict) for spec in newer.values()):
    hf.problems.append('rope_parameters: must have full_attention and sliding_attention')
    newer = {}
  full = {'rope_theta': hf.number('rope_theta', 1e6)} | (hf.get('rope_scaling') or {}) | newer.get('full_attention', {})
  near = {'rope_theta': hf.number('rope_local_base_freq', 1e4)} | newer.get('sliding_attention', {})
  name, settings = read_scaling(hf, full, values['max_len'])
  if read_scaling(hf, near, values['max_len'])[0] != 'none':
    hf.problems.append('rope_parameters.sliding_attention: is scaled; it would fit with rope_type default')
  return values | ({name: settings} if settings and not all(sliding) else {}) | {
      'windows': windows, 'qk_norm': True, 'positions': 'rope',
      'rope_bases': tuple(float((near if own else full)['rope_theta']) for own in sliding),
      'rope_scaling': tuple('none' if own else name for own in sliding)}


def _write(cfg: DecoderConfig, activation: str) -> dict[str, Any]:
  return write_shape(cfg) | write_rope(cfg) | {
      'rms_norm_eps': rms_eps(cfg), activation: name_for(SILU, cfg.mlp) or 'gelu_pytorch_tanh',
      'attention_bias': cfg.head_options['out_bias']}


def write_2(cfg: DecoderConfig) -> dict[str, Any]:
  return _write(cfg, 'hidden_activation') | _write_scores(cfg)


def _write_scores(cfg: DecoderConfig) -> dict[str, Any]:
  scalar = (cfg.query_scale or cfg.H ** -0.5) ** -2
  return {'query_pre_attn_scalar': round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
          'attn_logit_softcapping': cfg.attention_soft_cap or None,
          'final_logit_softcapping': cfg.logit_soft_cap or None,
          'sliding_window': max(windows_of(cfg)) or 4096,  # a number even if no layer has a window
          'layer_types': layer_types(cfg)}


def write_3(cfg: DecoderConfig) -> dict[str, Any]:
  values = write_2(cfg)
  layers = [cfg.layers[i % len(cfg.layers)] for i in range(cfg.num_layers)]
  near, full = ([layer.rope for layer in layers if layer.rope and bool(layer.window) == own] for own in (True, False))
  if near:
    values['rope_local_base_freq'] = near[0].base
  if full:
    scaling = None if full[0].scaling is unscaled else write_scaling(full[0])
    values |= {'rope_theta': full[0].base, 'rope_scaling': scaling}
  return values


def rules(cfg: DecoderConfig) -> list[Rule]:
  norms = NORMS_2 if cfg.norm_position == 'both' else NORMS_1
  return [*table_rules('model.embed_tokens.weight', 'lm_head.weight', cfg.tie_embeddings), *norm_rules(norms),
          *attention_rules(f'{LAYER}.self_attn', qkv_bias=cfg.head_options['qkv_bias'],
                           out_bias=cfg.head_options['out_bias'], qk_norm=cfg.qk_norm),
          *mlp_rules(f'{LAYER}.mlp', GATED, False)]


register(FAMILIES, 'gemma', Family('GemmaForCausalLM', read_1, lambda cfg: _write(cfg, 'hidden_act'), rules),
         NoSettings)
register(FAMILIES, 'gemma2', Family('Gemma2ForCausalLM', read_2, write_2, rules), NoSettings)
register(FAMILIES, 'gemma3_text', Family('Gemma3ForCausalLM', read_3, write_3, rules), NoSettings)
