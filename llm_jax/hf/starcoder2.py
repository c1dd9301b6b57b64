"""StarCoder2 (arXiv 2402.19173): LayerNorms, biases everywhere, and a window."""

from __future__ import annotations

from typing import Any

from llm_jax.base.registry import NoSettings, register
from llm_jax.hf import llama
from llm_jax.hf.family import FAMILIES, PLAIN, Family, read_shape, write_shape
from llm_jax.hf.fields import Fields, name_for
from llm_jax.hf.positions import read_rope, windows_of, write_rope
from llm_jax.hf.rules import Rule, attention_rules, mlp_rules, norm_rules, table_rules
from llm_jax.models.decoder_config import DecoderConfig

MLP = {'up': 'c_fc', 'down': 'c_proj'}


def read(hf: Fields) -> dict[str, Any]:
  for unread in ('attention_softmax_in_fp32', 'scale_attention_softmax_in_fp32', 'scale_attn_weights',
                 'layer_norm_epsilon'):
    hf.get(unread)
  hf.only('norm_type', 'layer_norm')
  hf.only('mlp_type', 'default')
  shape = read_shape(hf, vocab_size=49152, kv_heads=2, tied=True, max_len=4096)
  return shape | read_rope(hf, shape['max_len']) | {
      'norm': 'layer_norm', 'layer_norm': {'eps': float(hf.number('norm_epsilon', 1e-5))}, 'norm_bias': True,
      'mlp': hf.choice('hidden_act', 'gelu_pytorch_tanh', PLAIN), 'use_bias': hf.flag('use_bias', True),
      'windows': (hf.get('sliding_window') or 0,)}


def write(cfg: DecoderConfig) -> dict[str, Any]:
  eps = cfg.sections['layer_norm'].eps if 'layer_norm' in cfg.sections else 1e-5
  return write_shape(cfg) | write_rope(cfg) | {
      'norm_epsilon': eps, 'hidden_act': name_for(PLAIN, cfg.mlp) or 'gelu_pytorch_tanh', 'use_bias': cfg.use_bias,
      'sliding_window': windows_of(cfg)[0] or None}


def rules(cfg: DecoderConfig) -> list[Rule]:
  return [*table_rules('model.embed_tokens.weight', 'lm_head.weight', cfg.tie_embeddings),
          *norm_rules(llama.NORMS, bias=True),
          *attention_rules('model.layers.{l}.self_attn', qkv_bias=cfg.use_bias, out_bias=cfg.use_bias),
          *mlp_rules('model.layers.{l}.mlp', MLP, cfg.use_bias)]


register(FAMILIES, 'starcoder2', Family('Starcoder2ForCausalLM', read, write, rules), NoSettings)
