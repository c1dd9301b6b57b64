"""GPT-2 (OpenAI 2019): learned positions, biases, and one matrix for queries, keys and values."""

from __future__ import annotations

from typing import Any

from llm_jax.base.registry import NoSettings, register
from llm_jax.hf.family import FAMILIES, PLAIN, Family
from llm_jax.hf.fields import Fields, name_for
from llm_jax.hf.rules import Rule, norm_rules, table_rules
from llm_jax.models.decoder_config import DecoderConfig

LAYER = 'transformer.h.{l}'
QKV = tuple(f'blocks/attn/{name}' for name in 'qkv')


def read(hf: Fields) -> dict[str, Any]:
  hf.only('scale_attn_weights', True)
  hf.only('scale_attn_by_inverse_layer_idx', False)
  hf.only('add_cross_attention', False)
  dim = hf.count('n_embd', 768)
  return {'vocab_size': hf.count('vocab_size', 50257), 'max_len': hf.count('n_positions', 1024), 'embed_dim': dim,
          'num_layers': hf.count('n_layer', 12, 10_000), 'num_heads': hf.count('n_head', 12),
          'mlp_dim': hf.count('n_inner', 4 * dim), 'mlp': hf.choice('activation_function', 'gelu_new', PLAIN),
          'norm': 'layer_norm', 'layer_norm': {'eps': float(hf.number('layer_norm_epsilon', 1e-5))}, 'use_bias': True,
          'tie_embeddings': hf.flag('tie_word_embeddings', True)}


def write(cfg: DecoderConfig) -> dict[str, Any]:
  eps = cfg.sections['layer_norm'].eps if 'layer_norm' in cfg.sections else 1e-5
  return {'vocab_size': cfg.vocab_size, 'n_positions': cfg.max_len, 'n_embd': cfg.embed_dim, 'n_layer': cfg.num_layers,
          'n_head': cfg.num_heads, 'n_inner': cfg.F, 'activation_function': name_for(PLAIN, cfg.mlp) or 'gelu_new',
          'layer_norm_epsilon': eps, 'tie_word_embeddings': cfg.tie_embeddings, 'attn_pdrop': 0.0,
          'embd_pdrop': cfg.dropout, 'resid_pdrop': cfg.dropout}


def rules(cfg: DecoderConfig) -> list[Rule]:
  norms = {'blocks/attn_norm': f'{LAYER}.ln_1', 'blocks/mlp_norm': f'{LAYER}.ln_2', 'final_norm': 'transformer.ln_f'}
  return [
      *table_rules('transformer.wte.weight', 'lm_head.weight', cfg.tie_embeddings),
      Rule('transformer.wpe.weight', 'positions/w', 'P D', 'P D'),
      *norm_rules(norms, bias=True),
      Rule(f'{LAYER}.attn.c_attn.weight', tuple(f'{path}/w' for path in QKV), 'D N H', 'D (N H)', axis=1),
      Rule(f'{LAYER}.attn.c_attn.bias', tuple(f'{path}/b' for path in QKV), 'N H', '(N H)'),
      Rule(f'{LAYER}.attn.c_proj.weight', 'blocks/attn/o/w', 'N H D', '(N H) D'),
      Rule(f'{LAYER}.attn.c_proj.bias', 'blocks/attn/o/b', 'D', 'D'),
      Rule(f'{LAYER}.mlp.c_fc.weight', 'blocks/mlp/up/w', 'D F', 'D F'),
      Rule(f'{LAYER}.mlp.c_fc.bias', 'blocks/mlp/up/b', 'F', 'F'),
      Rule(f'{LAYER}.mlp.c_proj.weight', 'blocks/mlp/down/w', 'F D', 'F D'),
      Rule(f'{LAYER}.mlp.c_proj.bias', 'blocks/mlp/down/b', 'D', 'D')]


register(FAMILIES, 'gpt2', Family('GPT2LMHeadModel', read, write, rules, prefix='transformer.'), NoSettings)
