"""BitNet b1.58 2B4T (arXiv 2504.12285): ternary matrices, squared ReLU, and norms before the matrices o and down."""

from __future__ import annotations

from typing import Any

from llm_jax.base.registry import NoSettings, register
from llm_jax.hf import llama
from llm_jax.hf.family import FAMILIES, SILU, Family, read_rms_norm, read_shape, rms_eps, write_shape
from llm_jax.hf.fields import Fields, name_for
from llm_jax.hf.positions import read_rope, write_rope
from llm_jax.hf.rules import Rule
from llm_jax.models.decoder_config import DecoderConfig

ACTS = {'relu2': 'relu2glu'} | SILU
LAYER = 'model.layers.{l}'


def read(hf: Fields) -> dict[str, Any]:
  shape = read_shape(hf, vocab_size=128256, kv_heads=5, tied=False, max_len=2048)
  if shape.get('head_dim', shape['embed_dim'] // shape['num_heads']) * shape['num_heads'] != shape['embed_dim']:
    hf.problems.append('head_dim: times num_attention_heads must be hidden_size')
  bias, norm = bool(hf.get('attention_bias', False)), read_rms_norm(hf, 1e-5)
  return {**shape, **read_rope(hf, shape['max_len'], 500000.0), **norm, 'mlp': hf.choice('hidden_act', 'relu2', ACTS),
          'qkv_bias': bias, 'out_bias': bias, 'packed': {'out_norm': True, 'out_norm_eps': norm['rms_norm']['eps']}}


def write(cfg: DecoderConfig) -> dict[str, Any]:
  return write_shape(cfg) | write_rope(cfg) | {
      'rms_norm_eps': rms_eps(cfg), 'hidden_act': name_for(ACTS, cfg.mlp) or 'relu2',
      'attention_bias': cfg.head_options['out_bias']}


def rules(cfg: DecoderConfig) -> list[Rule]:
  return [*llama.rules(cfg), Rule(f'{LAYER}.self_attn.attn_sub_norm.weight', 'blocks/attn/o/norm', 'X', 'X'),
          Rule(f'{LAYER}.mlp.ffn_sub_norm.weight', 'blocks/mlp/down/norm', 'X', 'X')]


register(FAMILIES, 'bitnet', Family('BitNetForCausalLM', read, write, rules, linear_class='autobitlinear'), NoSettings)
