"""OLMo 2 (arXiv 2501.00656): norms after attention and MLP, and over all heads of queries and keys at once."""

from __future__ import annotations

from typing import Any

from llm_jax.base.registry import NoSettings, register
from llm_jax.hf import llama
from llm_jax.hf.family import FAMILIES, Family
from llm_jax.hf.fields import Fields
from llm_jax.hf.rules import Rule, attention_rules, mlp_rules, norm_rules, table_rules
from llm_jax.models.decoder_config import DecoderConfig

LAYER = 'model.layers.{l}'
NORMS = {'blocks/attn_post_norm': f'{LAYER}.post_attention_layernorm',
         'blocks/mlp_post_norm': f'{LAYER}.post_feedforward_layernorm', 'final_norm': 'model.norm'}


def read(hf: Fields) -> dict[str, Any]:
  values = llama.read(hf, vocab_size=50304, eps=1e-5, biases=('attention_bias',))
  return values | {'norm_position': 'post', 'qk_norm': True, 'qk_norm_heads': 'all'}


def write(cfg: DecoderConfig) -> dict[str, Any]:
  return llama.without(llama.write(cfg), 'mlp_bias')


def rules(cfg: DecoderConfig) -> list[Rule]:
  attention = attention_rules(f'{LAYER}.self_attn', qkv_bias=cfg.head_options['qkv_bias'],
                              out_bias=cfg.head_options['out_bias'])
  norms = [Rule(f'{LAYER}.self_attn.{name}_norm.weight', f'blocks/attn/{name}_norm/scale', 'X', 'X') for name in 'qk']
  return [*table_rules('model.embed_tokens.weight', 'lm_head.weight', cfg.tie_embeddings), *norm_rules(NORMS),
          *attention, *norms, *mlp_rules(f'{LAYER}.mlp', llama.GATED, False)]


register(FAMILIES, 'olmo2', Family('Olmo2ForCausalLM', read, write, rules), NoSettings)
