"""Tiny models of each family, with random fields: what a config.json of a published model may hold."""

import random

SHAPE = {'vocab_size': 67, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 4, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'max_position_embeddings': 64, 'pad_token_id': None, 'bos_token_id': None,
         'eos_token_id': None}
FAMILIES = ('gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'smollm3', 'granite', 'gemma', 'gemma2', 'gemma3_text',
            'phi3', 'olmo2', 'starcoder2')


def rope(rng, kinds=('default', 'linear', 'llama3', 'yarn', 'dynamic')):
  """In the notation that all versions of transformers read."""
  kind = rng.choice(kinds)
  theta = rng.choice([1000.0, 10000.0, 500000.0])
  if kind == 'default':
    return {'rope_theta': theta}
  more = {'linear': {}, 'dynamic': {},
          'llama3': {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16},
          'yarn': {'original_max_position_embeddings': 16, 'beta_fast': rng.choice([32.0, 8.0])}}[kind]
  return {'rope_theta': theta, 'rope_scaling': {'rope_type': kind, 'factor': rng.choice([2.0, 8.0]), **more}}


def random_config(model_type, rng: random.Random):
  """A config.json of the family."""
  shape = SHAPE | {'hidden_size': rng.choice([32, 48]), 'num_hidden_layers': rng.choice([2, 4, 5]),
                   'num_key_value_heads': rng.choice([1, 2, 4]), 'tie_word_embeddings': rng.random() < 0.5}
  layers = shape['num_hidden_layers']
  window = rng.choice([3, 8])
  kinds = [rng.choice(['sliding_attention', 'full_attention']) for _ in range(layers)]
  head_dim, bias = {'head_dim': rng.choice([8, 16])}, {'attention_bias': rng.random() < 0.5}
  gated = {'hidden_act': rng.choice(['silu', 'gelu_pytorch_tanh'])}
  eps = {'rms_norm_eps': rng.choice([1e-5, 1e-6, 1e-3])}
  soft = {'query_pre_attn_scalar': rng.choice([8, 24]), 'sliding_window': window, 'layer_types': kinds} | head_dim | eps
  scaling = rope(rng)
  if scaling.get('rope_scaling', {}).get('rope_type') == 'dynamic':
    shape['max_position_embeddings'] = 8
  return {'model_type': model_type} | {
      'gpt2': lambda: {'vocab_size': 67, 'n_embd': shape['hidden_size'], 'n_layer': layers, 'n_head': 4,
                       'n_positions': 64, 'n_inner': rng.choice([None, 40]),
                       'activation_function': rng.choice(['gelu_new', 'gelu', 'relu']),
                       'layer_norm_epsilon': rng.choice([1e-5, 1e-3]), 'bos_token_id': None, 'eos_token_id': None,
                       'pad_token_id': None},
      'llama': lambda: shape | scaling | head_dim | bias | gated | eps | {'mlp_bias': rng.random() < 0.5},
      'mistral': lambda: shape | scaling | head_dim | eps | {'sliding_window': rng.choice([None, window])},
      'qwen2': lambda: shape | scaling | eps | {'use_sliding_window': rng.random() < 0.5, 'sliding_window': window,
                                                'max_window_layers': rng.randrange(layers + 1)},
      'qwen3': lambda: shape | scaling | head_dim | bias | eps,
      'smollm3': lambda: shape | rope(rng, ('default', 'llama3')) | bias | {
          'no_rope_layer_interval': rng.choice([2, 4])},
      'granite': lambda: shape | scaling | bias | eps | {
          'embedding_multiplier': 3.0, 'logits_scaling': 2.0, 'residual_multiplier': 0.3, 'attention_multiplier': 0.2},
      'gemma': lambda: shape | head_dim | rope(rng, ('default',)) | eps | {'attention_bias': False},
      'gemma2': lambda: shape | soft | rope(rng, ('default',)) | {
          'attn_logit_softcapping': rng.choice([None, 5.0]), 'final_logit_softcapping': rng.choice([None, 3.0])},
      'gemma3_text': lambda: shape | soft | rope(rng, ('default', 'linear')) | {'rope_local_base_freq': 100.0},
      'phi3': lambda: shape | rope(rng, ('default',)) | eps | {
          'sliding_window': rng.choice([None, window]), 'partial_rotary_factor': rng.choice([0.5, 1.0])},
      'olmo2': lambda: shape | scaling | bias | eps,
      'starcoder2': lambda: shape | scaling | {'use_bias': rng.random() < 0.5, 'norm_epsilon': rng.choice([1e-5, 1e-3]),
                                               'sliding_window': rng.choice([None, window])},
  }[model_type]()
