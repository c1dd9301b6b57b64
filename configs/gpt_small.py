"""GPT-2 small's shape (124M parameters) on the source code of Python's standard library.

  llm-jax train --config=configs/gpt_small.py

Result on CPUs (see on_cpu), after 700 steps: val/loss 4.39 on the 16,384 tokens that are evaluated during the run,
4.35 (1.66 bits per byte) on the whole validation part. 1 min 24 s on two cores of a Zen 5 EPYC, 10 minutes on two
cores of an older Xeon. The full size has not been timed yet.
"""

from llm_jax.config import base


def get_config():
  config = base()
  config.num_steps = 2000
  config.batch_tokens = 524_288
  config.tokens_per_device = None  # as many as fit: 16,384 do on an H100, not on a TPU v5e
  config.model.vocab_size = 50_304  # GPT-2's 50,257, rounded up to a multiple of 128
  config.model.num_layers = 12
  config.model.embed_dim = 768
  config.model.num_heads = 12
  config.model.scan_unroll = 12
  config.data.seq_len = 1024
  config.optim.learning_rate = 6e-4
  config.optim.warmup_cosine.warmup_steps = 200
  config.optim.adamw.b1 = 0.9
  config.optim.adamw.b2 = 0.95
  config.optim.adamw.weight_decay = 0.1
  config.eval.prompts = ('', 'import ', 'def __init__(self')
  config.eval.top_k = 40
  return config


def on_cpu(config):
  """A few million parameters: two cores show a falling loss in 2 minutes and readable samples in 10."""
  config.num_steps = 700
  config.batch_tokens = 2_048
  config.tokens_per_device = 2_048
  config.model.vocab_size = None  # the tokenizer's
  config.model.num_layers = 4
  config.model.embed_dim = 192
  config.model.num_heads = 6
  config.model.scan_unroll = 4
  config.data.seq_len = 128
  config.optim.learning_rate = 3e-3
  config.optim.warmup_cosine.warmup_steps = 60
  config.eval.every = 100
  config.eval.max_tokens = 16_384
  config.checkpoint.every = 100
