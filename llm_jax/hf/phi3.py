"""Phi-3 (arXiv 2404.14219): one matrix for queries, keys and values, and one for gate and up."""

from __future__ import annotations

from typing import Any

from llm_jax.base.registry import NoSettings, register
from llm_jax.hf import llama
from llm_jax.hf.family import FAMILIES, Family
from llm_jax.hf.fields import Fields
from llm_jax.hf.positions import windows_of
from llm_jax.hf.rules import Rule, norm_rules, table_rules
from llm_jax.models.decoder_config import DecoderConfig

LAYER = 'model.layers.{l}'


def read(hf: Fields) -> dict[str, Any]:
  values = llama.read(hf, vocab_size=32064, max_len=4096, eps=1e-5, biases=())
  hf.get('original_max_position_embeddings')  # of long contexts, whose scaling is refused
  if values.get('rope_scaling', ('none',)) != ('none',) or hf.get('rope_scaling'):
    hf.problems.append('rope_scaling: is set; it would fit with null, as longrope cannot be computed here')
  share = (hf.get('rope_parameters') or {}).get('partial_rotary_factor', hf.get('partial_rotary_factor', 1.0))
  head_dim = values.get('head_dim', values['embed_dim'] // values['num_heads'])
  rotated = {} if share == 1 else {'rope_dim': int(head_dim * share)}
  return values | rotated | {'windows': (hf.get('sliding_window') or 0,)}


def write(cfg: DecoderConfig) -> dict[str, Any]:
  values = llama.without(llama.write(cfg), *llama.BIASES)
  rope = next((layer.rope for layer in cfg.layers if layer.rope is not None), None)
  rotated = rope.dim if rope is not None and rope.dim else cfg.H
  return values | {'sliding_window': windows_of(cfg)[0] or None, 'partial_rotary_factor': rotated / cfg.H,
                   'original_max_position_embeddings': cfg.max_len} | (
                       {} if rotated == cfg.H or rope is None else {'rope_parameters': {
                           'rope_type': 'default', 'rope_theta': rope.base, 'partial_rotary_factor': rotated / cfg.H}})


def rules(cfg: DecoderConfig) -> list[Rule]:
  return [*table_rules('model.embed_tokens.weight', 'lm_head.weight', cfg.tie_embeddings), *norm_rules(llama.NORMS),
          Rule(f'{LAYER}.self_attn.qkv_proj.weight', tuple(f'blocks/attn/{name}/w' for name in 'qkv'), 'D N H',
               '(N H) D'),
          Rule(f'{LAYER}.self_attn.o_proj.weight', 'blocks/attn/o/w', 'N H D', 'D (N H)'),
          Rule(f'{LAYER}.mlp.gate_up_proj.weight', ('blocks/mlp/gate/w', 'blocks/mlp/up/w'), 'D F', 'F D'),
          Rule(f'{LAYER}.mlp.down_proj.weight', 'blocks/mlp/down/w', 'F D', 'D F')]


register(FAMILIES, 'phi3', Family('Phi3ForCausalLM', read, write, rules), NoSettings)
