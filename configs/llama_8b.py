"""The shape of Llama 3 8B (8.0B parameters), for 64 H100s or a pod of TPU v5e.

Meant for h100:64 (8 hosts); on v5p:4x4x4 set mesh.data=4, on v5e:16x16 tokens_per_device=8192.

  llm-jax plan --config=llama_8b --on=h100:64
  llm-jax train --config=llama_8b --distributed --config.data.path='corpus/*.jsonl'

Nothing has been trained with it yet, so learning rate and warm-up are those that models of its size have been
published with; memory is that of llm-jax plan.
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 250_000
  config.batch_tokens = 4_194_304
  config.tokens_per_device = 32_768
  config.model.vocab_size = 128_256
  config.model.num_layers = 32
  config.model.embed_dim = 4_096
  config.model.num_heads = 32
  config.model.num_kv_heads = 8
  config.model.mlp_dim = 14_336
  config.model.mlp = 'swiglu'
  config.model.norm = 'rms_norm'
  config.model.positions = 'rope'
  config.model.rope_base = 500_000.0
  config.model.tie_embeddings = False
  config.model.remat = 'full'
  config.data.seq_len = 8_192
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.optim.learning_rate = 3e-4
  config.optim.warmup_cosine.warmup_steps = 2_000
  config.optim.adamw.b2 = 0.95
  config.optim.adamw.weight_decay = 0.1
  config.eval.every = 1_000
  config.eval.max_tokens = 1_048_576
  return config


def on_cpu(config):
  """A few million parameters of the same parts."""
  config.num_steps = 300
  config.batch_tokens = 2_048
  config.tokens_per_device = 2_048
  config.model.vocab_size = None
  config.model.num_layers = 4
  config.model.embed_dim = 192
  config.model.num_heads = 6
  config.model.num_kv_heads = 2
  config.model.mlp_dim = 512
  config.model.remat = 'none'
  config.data.seq_len = 128
  config.optim.learning_rate = 3e-3
  config.optim.warmup_cosine.warmup_steps = 60
  config.eval.every = 100
  config.eval.max_tokens = 16_384
